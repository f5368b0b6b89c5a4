"""How large the change is, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from luthier.inspection.base import Case, Finding, Inspector
from luthier.method import Source
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.update import Update

OUTSIDE = "outside the blocks"
BAR, GAP, WIDTH, LETTER = 14, 4, 420, 7  # pixels of the picture; a letter's width is a guess on the safe side
TITLE = "size of the change in each layer, as a share of its weights"


class Size(NamedTuple):
    """The change of one layer: its Frobenius norm, and that norm divided by the norm of the weights."""

    layer: str
    change: float
    relative: float


def layer_of(name: str) -> str:
    """The block a parameter belongs to, or OUTSIDE."""
    found = re.search(r"\.(\d+)\.", name)
    return OUTSIDE if found is None else f"block {found.group(1)}"


def sizes(update: Update, weights: Mapping[str, Tensor]) -> list[Size]:
    """Norms by layer, blocks in their order; differences of several parts on one tensor are added first.

    weights  of the base, by name
    """
    total: dict[str, Tensor] = {}
    for name, delta in update.deltas():
        total[name] = total[name] + delta if name in total else delta
    squares: dict[str, tuple[float, float]] = {}
    for name, delta in total.items():
        layer = layer_of(name)
        change, own = squares.get(layer, (0.0, 0.0))
        more = float(weights[name].detach().double().square().sum())
        squares[layer] = (change + float(delta.double().square().sum()), own + more)
    by_place = sorted(squares.items(), key=lambda kv: (kv[0] == OUTSIDE, len(kv[0]), kv[0]))
    return [
        Size(layer, change**0.5, (change / own) ** 0.5 if own else float("inf")) for layer, (change, own) in by_place
    ]


def bars(found: Mapping[str, list[Size]]) -> str:
    """An SVG of relative sizes, one bar a layer and update."""
    rows = [
        (f"{name}, {s.layer}" if len(found) > 1 else s.layer, s.relative) for name, all_ in found.items() for s in all_
    ]
    longest = max((r for _, r in rows), default=0.0) or 1.0
    left = LETTER * max((len(name) for name, _ in rows), default=0) + GAP
    return "".join([_opening(len(rows), left), *_drawn(rows, longest, left), "</svg>"])


def _opening(count: int, left: int) -> str:
    size = f'viewBox="0 0 {left + WIDTH + 80} {count * (BAR + GAP)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{TITLE}" class="norms">'


def _drawn(rows: list[tuple[str, float]], longest: float, left: int) -> Iterator[str]:
    for i, (name, value) in enumerate(rows):
        y, width = i * (BAR + GAP), WIDTH * value / longest
        text = f'y="{y + BAR - 3}" font-size="11" fill="currentColor"'
        yield f'<text x="0" {text}>{escape(name)}</text>'
        yield f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" fill="currentColor" opacity="0.6"/>'
        yield f'<text x="{left + width + 6:.1f}" {text}>{value:.2%}</text>'


class Norms(Inspector):
    """Say how large an update is in every block, as a share of the weights that it changes.

    Shares compare layers of different sizes and updates of different forms. They say where weights changed, not the effect.
    Cost: one pass over the update's tensors, made dense one at a time; no forward pass.
    """

    source: ClassVar[Source] = Source("Editing Models with Task Arithmetic", 2022, "arXiv:2212.04089", "section 2")

    most: int = Field(3, ge=1)
    """Number of layers that the sentence names."""

    @torch.no_grad()
    def inspect(self, case: Case, lab: Lab | None = None) -> Finding:
        weights = dict(case.base.module.named_parameters())
        found: dict[str, list[Size]] = {}
        for name, update in case.updates.items():
            if not update.linear:
                kinds = ", ".join(sorted({p.kind for p in update.parts if not p.linear}))
                raise LuthierError(f"inspect.norms: {name} holds parts that are no difference of weights ({kinds})")
            found[name] = sizes(update, weights)
        rows = [(name, *s) for name, all_ in found.items() for s in all_]
        return Finding(
            " ".join(self._said(name, all_) for name, all_ in found.items()), ("update", "layer", "change", "relative"),
            rows, bars(found), "exact: the norms are computed, not estimated",
        )  # fmt: skip

    def _said(self, name: str, found: list[Size]) -> str:
        largest = sorted(found, key=lambda s: -s.relative)[: self.most]
        named = ", ".join(f"{s.layer} ({s.relative:.2%})" for s in largest)
        return f"{name} changes most, as a share of the weights: {named or 'nothing'}."
