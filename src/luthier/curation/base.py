"""The curation seam: which rows, in which words. Each step adds columns that say why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from luthier.data.store import Row
from luthier.method import Method
from luthier.rng import Streams


class Selection(NamedTuple):
    """What a curator decided about every row it saw.

    keep    [M] int64, positions of the rows that stay, sorted
    score   [N] float64, what the decision rests on
    reason  N short texts, why each row stayed or went
    flops   what the decision took
    """

    keep: np.ndarray
    score: np.ndarray
    reason: list[str]
    flops: float = 0.0


class Curator(Method):
    """Chooses rows before training."""

    def select(self, rows: Sequence[Row], streams: Streams) -> Selection:
        """Decide about every row. Raises RecipeError where nothing would be left."""
        raise NotImplementedError

    def choose(self, rows: Sequence[dict[str, Any]], seed: int = 0) -> list[int]:
        """Positions of the rows to keep among plain dictionaries; for use without a recipe."""
        named = [Row(str(i), values) for i, values in enumerate(rows)]
        return [int(i) for i in self.select(named, Streams(seed)).keep]


def text_of(row: Row) -> str:
    """A row's words: its text, or prompt and answer, or all turns, joined by a space."""
    values = row.values
    if "messages" in values:
        return " ".join(turn["content"] for turn in values["messages"])
    if "text" in values:
        return str(values["text"])
    return f"{values['prompt']} {values.get('completion', '')}"
