"""The base class of curators. They choose, rewrite and weigh rows; every row and the reason stay in the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from luthier.data.codec import Chain, Codec
from luthier.data.reading import answers_of, words_of
from luthier.data.store import Row
from luthier.data.table import Table
from luthier.inference.services import lab_around
from luthier.method import Method
from luthier.step.lab import Lab
from luthier.support.cache import key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.sources import code_key

__all__ = ["Chooser", "Codec", "Curator", "Selection", "Table", "answers_of", "chain_of", "kept_count", "text_of"]


class Curator(Method):
    """Changes the set of rows before training: keeps, drops, weighs, rewrites, splits, adds."""

    idempotent: ClassVar[bool] = False  # True: curating its own result changes nothing more

    def curate(self, table: Table, lab: Lab) -> Table:
        """The table after this step. Raises RecipeError if the step cannot work on these rows.

        The result must come from the table's own operations, so that every row is accounted for. The cost of using a model
        is charged to the lab's ledger, under "curate". Draws are keyed by seed and row.
        """
        raise NotImplementedError  # the seam: every curator has its own

    @property
    def codec(self) -> Codec | None:
        """How answers are changed back, if this step gives rows another form that can be undone; else None.

        With None, held-out rows and questions stay as they are: the model is asked and judged in the form of the files.
        """
        return None

    def curated(
        self, rows: Sequence[dict[str, Any]], seed: int = 0, model: PreTrainedModel | None = None, tokenizer: Any = None
    ) -> Table:
        """The table of plain dictionaries after this step, for use without a recipe.

        model, tokenizer  for curators that use a model
        """
        if model is None and "base_view" in self.traits.needs:
            raise LuthierError(f"{self.key()}: asks a model and was given none; pass model and tokenizer")
        lab = Lab(seed=seed) if model is None else lab_around(model, tokenizer, seed)
        table = Table.of([Row(str(i), values) for i, values in enumerate(rows)])
        return self.curate(table.at(self.key()), lab)

    def choose(
        self, rows: Sequence[dict[str, Any]], seed: int = 0, model: PreTrainedModel | None = None, tokenizer: Any = None
    ) -> list[int]:
        """Positions in `rows` of those that this step keeps, unchanged or rewritten. For use without a recipe."""
        table = self.curated(rows, seed, model, tokenizer)
        found = np.unique(table.roots(table.live))
        return [int(i) for i in found if i >= 0]


class Selection(NamedTuple):
    """What a chooser decided about every row it saw.

    keep    [M] int64, positions of the rows that stay, sorted
    score   [N] float64, the number that decides
    reason  N short texts, why each row stayed or was dropped
    plane   [N, 2] coordinates of each row in a picture; None if one number decides
    axes    names of the plane's directions
    """

    keep: np.ndarray
    score: np.ndarray
    reason: list[str]
    plane: np.ndarray | None = None
    axes: tuple[str, str] = ("", "")


class Chooser(Curator):
    """A curator that only says which rows stay."""

    def select(self, rows: Sequence[Row], lab: Lab) -> Selection:
        """Decide about every row. Raises RecipeError if no row would be left."""
        raise NotImplementedError  # the seam: every chooser has its own

    def curate(self, table: Table, lab: Lab) -> Table:
        chosen = self.select(table.rows, lab)
        if chosen.plane is not None:
            table = table.shown(chosen.plane, chosen.axes)
        return table.keep(chosen.keep, chosen.score, chosen.reason)


def kept_count(method: str, keep_fraction: float, rows: int) -> int:
    """The number of rows that a chooser keeps, rounded down. Raises RecipeError, with the method's key, if it keeps none."""
    count = int(keep_fraction * rows)
    if not count:
        raise RecipeError(f"{method}.keep_fraction", f"{keep_fraction} of {rows} rows keeps none", "raise it")
    return count


def chain_of(curators: Iterable[Curator]) -> Chain:
    """The codecs of a recipe's curators, in order."""
    found = [(c, codec) for c in curators if (codec := c.codec) is not None]
    named = [(c.key(), c.model_dump_json(), code_key(type(c).__module__)) for c, _ in found]
    return Chain([codec for _, codec in found], key_of(named) if named else "")


def text_of(row: Row) -> str:
    """A row's words, as `words_of` joins them."""
    return words_of(row.values)
