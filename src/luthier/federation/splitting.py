"""Divide rows among made-up clients, whose rows differ as much as a Dirichlet distribution says.

For each kind of row, the clients' shares are drawn from Dir(alpha, ..., alpha): with a small alpha nearly all rows of a kind go
to one client, with a large one all clients are alike. Without kinds, only the sizes differ.
Source: Measuring the Effects of Non-Identical Data Distribution (arXiv:1909.06335); by kind as in arXiv:2102.02079, section IV.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.forms import SHAPES
from luthier.data.reading import read
from luthier.support.errors import LuthierError
from luthier.support.files import whole
from luthier.support.rng import Streams

LEAST = 10  # rows of a client: a fifth of fewer cannot be held out and scored
TRIES = 100


def dirichlet_split(
    kinds: Sequence[str], clients: int, alpha: float, generator: np.random.Generator
) -> list[list[int]]:
    """The numbers of each client's rows, in order. Every row is given to one client; a client may get none.

    kinds  of each row
    """
    of = np.asarray(kinds)
    out: list[list[int]] = [[] for _ in range(clients)]
    for kind in dict.fromkeys(kinds):
        rows = generator.permutation(np.flatnonzero(of == kind))
        ends = np.round(np.cumsum(generator.dirichlet([alpha] * clients)) * len(rows)).astype(int)
        for mine, part in zip(out, np.split(rows, ends[:-1]), strict=True):
            mine.extend(part.tolist())
    return [sorted(mine) for mine in out]


def enough_for_all(kinds: Sequence[str], clients: int, alpha: float, streams: Streams) -> list[list[int]]:
    """The first of several splits that gives every client LEAST rows. Raises LuthierError if none does."""
    for attempt in range(TRIES):
        found = dirichlet_split(kinds, clients, alpha, streams.at("split", attempt))
        if min(map(len, found)) >= LEAST:
            return found
    raise LuthierError(
        f"--alpha {alpha:g}: none of {TRIES} splits of {len(kinds)} rows gives each of {clients} clients {LEAST} rows; "
        "raise it, or take fewer clients or more rows"
    )


def split_rows(source: str, folder: Path, clients: int, alpha: float, by: str | None, seed: int) -> dict[str, Any]:
    """Write client-1.jsonl and so on. Returns the files, and how many rows of each kind a client has.

    by  a field of the rows; None: all rows are of one kind
    Raises LuthierError for a folder that exists, a field that a row lacks, or rows that cannot be divided so.
    """
    if alpha <= 0 or not np.isfinite(alpha):
        raise LuthierError(f"--alpha {alpha:g}: is not above 0; 0.1 makes clients very unlike, 100 nearly alike")
    if folder.exists():
        raise LuthierError(f"{folder}: exists already; name a new folder")
    rows, _ = read(source, {}, Path(), shapes=tuple(SHAPES))
    if lacking := next((row.key for row in rows if by is not None and by not in row.values), None):
        raise LuthierError(f"--by {by}: {lacking} has no such field; name a field of all rows, or leave it out")
    kinds = ["rows" if by is None else str(row.values[by]) for row in rows]
    found = enough_for_all(kinds, clients, alpha, Streams(seed))
    names = [f"client-{i}" for i in range(1, clients + 1)]
    with whole(folder) as temporary:
        for name, mine in zip(names, found, strict=True):
            lines = (json.dumps(rows[i].values, ensure_ascii=False) for i in mine)
            (temporary / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    counts = {
        name: dict(sorted(Counter(kinds[i] for i in mine).items())) for name, mine in zip(names, found, strict=True)
    }
    return {"files": {name: str(folder / f"{name}.jsonl") for name in names}, "clients": counts}
