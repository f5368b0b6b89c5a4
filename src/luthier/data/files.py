"""Open files, folders, globs and Hub data sets as sequences of raw rows.

Damaged content costs one sentence and little memory: a line has a limit, and a Parquet file says how much it would unpack before
anything is unpacked (`luthier.data.parquet`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from luthier.data.parquet import refuse_oversized
from luthier.support.cache import content_of
from luthier.support.errors import RecipeError

Raw = Iterator[tuple[int, "dict[str, Any] | RecipeError"]]
PACKED = (".gz", ".zst")
PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*PLAIN, *(a + b for a in PLAIN for b in PACKED), ".parquet", ".arrow")
LONGEST = 1 << 27  # bytes of a line: more is taken for damage
BATCH = 1024  # rows of a Parquet or Arrow file in memory
HUB = "hf://datasets/"
SPLITS = {  # names of splits in names of files, as the library datasets knows them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


class Opened(NamedTuple):
    """A file or a data set whose rows can be read.

    name     of the rows: the start of their keys
    content  a key of everything that is in it
    raw      reads the rows
    columnar True if missing fields of a row are there as null: Parquet, Arrow, the Hub
    texts    True if all values are texts: CSV, TSV
    """

    name: str
    content: str
    raw: Callable[[], Raw]
    columnar: bool = False
    texts: bool = False


def suffix_of(name: str) -> str | None:
    """The longest suffix of SUFFIXES that a name has; None if it has none."""
    return max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default=None)


def has_splits(source: str) -> bool:
    """True for a name that may hold several splits: a Hub data set or a folder."""
    return not source.startswith("builtin:") and (source.startswith("hf://") or suffix_of(source) is None)


def on_hub(source: str) -> bool:
    """True for a name that is a Hub id, or an address on the Hub, unless there is such a folder."""
    if source.startswith("hf://"):
        return True
    return suffix_of(source) is None and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def opened(source: str, folder: Path, key: str, part: str) -> list[Opened]:
    """The files of a source, or its Hub data set.

    source  a file, a folder, a glob, a Hub id (org/name:configuration@revision) or hf://datasets/...
    folder  that paths are relative to
    key     of the recipe, for messages
    part    the split to take from a Hub data set or a folder that holds several
    Raises RecipeError for a source that is none of these, or is not there.
    """
    if source.startswith("hf://"):
        return _hub_address(source, key, part)
    path = folder / Path(source).expanduser()
    if path.is_dir():
        return _folder(path, key, part)
    if path.is_file():
        return [_file(path, key)]
    if any(c in source for c in "*?["):
        return [_file(p, key) for p in _matching(source, folder, key)]
    if suffix_of(source) is None and on_hub(source):
        return [_hub(source, key, part)]
    if suffix_of(source) is not None:
        raise RecipeError(key, f"there is no file {path}", "paths are relative to the recipe's folder")
    what = f"{source!r} is no file, folder or glob that is there, nor a Hub id"
    raise RecipeError(key, what, "paths are relative to the recipe's folder; a Hub id is org/name")


def _file(path: Path, key: str) -> Opened:
    suffix = suffix_of(path.name)
    if suffix is None:
        known = ", ".join((*PLAIN, ".parquet", ".arrow"))
        raise RecipeError(
            key, f"{path} is not a file that luthier reads", f"it reads {known}, packed as .gz or .zst too"
        )
    kind = suffix.removesuffix(".gz").removesuffix(".zst")
    reader = READERS[kind]
    columnar = kind in (".parquet", ".arrow")
    return Opened(str(path), f"{content_of(path)}{suffix}", partial(reader, path), columnar, kind in (".csv", ".tsv"))


# --- folders and globs ---


def _matching(source: str, folder: Path, key: str) -> list[Path]:
    pattern = Path(source).expanduser()
    start, rest = (
        (Path(pattern.anchor), pattern.relative_to(pattern.anchor)) if pattern.is_absolute() else (folder, pattern)
    )
    try:
        found = sorted(p for p in start.glob(str(rest)) if p.is_file())
    except ValueError as error:
        raise RecipeError(key, f"{source!r} is not a glob ({error})", "write data/*.jsonl") from error
    if not found:
        raise RecipeError(key, f"no file matches {folder / source}", "paths are relative to the recipe's folder")
    return found


def _folder(path: Path, key: str, part: str) -> list[Opened]:
    """The files of a folder: as datasets.save_to_disk wrote it, or shards of one data set."""
    if (path / "dataset_dict.json").is_file():
        splits = _stored(path / "dataset_dict.json").get("splits", [])
        return _folder(path / _split(part, splits, path, key), key, part)
    if (path / "state.json").is_file():
        names = [f.get("filename", "") for f in _stored(path / "state.json").get("_data_files", [])]
        if gone := [n for n in names if not n or not (path / n).is_file()]:
            raise RecipeError(key, f"{path} names the file {gone[0]!r}, which is not there", "copy the folder again")
        return [_file(path / n, key) for n in names]
    found = [p for p in sorted(path.iterdir()) if p.is_file() and p.name[0] not in "._" and suffix_of(p.name)]
    if not found and (path / "data").is_dir():  # a data set's repository
        return _folder(path / "data", key, part)
    if not found:
        raise RecipeError(key, f"the folder {path} holds no file that luthier reads", "name a file, or a glob")
    by_split: dict[str | None, list[Path]] = {}
    for p in found:
        by_split.setdefault(split_of(p.name), []).append(p)
    if set(by_split) != {None}:
        found = by_split[_split(part, [s for s in by_split if s], path, key)]
    return [_file(p, key) for p in found]


def split_of(name: str) -> str | None:
    """The split that a file's name says, as in train-00000-of-00004.parquet; None if it says none."""
    words = re.split(r"[-._ ]", name.lower())
    return next((SPLIT_OF[w] for w in words if w in SPLIT_OF), None)


