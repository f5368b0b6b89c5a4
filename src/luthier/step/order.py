"""Which rows each step uses, and how a step is cut into micro-batches. Pure functions of seed and step, so resuming is easy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from luthier.data.mixture import Mixture
from luthier.support.rng import Streams


class Order:
    """Rows of every optimiser step.

    mixture  the rows of each epoch; None: each row once
    """

    def __init__(
        self, num_rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int, shuffle: bool,
        mixture: Mixture | None = None,
    ) -> None:  # fmt: skip
        self.num_rows, self.batch_size = num_rows, min(batch_size, num_rows)
        self.steps_per_epoch = math.ceil(num_rows / self.batch_size)
        self.total = max_steps or max(1, round(epochs * self.steps_per_epoch))
        self._streams, self._shuffle, self._mixture = Streams(seed), shuffle, mixture
        self._cached: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def rows(self, step: int) -> list[int]:
        """Row indices of one step; the last step of an epoch may be smaller."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        part = self._cached[1][within * self.batch_size : (within + 1) * self.batch_size]
        return [int(i) for i in part]

    def _epoch(self, number: int) -> np.ndarray:
        """[N] row indices of a whole epoch."""
        n = self.num_rows
        held = np.arange(n) if self._mixture is None else self._mixture.epoch(number, self._streams)
        return held[self._streams.at("order", number).permutation(n)] if self._shuffle else held


def micro_batches(lengths: Sequence[int], limit: int, world: int = 1) -> list[list[list[int]]]:
    """Cut a step's rows into micro-batches of at most `limit` tokens, shared among ranks: [rank][micro-batch] -> positions.

    The longest row comes first, each goes into the first micro-batch with room. A rank may get fewer than another, or none.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slot = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if slot is None:
            bins.append([])
            room.append(max(limit, lengths[i]))
            slot = len(bins) - 1
        bins[slot].append(i)
        room[slot] -= lengths[i]
    while len(bins) < world and any(len(b) > 1 for b in bins):  # some ranks have no work: halve the fullest
        fullest = max(range(len(bins)), key=lambda b: sum(lengths[i] for i in bins[b]) if len(bins[b]) > 1 else -1)
        bins.append(bins[fullest][1::2])
        bins[fullest] = bins[fullest][::2]
    return [[sorted(b) for b in bins[r::world]] for r in range(world)]
