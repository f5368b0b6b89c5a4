"""Linear merging: a weighted sum of updates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import ClassVar

from pydantic import Field

from luthier.merging.base import Merger
from luthier.method import Source, Traits
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.update import Update


class Linear(Merger):
    """Add the updates, each with its weight; by default the result is their mean.

    Exact in weight space for every form that can be added: low-rank updates are stacked, not averaged factor by factor.
    Cost: one pass over the updates' tensors.
    """

    traits: ClassVar[Traits] = Traits(linear=True)
    source: ClassVar[Source] = Source(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
        2022,
        "arXiv:2203.05482",
    )

    weights: tuple[float, ...] | None = Field(None, min_length=1)
    """One weight for each member, in their order; null: 1 / N each."""

    def check_count(self, count: int) -> None:
        if not count:
            raise LuthierError("merge.linear: there is no update to merge; name at least one")
        if self.weights is not None and len(self.weights) != count:
            raise LuthierError(
                f"merge.linear.weights: {len(self.weights)} weights for {count} updates; give one for each"
            )

    def merge(self, members: Sequence[Update], lab: Lab | None = None) -> Update:
        self.check_count(len(members))
        weights = self.weights or (1 / len(members),) * len(members)
        try:
            return reduce(add, (w * m for w, m in zip(weights, members, strict=True)))
        except TypeError as error:
            raise LuthierError(f"merge.linear: {error}") from error
