"""The window of an optimiser step: its micro-batches, its clock and its denominators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.data.batch import IGNORE, WEIGHT, Batch
from luthier.step.lab import Lab


class Clock(NamedTuple):
    """The progress of training: completed steps, all steps, epoch as a fraction."""

    step: int
    total: int
    epoch: float = 0.0


class Term(NamedTuple):
    """A summed loss: sums [any shape, differentiable], the name of its denominator, its weight."""

    sums: Tensor
    over: str
    weight: float = 1.0


@dataclass(frozen=True)
class Window:
    """All micro-batches of one optimiser step on this rank.

    gather  [S_local] -> [S_global] over ranks, in rank order; the identity in one process
    total   the sum of a tensor over ranks; the identity in one process
    """

    micro: list[Batch]
    clock: Clock
    lab: Lab = field(default_factory=Lab)
    _: KW_ONLY
    gather: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    total: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    rank: int = 0

    def with_micro(self, micro: list[Batch]) -> Window:
        """The same window over other micro-batches."""
        return replace(self, micro=micro)


def mean_of(term: Term, denominators: Mapping[str, float]) -> Tensor:
    """The term's sum over its denominator of the whole step. If the denominator is zero, there was nothing to sum."""
    return term.sums.sum() / (denominators[term.over] or 1.0)


def count(micro: list[Batch]) -> dict[str, float]:
    """The two denominators that every objective can use: supervised tokens, and sequences with any supervision. If rows have
    weights ("weight"), these are sums of weights."""
    return {"tokens": sum(map(_tokens, micro)), "sequences": sum(map(_supervised_sequences, micro))}


def _tokens(batch: Batch) -> float:
    if WEIGHT not in batch.row:
        return float((batch.labels != IGNORE).sum())
    return float(batch.row[WEIGHT][batch.seq[batch.supervised]].double().sum())


def _supervised_sequences(batch: Batch) -> float:
    whole = "label" in batch.row or "soft" in batch.row
    which = torch.arange(batch.num_sequences) if whole else batch.seq[batch.supervised].unique()
    return float(batch.row[WEIGHT][which].double().sum()) if WEIGHT in batch.row else float(which.numel())