def _split(part: str, there: Sequence[str], path: Path, key: str) -> str:
    """The split of this name. Raises RecipeError with the splits that there are."""
    for name in (part, SPLIT_OF.get(part, part)):
        if name in there:
            return name
    setting = "data.eval_split" if key.startswith("data.eval") else "data.train_split"
    listed = ", ".join(sorted(map(str, there))) or "none"
    raise RecipeError(key, f"{path} has no split {part!r}; it has {listed}", f"set {setting}, or name a file")


def _stored(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RecipeError(str(path), f"cannot be read ({error})", "copy the folder again") from error
    if not isinstance(value, dict):
        raise RecipeError(str(path), f"holds a {type(value).__name__}, not an object", "copy the folder again")
    return value


# --- the Hub ---


def _hub(source: str, key: str, part: str) -> Opened:
    import datasets

    name, config, revision = hub_id(source)
    try:
        table = datasets.load_dataset(name, config, split=part, revision=revision)
    except (OSError, ValueError) as error:
        what = f"{source}: {first_line(error)}"
        raise RecipeError(key, what, "use a file, or check name, configuration, split and network") from error
    names = {n: f.names for n, f in (table.features or {}).items() if isinstance(f, datasets.ClassLabel)}
    rows = partial(_hub_rows, table, names)
    return Opened(f"{source}:{part}", table._fingerprint, rows, True)


def _hub_rows(table: Any, names: dict[str, list[str]]) -> Raw:
    for number, row in enumerate(table, start=1):
        yield number, with_names(dict(row), names)


def hub_id(source: str) -> tuple[str, str | None, str | None]:
    """(name, configuration, revision) of org/name:configuration@revision, in either order."""
    name, *more = re.split(r"([:@])", source)
    said = dict(zip(more[::2], more[1::2], strict=False))
    return name, said.get(":") or None, said.get("@") or None


def _hub_address(source: str, key: str, part: str) -> list[Opened]:
    """hf://datasets/org/name is the data set, hf://datasets/org/name/PATH its file, folder or glob."""
    match = re.fullmatch(r"hf://(?:datasets/)?([^/@]+/[^/@:]+)((?:[@:][^/]+)*)(?:/(.*))?", source)
    if match is None or (not source.startswith(HUB) and match[3]):
        raise RecipeError(key, f"{source!r} is not an address on the Hub", "write hf://datasets/org/name/file.jsonl")
    name, said, path = match[1], match[2], (match[3] or "").rstrip("/")
    if not path:
        return [_hub(name + said, key, part)]
    import huggingface_hub

    try:
        revision = hub_id(name + said)[2]
        root = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=[path, f"{path}/*"]
        )
    except (OSError, ValueError) as error:
        raise RecipeError(key, f"{source}: {first_line(error)}", "check name, path and network") from error
    return opened(path, Path(root), key, part)


# --- bytes to rows ---


def stream_of(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name says that it is packed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd", buffer_size=1 << 16))
    return path.open("rb")


DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException)


def _no_whole(path: Path, number: int, error: Exception, what: str = "line") -> RecipeError:
    kind = {".gz": "gzip ", ".zst": "zstandard "}.get(path.suffix, "")
    return RecipeError(
        str(path), f"is no whole {kind}file after {what} {number} ({first_line(error)})", "copy it again, or unpack it"
    )


