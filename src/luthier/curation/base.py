"""The curation seam: which rows, in which words. Each step adds columns that say why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Method
from luthier.model.view import ModelView, probe_layout
from luthier.support.rng import Streams


class Selection(NamedTuple):
    """What a curator decided about every row it saw.

    keep    [M] int64, positions of the rows that stay, sorted
    score   [N] float64, what the decision rests on
    reason  N short texts, why each row stayed or went
    flops   what the decision took
    plane   [N, 2] where each row lies, for a picture; None where the decision rests on one number
    axes    what the plane's directions are called
    """

    keep: np.ndarray
    score: np.ndarray
    reason: list[str]
    flops: float = 0.0
    plane: np.ndarray | None = None
    axes: tuple[str, str] = ("", "")


class Base(NamedTuple):
    """The untouched model, for curators that ask it.

    view  loads it when first asked
    """

    view: Callable[[], ModelView]
    renderer: Renderer
    tokens_per_forward: int = 2048
    tick: Tick = no_tick


class Curator(Method):
    """Chooses rows before training."""

    def select(self, rows: Sequence[Row], streams: Streams, base: Base | None = None) -> Selection:
        """Decide about every row. Raises RecipeError where nothing would be left.

        base  given to those whose traits need "base_view"
        """
        raise NotImplementedError

    def choose(
        self, rows: Sequence[dict[str, Any]], seed: int = 0, model: PreTrainedModel | None = None, tokenizer: Any = None
    ) -> list[int]:
        """Positions of the rows to keep among plain dictionaries; for use without a recipe.

        model, tokenizer  for curators that ask a model
        """
        named = [Row(str(i), values) for i, values in enumerate(rows)]
        base = None
        if model is not None:
            view = ModelView(model, tokenizer)
            view.layout, _ = probe_layout(view)
            base = Base(lambda: view, Renderer(tokenizer))
        return [int(i) for i in self.select(named, Streams(seed), base).keep]


def text_of(row: Row) -> str:
    """A row's words: its text, or prompt and answer, or all turns, joined by a space."""
    values = row.values
    if "messages" in values:
        return " ".join(turn["content"] for turn in values["messages"])
    if "text" in values:
        return str(values["text"])
    return f"{values['prompt']} {values.get('completion', '')}"
