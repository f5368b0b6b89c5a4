"""Held-out rows: a share of the training rows that is set apart, and training rows that are held out as well.

Rows count as equal if their words are equal, apart from case and white space.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from luthier.data import store
from luthier.data.forms import at_path
from luthier.data.reading import words_of
from luthier.data.store import Row, Rows
from luthier.support.cache import key_of
from luthier.support.errors import RecipeError
from luthier.support.sources import code_key

PLACES = pa.schema({"row": pa.int64(), "other": pa.int64(), "same": pa.bool_()})


def likeness(row: Row) -> int:
    """A number that is equal for rows with equal words, apart from case and white space."""
    return _number(_plain(words_of(row.values)))


def _plain(words: str) -> str:
    return " ".join(words.casefold().split())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# --- a share of the training rows ---


def set_apart(rows: Rows, share: float, by: str | None = None) -> tuple[Rows, Rows]:
    """(rows to train on, held-out rows), both in the order of `rows`.

    The choice depends only on what the rows hold: not on their order, nor on a seed. Equal rows are on the same side.

    share  of the rows to hold out
    by     a field, or a path in it; rows with equal values of it are on the same side
    Raises RecipeError if a row has no such field, or if all rows would have to be on one side.
    """
    key = key_of("set apart", rows.digest, share, by, code_key(__name__)) if rows.on_disk else None
    made = store.stored(key, lambda: PLACES, _places((p, -1, False) for p in _chosen(rows, share, by)), lambda: {})
    held = made.table.column("row").to_numpy()
    return rows.take(np.setdiff1d(np.arange(len(rows)), held)), rows.take(held)


def _chosen(rows: Rows, share: float, by: str | None) -> Iterator[int]:
    """Positions of the held-out rows: whole groups in the order of their hashes, as many as come nearest to the share."""
    groups = np.frombuffer(array("Q", (likeness(r) if by is None else _group(r, by) for r in rows)), dtype=np.uint64)
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) < 2:
        what = "equal" if by is None else f"of one group ({by})"
        raise RecipeError(
            "data.eval", f"{share:g} of rows that are all {what} cannot be held out", "name a file of rows"
        )
    ends = np.cumsum(sizes)[:-1]
    count = int(np.abs(ends - share * len(rows)).argmin()) + 1
    last = np.unique(groups)[count - 1]
    yield from np.flatnonzero(groups <= last).tolist()


def _group(row: Row, by: str) -> int:
    try:
        return _number(json.dumps(at_path(row.values, by), sort_keys=True, ensure_ascii=False))
    except KeyError:
        listed = ", ".join(sorted(row.values))
        raise RecipeError(row.key, f"has no field {by!r}, which data.eval_by names; it has {listed}") from None


def _places(found: Iterable[tuple[int, int, bool]]) -> Iterator[pa.RecordBatch]:
    for part in store.chunks(iter(found)):
        columns = zip(*part, strict=True)
        yield pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, PLACES, strict=True)], schema=PLACES)


# --- training rows that are held out as well ---


class Shared(NamedTuple):
    """Held-out rows that are training rows too.

    rows   number of them
    of     number of held-out rows
    alike  number of those that differ from every training row in case or white space
    first  keys of the first of them and of a training row that is equal
    """

    rows: int
    of: int
    alike: int
    first: tuple[str, str]

    def __str__(self) -> str:
        them = "is a training row" if self.rows == 1 else "are training rows"
        which = "" if self.alike < self.rows else ", apart from case and white space"
        if 0 < self.alike < self.rows:
            which = f" ({self.alike:,} of them apart from case and white space)"
        first = f"the first one: {self.first[0]} is {self.first[1]}"
        return f"{self.rows:,} of {self.of:,} held-out rows {them} too{which}; {first}"


def shared(train: Rows, held: Rows) -> Shared | None:
    """The held-out rows whose words are those of a training row; None if there are none."""
    on_disk = train.on_disk and held.on_disk
    key = key_of("shared", train.digest, held.digest, code_key(__name__)) if on_disk else None
    pairs = store.stored(key, lambda: PLACES, _places(_pairs(train, held)), lambda: {}).table
    if not pairs.num_rows:
        return None
    row, other = (pairs.column(n)[0].as_py() for n in ("row", "other"))
    alike = pairs.num_rows - int(np.count_nonzero(pairs.column("same").to_numpy()))
    return Shared(pairs.num_rows, len(held), alike, (held.key(row), train.key(other)))


def _pairs(train: Rows, held: Rows) -> Iterator[tuple[int, int, bool]]:
    """(position of a held-out row, of the first training row that is equal, whether one is equal to the letter)."""
    kinds = [likeness(r) for r in held]
    asked, found, letters = set(kinds), dict[int, int](), set[int]()
    for position, row in enumerate(train):
        if (kind := likeness(row)) in asked:
            found.setdefault(kind, position)
            letters.add(_number(words_of(row.values)))
    for position, kind in enumerate(kinds):
        if kind in found:
            yield position, found[kind], _number(words_of(held[position].values)) in letters