def jsonl(path: Path) -> Raw:
    number = 0
    with stream_of(path) as file:
        try:
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    what = f"is longer than {LONGEST >> 20} MiB without an end of line"
                    raise RecipeError(f"{path}:{number}", what, "write one object a line")
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
        except DAMAGED as error:
            raise _no_whole(path, number, error) from error
        except OSError as error:  # pyarrow raises it for a cut zstandard file
            if path.suffix not in PACKED:
                raise
            raise _no_whole(path, number, error) from error


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
    """Items of a list, one at a time; or the lines of a file that holds an object a line under this name."""
    with stream_of(path) as file:
        try:
            head = file.read(1024)
        except (*DAMAGED, OSError) as error:
            raise _no_whole(path, 0, error, "item") from error
    start = head.removeprefix(BOM_UTF8).lstrip()[:1]
    if start == b"[":
        yield from _items(path, len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
    elif start == b"{" and _one_a_line(path):
        yield from jsonl(path)
    else:
        what = "holds one object" if start == b"{" else f"starts with {start!r}"
        raise RecipeError(str(path), f"{what}, not a list of rows", "write a list of objects, or one object a line")


def _one_a_line(path: Path) -> bool:
    """True if the first line that is not empty holds a whole object, and it is a row: it does not hold lists of rows."""
    _, first = next(iter(jsonl(path)), (0, None))
    return isinstance(first, dict) and not any(
        isinstance(v, list) and v and all(isinstance(x, dict) for x in v) and k in ("data", "rows", *SPLIT_OF)
        for k, v in first.items()
    )


def _items(path: Path, begin: int) -> Raw:
    import ijson

    number = 0
    with stream_of(path) as file:
        file.read(begin)
        try:
            for number, value in enumerate(ijson.items(file, "item", use_float=True), start=1):
                yield number, value if isinstance(value, dict) else _no_object(value, f"{path}: item {number}")
        except (ijson.JSONError, UnicodeDecodeError) as error:
            what = f"is not JSON after item {number} ({first_line(error)})"
            raise RecipeError(str(path), what, "write a list of objects") from error
        except DAMAGED as error:
            raise _no_whole(path, number, error, "item") from error


def _csv(path: Path, tabs: bool = False) -> Raw:
    """Rows of a CSV or TSV file. The header decides the delimiter: a comma, else a semicolon, else a tab."""
    csv.field_size_limit(LONGEST)  # of the process; the default, 131,072 characters, is shorter than a long document
    with io.TextIOWrapper(stream_of(path), encoding="utf-8-sig", newline="") as file:
        reader: Any = None
        try:
            header = file.readline(LONGEST)
            file.seek(0)
            reader = csv.reader(file, delimiter=_delimiter(header, tabs), strict=True)
            names = next(reader, [])
            _check_header(path, names)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    what = f"has {len(row)} fields, the header has {len(names)}"
                    yield (
                        reader.line_num,
                        RecipeError(f"{path}:{reader.line_num}", what, "quote fields with a delimiter"),
                    )
                else:
                    yield reader.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            kind = "TSV" if tabs else "CSV"
            raise RecipeError(
                f"{path}:{reader.line_num}", f"is not {kind} ({error})", 'write a quote in a quoted field twice: ""'
            ) from error
        except UnicodeDecodeError as error:
            raise RecipeError(str(path), f"is not UTF-8 text ({error.reason})", "save it as UTF-8") from error
        except DAMAGED as error:
            raise _no_whole(path, reader.line_num if reader else 0, error) from error
        except OSError as error:
            if path.suffix not in PACKED:
                raise
            raise _no_whole(path, reader.line_num if reader else 0, error) from error


def _delimiter(header: str, tabs: bool) -> str:
    return "\t" if tabs else next((d for d in ",;\t" if d in header), ",")


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise RecipeError(f"{path}:1", f"the header names {twice!r} twice", "give every column a name of its own")


def _parquet(path: Path) -> Raw:
    import pyarrow.parquet

    try:
        refuse_oversized(path)
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        names, number = _class_names(file.schema_arrow), 0
        for batch in file.iter_batches(batch_size=BATCH):
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield number, with_names(row, names)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecipeError(str(path), f"is not a Parquet file, or damaged ({first_line(error)})", "copy it again") from error


def _arrow(path: Path) -> Raw:
    """Rows of an Arrow file, as datasets.save_to_disk writes it (a stream), or with the footer of a file."""
    try:
        with pa.memory_map(str(path)) as source:
            footed = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if footed else pa.ipc.open_stream(source)
            names, number = _class_names(reader.schema), 0
            batches = map(reader.get_batch, range(reader.num_record_batches)) if footed else iter(reader)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, BATCH):
                    for row in batch.slice(start, BATCH).to_pylist():
                        number += 1
                        yield number, with_names(row, names)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecipeError(str(path), f"is not an Arrow file, or damaged ({first_line(error)})", "copy it again") from error


READERS: dict[str, Callable[[Path], Raw]] = {
    ".jsonl": jsonl, ".ndjson": jsonl, ".json": _json, ".csv": _csv, ".tsv": partial(_csv, tabs=True),
    ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of classes by column, where the library datasets wrote them into the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {n: f["names"] for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):  # metadata of another writer
        return {}


def with_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The row with names in place of the numbers of classes; a number outside of the names (-1: no label) becomes None."""
    for column, known in names.items():
        number = row.get(column)
        if isinstance(number, int):
            row[column] = known[number] if 0 <= number < len(known) else None
    return row


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__
