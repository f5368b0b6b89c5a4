"""Rows on disk: Arrow files, memory-mapped, so that memory does not grow with the number of rows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.data.batch import TYPE_IDS
from luthier.data.columns import Column, arrow_type, cells, columns_in
from luthier.data.mixture import Mixture
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.errors import LuthierError, RecipeError

BATCH = 1024  # rows in an Arrow record batch
T = TypeVar("T")

ROW_JSON = json.JSONEncoder(ensure_ascii=False, default=str)  # made once: json.dumps would make one for every row
ROW_SCHEMA = pa.schema({"number": pa.int64(), "values": pa.large_binary()})
KEYED_SCHEMA = pa.schema({"key": pa.string(), "values": pa.large_binary()})
TOKEN_SCHEMA = pa.schema(
    {
        "key": pa.string(), "ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "front": pa.int32(), "row": pa.string(),
        TYPE_IDS: pa.list_(pa.int32()), "targets": pa.list_(pa.int32()),  # null in rows without
    }
)  # fmt: skip


class Row(NamedTuple):
    """A row and its key, which is in every message about it."""

    key: str
    values: dict[str, Any]


class Made(NamedTuple):
    """A stored table and the notes made with it."""

    table: pa.Table
    notes: dict[str, Any]
    file: Path | None = None


def stored(
    key: str | None, schema: Callable[[], pa.Schema], batches: Iterator[pa.RecordBatch], notes: Callable[[], Mapping[str, Any]]
) -> Made:  # fmt: skip
    """The table under this key, made from `batches` where the cache has none.

    key     None: nothing is written, the table stays in memory
    schema  asked for before the first batch; notes: after the last one, JSON values
    """
    if key is None:
        table = pa.Table.from_batches(list(batches), schema())
        return Made(table, dict(notes()))
    folder = cache_folder() / "rows" / key
    found = _opened(folder)
    if found is not None:
        return found
    with made(folder) as temporary:
        _write(temporary, schema(), batches, notes)
    again = _opened(folder)
    assert again is not None, folder
    return again


def _write(
    folder: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], notes: Callable[[], Mapping[str, Any]]
) -> None:
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    (folder / "notes.json").write_text(json.dumps(dict(notes())), encoding="utf-8")


def _opened(folder: Path) -> Made | None:
    """The table in the cache; None if there is none, or if it is damaged."""
    try:
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    except FileNotFoundError:
        return None
    except (ValueError, OSError):  # cut off by a crash of the machine: make it again
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Made(table, notes, folder / "rows.arrow")


class Part(NamedTuple):
    """Rows that were written together.

    table   of ROW_SCHEMA under a prefix, or of KEYED_SCHEMA, whose rows bring their keys
    prefix  the start of a row's key, before its number; None if rows have their own keys
    digest  equal for equal rows
    form    what the rows were read as, for a reader
    """

    table: pa.Table
    prefix: str | None
    digest: str
    file: Path | None = None
    form: str = ""

    def key(self, at: int) -> str:
        """The key of one row."""
        if self.prefix is None:
            return str(self.table.column("key")[at].as_py())
        return f"{self.prefix}:{self.table.column('number')[at].as_py()}"

    def row(self, at: int) -> Row:
        """One row."""
        return Row(self.key(at), json.loads(self.table.column("values")[at].as_py()))

    def rows(self) -> Iterator[Row]:
        """All rows in order, batch by batch. Each batch is released, or pages of a map would stay in the process's memory."""
        for batch in self._batches():
            keys = batch["key" if self.prefix is None else "number"].to_pylist()
            for key, values in zip(keys, batch["values"].to_pylist(), strict=True):
                yield Row(key if self.prefix is None else f"{self.prefix}:{key}", json.loads(values))

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if self.file is None:
            yield from self.table.to_batches()
            return
        with pa.OSFile(str(self.file)) as source, pa.ipc.open_file(source) as reader:
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


