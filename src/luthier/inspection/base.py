"""The base class of inspectors: a question about what tuning did to a model; the answer is a sentence, a table, a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import Tensor

from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.update import Update

OUTSIDE = "outside the blocks"
BAR, GAP, WIDTH, LETTER = 14, 4, 420, 7  # pixels of the picture; a letter's width is a guess on the safe side


@dataclass(frozen=True)
class Case:
    """What is inspected: a base model, and updates of it by name."""

    base: ModelView
    updates: Mapping[str, Update]


@dataclass(frozen=True)
class Finding:
    """The answer to an inspector's question.

    says     the answer: a sentence or several, which name each update and end in a full stop
    columns, rows  the numbers behind it
    picture  an SVG element; "" if there is nothing to draw
    sure     how sure the answer is, in words without a full stop
    """

    says: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]] = field(default_factory=tuple)
    picture: str = ""
    sure: str = ""

    @staticmethod
    def shown(value: Any) -> str:
        """A cell of the table, as people read it."""
        return f"{value:.4g}" if isinstance(value, float) else str(value)


class Inspector(Method):
    """Inspects a tuned model."""

    def inspect(self, case: Case, lab: Lab | None = None) -> Finding:
        """The answer to this method's question. Raises LuthierError for a case that it cannot answer.

        lab  for methods that use the models
        """
        raise NotImplementedError  # the seam: every inspector has its own

    @classmethod
    def differences(cls, name: str, update: Update) -> Iterator[tuple[str, Tensor]]:
        """(parameter, what the update adds to it), one at a time, parts on one parameter summed. A new task head is left out.

        name  of the update. Raises LuthierError if some of its other parts are not differences of weights
        """
        odd = {p.kind for p in update.parts if not p.linear and p.as_head() is None}
        if odd:
            raise LuthierError(
                f"inspect.{cls.key()}: {name} holds parts that are not differences of weights ({', '.join(sorted(odd))}); "
                "leave it out of the command"
            )
        return Update(update.base, tuple(p for p in update.parts if p.linear)).sums()


def layer_of(name: str) -> str:
    """The block that a parameter belongs to, or OUTSIDE."""
    found = re.search(r"\.(\d+)\.", name)
    return OUTSIDE if found is None else f"block {found.group(1)}"


def in_order(layers: Iterable[str]) -> list[str]:
    """Names from `layer_of`: blocks by number, then OUTSIDE."""
    return sorted(layers, key=lambda layer: (layer == OUTSIDE, len(layer), layer))


def bars(rows: Sequence[tuple[str, float]], title: str, shown: Callable[[float], str], kind: str) -> str:
    """An SVG of named numbers of 0 or more, one bar each. The largest finite number has the whole width, and so do infinite ones.

    title  what the picture shows, for readers who cannot see it
    shown  how a number is written beside its bar
    kind   the picture's class in the page
    """
    longest = max((value for _, value in rows if math.isfinite(value)), default=0.0) or 1.0
    left = LETTER * max((len(name) for name, _ in rows), default=0) + GAP
    size = f'viewBox="0 0 {left + WIDTH + 80} {len(rows) * (BAR + GAP)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}" class="{kind}">'
    return "".join([head, *(_bar(i, *row, longest, left, shown) for i, row in enumerate(rows)), "</svg>"])


def _bar(at: int, name: str, value: float, longest: float, left: int, shown: Callable[[float], str]) -> str:
    y, width = at * (BAR + GAP), WIDTH * (value / longest if math.isfinite(value) else 1.0)
    text = f'y="{y + BAR - 3}" font-size="11" fill="currentColor"'
    return (
        f'<text x="0" {text}>{escape(name)}</text>'
        f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" fill="currentColor" opacity="0.6"/>'
        f'<text x="{left + width + 6:.1f}" {text}>{escape(shown(value))}</text>'
    )
