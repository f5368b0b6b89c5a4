"""Rows of several sources: the rows of each epoch. Pure functions of sizes, weights, seed and epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from luthier.support.errors import RecipeError
from luthier.support.rng import Streams


class Origin(NamedTuple):
    """A source of rows: its name, the prefixes of its rows' keys (one for each of its files), its weight."""

    name: str
    prefixes: tuple[str, ...]
    weight: float = 1.0


class Mix(NamedTuple):
    """How sources are mixed: the share of a source is proportional to (weight * rows)^(1 / temperature)."""

    origins: tuple[Origin, ...]
    temperature: float = 1.0

    def sources_of(self, keys: Iterable[str]) -> np.ndarray:
        """[N] the number of the source of each row; the number of sources for rows of none."""
        known = {prefix: i for i, o in enumerate(self.origins) for prefix in o.prefixes}
        return np.array([known.get(key.rpartition(":")[0], len(self.origins)) for key in keys], dtype=np.int64)


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> np.ndarray:
    """The share of the draws of each source, proportional to (weight * size)^(1 / temperature). A temperature above 1 evens
    shares out, one below 1 does the opposite.
    """
    raw = np.array(weights, dtype=np.float64) * np.array(sizes)
    raw = (raw / raw.max()) ** (1 / temperature)  # powers of numbers up to 1 cannot overflow
    out: np.ndarray = raw / raw.sum()
    return out


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, in proportion to sizes, by largest remainder."""
    exact = total * sizes / sizes.sum()
    out: np.ndarray = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - out), kind="stable")[: total - out.sum()]
    out[rest] += 1
    return out


def drawn(size: int, count: int, epoch: int, streams: Streams, name: str) -> np.ndarray:
    """[count] rows of a source in one epoch, ascending.

    Each epoch continues where the one before stopped, in a sequence of shuffled passes over the source. So a source with
    less than one pass in an epoch shows all its rows before any row comes again.
    """
    start, stop, taken = epoch * count, (epoch + 1) * count, []
    for number in range(start // size, -(-stop // size)):
        low, high = max(start - number * size, 0), min(stop - number * size, size)
        whole = high - low == size
        order = np.arange(size) if whole else streams.at("source", name, number).permutation(size)
        taken.append(order[low:high])
    return np.sort(np.concatenate(taken))


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources in one table.

    names    of the sources
    members  for each source the positions of its rows, ascending
    draws    for each source the number of its rows in an epoch
    """

    names: tuple[str, ...]
    members: tuple[np.ndarray, ...]
    draws: tuple[int, ...]

    @classmethod
    def of(cls, keys: Sequence[str], mix: Mix) -> Mixture:
        """The mixture of rows with these keys. Rows of no source (made by a curator) are one more source, of weight 1.

        Raises RecipeError for a source from which no row would be drawn.
        """
        origin = mix.sources_of(keys)
        origins = [*mix.origins, Origin("made while curating", ())]
        members = [np.flatnonzero(origin == i) for i in range(len(origins))]
        there = [i for i, m in enumerate(members) if len(m)]
        sizes = [len(members[i]) for i in there]
        share = shares(sizes, [origins[i].weight for i in there], mix.temperature)
        draws = quotas(share, len(keys))
        for i, n in zip(there, draws.tolist(), strict=True):
            if not n:
                what = f"{origins[i].name} would not be drawn from: its share of {len(keys)} rows is below one"
                raise RecipeError("data.train", what, "raise its weight or data.temperature, or leave it out")
        names = tuple(origins[i].name for i in there)
        return cls(names, tuple(members[i] for i in there), tuple(draws.tolist()))

    def epoch(self, number: int, streams: Streams) -> np.ndarray:
        """[N] places of the rows of an epoch, ascending; with equal weights and temperature 1 each row once."""
        parts = [
            m[drawn(len(m), count, number, streams, name)]
            for name, m, count in zip(self.names, self.members, self.draws, strict=True)
        ]
        return np.sort(np.concatenate(parts))

    def table(self) -> list[dict[str, Any]]:
        """Name, rows and share of an epoch's draws of each source."""
        total = sum(self.draws)
        return [
            {"name": name, "rows": len(m), "share": n / total}
            for name, m, n in zip(self.names, self.members, self.draws, strict=True)
        ]

    def tokens(self, lengths: np.ndarray) -> float:
        """Tokens of an epoch, on average."""
        return float(sum(n * lengths[m].mean() for m, n in zip(self.members, self.draws, strict=True)))
