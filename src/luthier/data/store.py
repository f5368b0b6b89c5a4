"""Rows on disk: Arrow files, memory-mapped, so that memory does not grow with the number of rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.support.cache import cache_folder, made

BATCH = 1024  # rows an Arrow record batch
T = TypeVar("T")

ROW_SCHEMA = pa.schema({"number": pa.int64(), "values": pa.large_binary()})
TOKEN_SCHEMA = pa.schema(
    {"key": pa.string(), "ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "front": pa.int32(), "row": pa.string()}
)  # fmt: skip


class Row(NamedTuple):
    """A row and where it stands, for every message about it."""

    key: str
    values: dict[str, Any]


class Made(NamedTuple):
    """A stored table and the notes that were taken while it was made."""

    table: pa.Table
    notes: dict[str, Any]
    file: Path | None = None


def stored(
    key: str | None, schema: pa.Schema, batches: Iterator[pa.RecordBatch], notes: Callable[[], Mapping[str, Any]]
) -> Made:
    """The table under this key, made from `batches` where the cache has none.

    key    None: nothing is written, the table stays in memory
    notes  asked for after the last batch; JSON values
    """
    if key is None:
        table = pa.Table.from_batches(list(batches), schema)
        return Made(table, dict(notes()))
    folder = cache_folder() / "rows" / key
    found = _opened(folder)
    if found is not None:
        return found
    with made(folder) as temporary:
        with pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        (temporary / "notes.json").write_text(json.dumps(dict(notes())), encoding="utf-8")
    again = _opened(folder)
    assert again is not None, folder
    return again


def _opened(folder: Path) -> Made | None:
    """What the cache has; None where that is nothing, or damaged."""
    try:
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    except FileNotFoundError:
        return None
    except (ValueError, OSError):  # cut off by a crash of the machine: make it again
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Made(table, notes, folder / "rows.arrow")


class Rows(Sequence[Row]):
    """Rows as they came, each stored as one JSON object."""

    def __init__(
        self, table: pa.Table, prefix: str, digest: str, index: np.ndarray | None = None, file: Path | None = None
    ) -> None:
        self._table, self._prefix, self._digest, self._index, self._file = table, prefix, digest, index, file

    def __len__(self) -> int:
        return self._table.num_rows if self._index is None else len(self._index)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        at = int(range(len(self))[i] if self._index is None else self._index[i])
        values = self._table.column("values")[at].as_py()
        return Row(f"{self._prefix}:{self._table.column('number')[at].as_py()}", json.loads(values))

    def __iter__(self) -> Iterator[Row]:
        """In order. All rows are read batch by batch and let go: pages of a map would stay in the process's memory."""
        if self._index is not None or self._file is None:
            yield from (self[i] for i in range(len(self)))
            return
        with pa.OSFile(str(self._file)) as source, pa.ipc.open_file(source) as reader:
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i)
                for number, values in zip(batch["number"].to_pylist(), batch["values"].to_pylist(), strict=True):
                    yield Row(f"{self._prefix}:{number}", json.loads(values))

    def take(self, positions: np.ndarray) -> Rows:
        """Some of these rows, in this order; nothing is copied."""
        index = np.asarray(positions, dtype=np.int64)
        return Rows(
            self._table, self._prefix, self._digest, index if self._index is None else self._index[index], self._file
        )

    @property
    def digest(self) -> str:
        """Equal for equal rows in equal order."""
        if self._index is None:
            return self._digest
        return hashlib.sha256(self._digest.encode() + self._index.tobytes()).hexdigest()


class TokenRows(Sequence[dict[str, Any]]):
    """Training rows as `collate` takes them."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._columns = {name: table.column(name) for name in table.column_names}

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        at = range(len(self))[i]
        c = self._columns
        ids, front = c["ids"][at].values.to_pylist(), c["front"][at].as_py()
        out = {"ids": ids, "labels": c["labels"][at].values.to_pylist(), "key": c["key"][at].as_py()}
        row = json.loads(c["row"][at].as_py())
        if row:
            return {**out, "row": row}
        return {**out, "token": {"prompt": [1] * front + [0] * (len(ids) - front)}}

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64 tokens of each row."""
        return pc.list_value_length(self._columns["ids"]).to_numpy().astype(np.int64)


def row_batches(rows: Iterator[tuple[int, bytes]]) -> Iterator[pa.RecordBatch]:
    """(number, JSON) pairs to record batches."""
    for part in chunks(rows):
        numbers, values = zip(*part, strict=True)
        yield pa.record_batch([pa.array(numbers, pa.int64()), pa.array(values, pa.large_binary())], schema=ROW_SCHEMA)


def token_batch(items: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rendered rows to a record batch."""
    columns = {
        "key": [x["key"] for x in items],
        "ids": [x["ids"] for x in items],
        "labels": [x["labels"] for x in items],
        "front": [sum(x["token"]["prompt"]) if "token" in x else 0 for x in items],
        "row": [json.dumps(x.get("row", {})) for x in items],
    }
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in TOKEN_SCHEMA], schema=TOKEN_SCHEMA)


def chunks(items: Iterator[T], size: int = BATCH) -> Iterator[list[T]]:
    """Lists of up to `size`."""
    part: list[T] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
