"""Real rows of several sources, cut into stretches that no two uses share."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

DATA = Path(os.environ.get("LUTHIER_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
STRETCHES = {"school": (0.0, 0.4), "public": (0.4, 0.7), "private": (0.7, 0.9), "held": (0.9, 1.0)}
T = TypeVar("T", str, list)


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """Training rows of a set in shared/data."""
    with gzip.open(DATA / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stretch(which: str, whole: T) -> T:
    """What models learn from, public, private and held-out: by place in the source."""
    low, high = STRETCHES[which]
    return whole[int(low * len(whole)) : int(high * len(whole))]
