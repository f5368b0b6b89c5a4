"""What methods may ask for while they work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.batch import Batch, collate
from luthier.support.rng import Streams

Rows = Sequence[Mapping[str, Any]]


class Lab:
    """What methods may ask of the house: rows by name, and randomness."""

    def __init__(self, rows: Mapping[str, Rows], seed: int = 0) -> None:
        self.sets, self.streams = dict(rows), Streams(seed)

    def rows(self, name: str) -> Rows:
        return self.sets[name]

    def batch(self, name: str, limit: int) -> Batch:
        """The first rows of a set as one batch."""
        return collate(list(self.sets[name])[:limit])
