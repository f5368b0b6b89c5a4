"""The base class of inspectors: a question about what tuning did to a model; the answer is a sentence, a table, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.update import Update


@dataclass(frozen=True)
class Case:
    """What is inspected: a base model, and updates of it by name."""

    base: ModelView
    updates: Mapping[str, Update]


@dataclass(frozen=True)
class Finding:
    """The answer to an inspector's question.

    says     the answer, in a sentence
    columns, rows  the numbers behind it
    picture  an SVG element; "" if there is nothing to draw
    sure     how sure the answer is, in words
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
        raise NotImplementedError
