"""A random subset: the baseline for every other choice of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from luthier.curation.base import Chooser, Selection, kept_count
from luthier.data.store import Row
from luthier.method import Source
from luthier.step.lab import Lab


class Random(Chooser):
    """Keep a share of the rows, drawn uniformly without replacement.

    Each row draws a number that depends only on the seed and the row's key. The rows with the smallest numbers stay.
    Cost: none.
    """

    source: ClassVar[Source] = Source(
        "Theory of the sampling of finite populations", 1934, "https://doi.org/10.2307/2342192"
    )

    keep_fraction: float = Field(gt=0, le=1, examples=[0.5])
    """Share of the rows that is kept."""

    def select(self, rows: Sequence[Row], lab: Lab) -> Selection:
        count = kept_count(self.key(), self.keep_fraction, len(rows))
        draws = np.array([lab.streams.at("random", r.key).random() for r in rows])
        keep = np.sort(np.argsort(draws, kind="stable")[:count])
        inside = set(keep.tolist())
        return Selection(keep, draws, ["drawn" if i in inside else "not drawn" for i in range(len(rows))])
