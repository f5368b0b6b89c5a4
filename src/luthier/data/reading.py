"""Rows from files, the Hub and built-in sets; every fault named by file and line before any work starts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import RecipeError

SHAPES = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text and label": ("text", "label"),
    "text": ("text",),
}
BUILTIN = "builtin:requests"


class Row(NamedTuple):
    """A row and where it stands, for every message about it."""

    key: str
    values: dict[str, Any]


def read(source: str, columns: Mapping[str, str], folder: Path, task: str, split: str = "train") -> list[Row]:
    """All rows of a source, with columns renamed to ours and checked for shape.

    source   a .jsonl, .json, .csv or .parquet file (relative to `folder`), "builtin:requests", or a Hub id
    columns  our name -> name in the file
    Raises RecipeError with file and line for the first row that cannot be used.
    """
    rows = [Row(key, _renamed(values, columns, key)) for key, values in _raw(source, folder, split)]
    if not rows:
        raise RecipeError(f"data.{split}", f"{source} holds no rows", "give a file with at least one")
    first: tuple[str, str] | None = None
    for row in rows:
        shape = shape_of(row, task)
        if first is not None and shape != first[1]:
            raise RecipeError(row.key, f"holds {shape}, but {first[0]} holds {first[1]}", "keep one shape a file")
        first = first or (row.key, shape)
    return rows


def _raw(source: str, folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source == BUILTIN:
        yield from _builtin(split)
        return
    path = folder / source
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix in readers:
        if not path.is_file():
            raise RecipeError(f"data.{split}", f"there is no file {path}", "paths are relative to the recipe's folder")
        yield from readers[path.suffix](path)
    elif source.count("/") == 1 and not source.startswith((".", "/")):
        yield from _hub(source, split)
    else:
        raise RecipeError(
            f"data.{split}",
            f"{source!r} is no .jsonl, .json, .csv or .parquet file and no Hub id",
            f"or use {BUILTIN}",
        )


def _builtin(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from luthier.data.demo_requests import demo_rows

    train, test = demo_rows()
    for i, row in enumerate(train if split == "train" else test, start=1):
        yield f"{BUILTIN}:{split}:{i}", {"prompt": row["prompt"], "completion": row["answer"]}


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise RecipeError(
            str(path), f"is not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(where, f"is not JSON ({error})", "write one object a line") from error
    if not isinstance(value, dict):
        raise RecipeError(
            where,
            f"holds a {type(value).__name__}, not an object",
            'write {"prompt": ..., "completion": ...}',
        )
    return value


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(str(path), f"is not JSON ({error})", "write a list of objects") from error
    if not isinstance(values, list):
        raise RecipeError(str(path), f"holds a {type(values).__name__}, not a list", "write a list of objects")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise RecipeError(f"{path}: item {number}", f"is a {type(value).__name__}, not an object")
        yield f"{path}:{number}", value


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise RecipeError(f"{path}:{reader.line_num}", "has another number of fields than the header")
                yield f"{path}:{reader.line_num}", dict(row)
        except csv.Error as error:
            raise RecipeError(f"{path}:{reader.line_num}", f"is not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(str(path), f"is not a Parquet file ({error})") from error


def _hub(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"data.{split}",
            f"{source}: {str(error).splitlines()[0]}",
            "use a file, or check name and network",
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{source}:{split}:{number}", dict(row)


def _renamed(values: dict[str, Any], columns: Mapping[str, str], key: str) -> dict[str, Any]:
    out = dict(values)
    for ours, theirs in columns.items():
        if theirs not in values:
            raise RecipeError(
                key, f"has no field {theirs!r}, which data.columns.{ours} names; it has {_listed(values)}"
            )
        out[ours] = values[theirs]
    return out


def shape_of(row: Row, task: str) -> str:
    """Which of the known shapes a row has. Raises RecipeError naming the fields found and the fields expected."""
    values = row.values
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(
            row.key, f"holds half a character ({error.object[error.start]!r})", "write it as UTF-8 text"
        ) from error
    names = ["text and label"] if task == "classification" else ["messages", "prompt and completion", "text"]
    for name in names:
        if all(field in values for field in SHAPES[name]):
            _check_types(row, name)
            return name
    expected = " or ".join(names)
    raise RecipeError(row.key, f"has the fields {_listed(values)}, expected {expected}", "map them with data.columns")


def _check_types(row: Row, shape: str) -> None:
    for field in SHAPES[shape]:
        value = row.values[field]
        if field == "messages":
            _check_messages(row.key, value)
        elif field == "label":
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise RecipeError(row.key, f"label is {value!r}", "a label is text or a whole number")
        elif not isinstance(value, str):
            raise RecipeError(row.key, f"{field} is {type(value).__name__} {str(value)[:40]!r}", "it should be text")


def _check_messages(key: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise RecipeError(key, "messages is not a list of turns", 'write [{"role": "user", "content": ...}, ...]')
    for i, turn in enumerate(messages):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise RecipeError(
                key,
                f"turn {i + 1} has no role and content as text",
                'write {"role": "user", "content": "..."}',
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "no fields"