class Rows(Sequence[Row]):
    """Original rows, each stored as one JSON object.

    index    [N] positions in the parts, one part after another; None: all of them in order
    weights  [N] weight of each row in training; None: all equal
    """

    def __init__(
        self, parts: Sequence[Part], index: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> None:
        self.parts, self.weights, self._index = tuple(parts), weights, index
        self._starts = np.cumsum([0, *(p.table.num_rows for p in self.parts)])

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """Rows in memory."""
        return written((r.key, as_json(r)) for r in rows)

    @classmethod
    def joined(cls, several: Sequence[Rows]) -> Rows:
        """The rows of all, one after another; nothing is copied."""
        if len(several) == 1:
            return several[0]
        parts = [part for rows in several for part in rows.parts]
        weights = None
        if any(rows.weights is not None for rows in several):
            weights = np.concatenate([np.ones(len(r)) if r.weights is None else r.weights for r in several])
        if all(rows._index is None for rows in several):
            return cls(parts, None, weights)
        ends = np.cumsum([0, *(rows._starts[-1] for rows in several)])
        places = [rows.places + start for rows, start in zip(several, ends[:-1], strict=True)]
        return cls(parts, np.concatenate(places), weights)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._index is None else len(self._index)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Row | Rows:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        part, at = self._at(i)
        return part.row(at)

    def key(self, i: int) -> str:
        """The key of a row, without reading its values."""
        part, at = self._at(i)
        return part.key(at)

    def _at(self, i: int) -> tuple[Part, int]:
        at = int(range(len(self))[i] if self._index is None else self._index[i])
        number = 0 if len(self.parts) == 1 else int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.parts[number], at - int(self._starts[number])

    def __iter__(self) -> Iterator[Row]:
        if self._index is not None:
            yield from (self[i] for i in range(len(self)))
            return
        for part in self.parts:
            yield from part.rows()

    @property
    def places(self) -> np.ndarray:
        """[N] places in the parts one after another."""
        return np.arange(len(self)) if self._index is None else self._index

    def take(self, positions: np.ndarray) -> Rows:
        """Some of these rows, in this order; nothing is copied."""
        index = np.asarray(positions, dtype=np.int64)
        weights = None if self.weights is None else self.weights[index]
        return Rows(self.parts, index if self._index is None else self._index[index], weights)

    def weighing(self, weights: np.ndarray | None) -> Rows:
        """The same rows with these weights [N]."""
        return Rows(self.parts, self._index, weights)

    @property
    def forms(self) -> list[str]:
        """The forms in which the rows were found in their files, each once."""
        return list(dict.fromkeys(part.form for part in self.parts if part.form))

    @property
    def on_disk(self) -> bool:
        """False if some of the rows are held in memory."""
        return all(part.file is not None for part in self.parts)

    @property
    def digest(self) -> str:
        """Equal for equal rows in equal order with equal weights."""
        if len(self.parts) == 1 and self._index is None and self.weights is None:
            return self.parts[0].digest
        digest = hashlib.sha256("".join(p.digest for p in self.parts).encode())
        for array in (self._index, self.weights):
            digest.update(b"\0" if array is None else array.tobytes())
        return digest.hexdigest()


class TokenRows(Sequence[dict[str, Any]]):
    """Training rows as `collate` takes them.

    mixture  the rows of each epoch, if they come from several sources
    """

    def __init__(self, table: pa.Table, mixture: Mixture | None = None) -> None:
        self._table, self.mixture = table, mixture
        self._columns = {name: table.column(name) for name in table.column_names}
        self.columns = columns_in(table.schema)
        self._more = [(c, self._columns[c.field.name]) for c in self.columns]
        self._places: dict[str, int] | None = None

    def __len__(self) -> int:
        return int(self._table.num_rows)

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
            out["row"] = row
        else:
            out["token"] = {"prompt": [1] * front + [0] * (len(ids) - front)}
        if (types := c[TYPE_IDS][at].values) is not None:
            out.setdefault("token", {})[TYPE_IDS] = types.to_pylist()
        if (targets := c["targets"][at].values) is not None:
            out["targets"] = targets.to_pylist()
        for column, held in self._more:
            out.setdefault(column.level, {})[column.name] = column.value(held[at])
        return out

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64 tokens of each row."""
        found: np.ndarray = pc.list_value_length(self._columns["ids"]).to_numpy().astype(np.int64)
        return found

    @property
    def keys(self) -> list[str]:
        """The key of each row."""
        found: list[str] = self._columns["key"].to_pylist()
        return found

    def beyond(self, size: int) -> tuple[str, int] | None:
        """(key, id) of the first token whose id is not below `size`, with its row; None if there is none."""
        done = 0
        for chunk in self._columns["ids"].chunks:
            ids = chunk.flatten().to_numpy()
            if (found := np.flatnonzero(ids >= size)).size:
                ends = np.cumsum(chunk.value_lengths().to_numpy())
                at = done + int(np.searchsorted(ends, found[0], side="right"))
                return self._columns["key"][at].as_py(), int(ids[found[0]])
            done += len(chunk)
        return None

    def text(self, key: str, name: str) -> str:
        """A text column of the row with this key. Raises LuthierError if there is none."""
        if self._places is None:
            self._places = {k: i for i, k in enumerate(self.keys)}
        column = next((held for c, held in self._more if (c.level, c.name) == ("text", name)), None)
        if column is None or key not in self._places:
            raise LuthierError(f"{key}: there is no text column {name!r} of such a row; keep it with data.keep")
        found: str = column[self._places[key]].as_py()
        return found

    def names(self, name: str) -> tuple[str, ...]:
        """The texts of a span column's types, by number; empty if the user gave numbers."""
        return next((c.names for c in self.columns if (c.level, c.name) == ("span", name)), ())

    def with_columns(
        self, *, row: Mapping[str, np.ndarray] | None = None, token: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> TokenRows:
        """The same rows with more columns, held in memory; one of the same name is replaced.

        row    [N] or [N, W] numbers a row
        token  for each row an array as long as it is. Raises LuthierError with the row's key for another length
        """
        table = self._table
        for name, values in (row or {}).items():
            width = values.shape[1] if values.ndim == 2 else 0
            column = Column("row", name, "float32" if width else arrow_type(values), width)
            table = _put(table, column, list(values) if width else values)
        for name, arrays in (token or {}).items():
            for key, n, values in zip(self.keys, self.lengths.tolist(), arrays, strict=True):
                if values.shape != (n,):
                    raise LuthierError(f"{key}: column {name!r} has shape {list(values.shape)}, the row has {n} tokens")
            table = _put(table, Column("token", name, arrow_type(arrays[0])), arrays)
        return TokenRows(table, self.mixture)


def _put(table: pa.Table, column: Column, values: Sequence[Any] | np.ndarray) -> pa.Table:
    """The table with this column added, or put in the place of the one with this name."""
    field = column.field
    array = pa.array(values, field.type)
    at = table.schema.get_field_index(field.name)
    return table.append_column(field, array) if at < 0 else table.set_column(at, field, array)


def written(items: Iterator[tuple[str, bytes]], on_disk: bool = False) -> Rows:
    """Rows from (key, JSON) pairs: in memory, or batch by batch in the cache, under a key of their content."""
    digest = hashlib.sha256()

    def batches() -> Iterator[pa.RecordBatch]:
        for part in chunks(items):
            for pair in part:
                digest.update(repr(pair).encode("utf-8"))  # repr writes half characters as escapes
            keys, values = zip(*part, strict=True)
            yield pa.record_batch([pa.array(keys), pa.array(values, pa.large_binary())], schema=KEYED_SCHEMA)

    if not on_disk:
        table = pa.Table.from_batches(list(batches()), KEYED_SCHEMA)
        return Rows([Part(table, None, digest.hexdigest())])
    parent = cache_folder() / "rows"
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{uuid4().hex}.{os.getpid()}"  # swept away once this process is gone
    temporary.mkdir()
    try:
        _write(temporary, KEYED_SCHEMA, batches(), lambda: {})
        folder = parent / key_of("made", digest.hexdigest())
        try:
            temporary.rename(folder)
        except OSError:  # the same rows exist already
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = _opened(folder)
    assert found is not None, folder
    return Rows([Part(found.table, None, digest.hexdigest(), found.file)])


def as_json(row: Row) -> bytes:
    """A row's values as they are stored. Raises RecipeError for what JSON cannot hold."""
    try:
        return ROW_JSON.encode(row.values).encode("utf-8")
    except RecursionError as error:
        raise RecipeError(row.key, "is nested too deeply", "leave out fields that are not text") from error
    except UnicodeEncodeError as error:
        raise RecipeError(
            row.key, f"holds half a character ({error.object[error.start]!r})", "write it as UTF-8 text"
        ) from error


def row_batches(rows: Iterator[tuple[int, bytes]]) -> Iterator[pa.RecordBatch]:
    """(number, JSON) pairs to record batches."""
    for part in chunks(rows):
        numbers, values = zip(*part, strict=True)
        yield pa.record_batch([pa.array(numbers, pa.int64()), pa.array(values, pa.large_binary())], schema=ROW_SCHEMA)


def token_schema(columns: Sequence[Column] = ()) -> pa.Schema:
    """How rendered rows with these columns are stored."""
    return pa.schema([*TOKEN_SCHEMA, *(c.field for c in columns)])


def token_batch(items: Sequence[Mapping[str, Any]], columns: Sequence[Column] = ()) -> pa.RecordBatch:
    """Rendered rows to a record batch."""
    carried = {c.name for c in columns if c.level == "row"}
    held = {
        "key": [x["key"] for x in items],
        "ids": [x["ids"] for x in items],
        "labels": [x["labels"] for x in items],
        "front": [sum(x["token"]["prompt"]) if "prompt" in x.get("token", ()) else 0 for x in items],
        "row": [json.dumps({n: v for n, v in x.get("row", {}).items() if n not in carried}) for x in items],
        TYPE_IDS: [x.get("token", {}).get(TYPE_IDS) for x in items],
        "targets": [x.get("targets") for x in items],
    }
    arrays = [pa.array(held[f.name], f.type) for f in TOKEN_SCHEMA]
    return pa.record_batch([*arrays, *(cells(items, c) for c in columns)], schema=token_schema(columns))


def chunks(items: Iterator[T]) -> Iterator[list[T]]:
    """The items in lists of BATCH; the last one may be shorter."""
    part: list[T] = []
    for item in items:
        part.append(item)
        if len(part) == BATCH:
            yield part
            part = []
    if part:
        yield part
