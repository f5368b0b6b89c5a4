"""Open files, folders, globs and Hub data sets as sequences of raw rows.

Damaged content costs one sentence and little memory: a line or an item has a limit, and what a Parquet or Arrow file would
unpack to is known before anything is unpacked (`luthier.data.parquet`, `luthier.data.arrow`).
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from luthier.data import arrow, parquet, streams
from luthier.data.json_files import Raw, rows_of
from luthier.data.streams import PACKED, first_line, texts_of
from luthier.support.cache import content_of
from luthier.support.errors import RecipeError

COLUMNS = (".conll", ".iob", ".iob2", ".bio")  # a word and its tag on each line
PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *COLUMNS)
SUFFIXES = (*PLAIN, *(a + b for a in PLAIN for b in PACKED), ".parquet", ".arrow")
BATCH = 1024  # rows of a Parquet or Arrow file in memory
HUB = "hf://datasets/"
SPLITS = {  # names of splits in names of files, as the library datasets knows them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # files about a data set
COMMENT = re.compile(r"#\s?(id|sent_id|text|newdoc|newpar|global\.columns)\b")
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
    if "://" in source:
        raise RecipeError(key, f"{source} is an address", "download the file; of addresses, hf://datasets/... is read")
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
        known = f"{', '.join(PLAIN)}, packed as .gz or .zst too, .parquet and .arrow"
        raise RecipeError(key, f"{path} is not a file that luthier reads", f"it reads {known}")
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
        found = sorted(p for p in start.glob(str(rest)) if p.is_file() and (p.name[0] != "." or rest.name[0] == "."))
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
    inside = [p for p in sorted(path.iterdir()) if p.name[0] not in "._"]
    found = [p for p in inside if p.is_file() and p.name not in ABOUT and suffix_of(p.name)]
    if not found and (path / "data").is_dir():  # a data set's repository
        return _folder(path / "data", key, part)
    if not found and (splits := {SPLIT_OF[p.name]: p for p in inside if p.is_dir() and p.name in SPLIT_OF}):
        return _folder(splits[_split(part, list(splits), path, key)], key, part)
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
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"{source}: {first_line(error)}"
        raise RecipeError(key, what, "use a file, or check name, configuration, split and network") from error
    rows = partial(_hub_rows, table, _names_in((table.features or datasets.Features()).to_dict()))
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


def _csv(path: Path, tabs: bool = False) -> Raw:
    """Rows of a CSV or TSV file. The header decides the delimiter: a comma, a semicolon or a tab."""
    csv.field_size_limit(
        streams.LONGEST
    )  # of the process; the default, 131,072 characters, is shorter than a long document
    lines = texts_of(path)
    empty, header = 0, next(lines, "")
    while header and not header.strip():
        empty, header = empty + 1, next(lines, "")
    delimiter = "\t" if tabs else max(",;\t", key=header.count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" and _bare_quotes(path) else csv.QUOTE_MINIMAL
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        _check_header(f"{path}:{empty + 1}", names)
        for row in reader:
            line = empty + reader.line_num
            if row and len(row) != len(names):
                what = f"has {len(row)} fields, the header has {len(names)}"
                yield line, RecipeError(f"{path}:{line}", what, "put fields that hold a delimiter into quotes")
            elif row:
                yield line, dict(zip(names, row, strict=True))
    except csv.Error as error:
        what = f"is not {'TSV' if tabs else 'CSV'} ({error})"
        raise RecipeError(
            f"{path}:{empty + reader.line_num}", what, 'write a quote in a quoted field twice: ""'
        ) from error


def _conll(path: Path) -> Raw:
    """Sentences of a file with a word on each line: its first column is the word, its last one the tag; a blank line ends one.

    Tabs divide columns, or white space in files without tabs. Lines that begin a document (-DOCSTART-) are no words, nor are
    comments with the number of a sentence. A sentence's number is that of its first line.
    """
    begun, width, size = 0, 0, 0
    words, fault = list[list[str]](), None
    for number, text in enumerate(itertools.chain(texts_of(path), [""]), start=1):
        line = text.rstrip("\r\n")
        if not line.strip() or line.startswith("-DOCSTART-") or (not words and COMMENT.match(line)):
            if words:
                yield begun, fault or {"tokens": [w[0] for w in words], "tags": [w[-1] for w in words]}
            words, size, fault = [], 0, None
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        width, begun, size = width or len(columns), begun if words else number, size + len(line)
        words.append(columns)
        if len(columns) < 2 or len(columns) != width:
            what = f"has {len(columns)} column{'s' * (len(columns) > 1)}, not {max(2, width)}"
            fault = RecipeError(f"{path}:{number}", what, "write a word and its tag on each line")
        if size > streams.LONGEST:
            what = f"is a sentence of more than {streams.LONGEST >> 20} MiB"
            raise RecipeError(f"{path}:{begun}", what, "put a blank line after each sentence")


def _bare_quotes(path: Path) -> bool:
    """True for a file in which a quote is a character like others.

    Then every line has as many tabs as the header, and some field begins with a quote that it does not end with.
    """
    tabs, bare = -1, False
    for line in texts_of(path):
        text = line.rstrip("\r\n")
        if not text:
            continue
        tabs = text.count("\t") if tabs < 0 else tabs
        if text.count("\t") != tabs:
            return False
        if '"' in text:
            quoted = [f for f in text.split("\t") if f.startswith('"')]
            bare = bare or any(len(f) < 2 or f[-1] != '"' or '"' in f[1:-1].replace('""', "") for f in quoted)
    return bare


def _check_header(where: str, names: Sequence[str]) -> None:
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise RecipeError(where, f"the header names {twice!r} twice", "give every column a name of its own")


def _parquet(path: Path) -> Raw:
    import pyarrow.parquet

    with _undamaged(path, "a Parquet file"):
        parquet.refuse_oversized(path)
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        yield from _rows_in(file.iter_batches(batch_size=BATCH), file.schema_arrow)


def _arrow(path: Path) -> Raw:
    """Rows of an Arrow file, as datasets.save_to_disk writes it (a stream), or with the footer of a file."""
    with _undamaged(path, "an Arrow file"):
        arrow.refuse_oversized(path)
        with pa.memory_map(str(path)) as source:
            footed = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if footed else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if footed else iter(reader)
            yield from _rows_in(batches, reader.schema)


@contextmanager
def _undamaged(path: Path, kind: str) -> Iterator[None]:
    """Raises RecipeError with the file for whatever error damaged bytes cause inside."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecipeError(str(path), f"is not {kind}, or damaged ({first_line(error)})", "copy it again") from error


def _rows_in(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Raw:
    """The rows of batches, of which only BATCH at a time become Python values."""
    names, number = _class_names(schema), 0
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield number, with_names(row, names)


_json_lines = partial(rows_of, lines=True)
READERS: dict[str, Callable[[Path], Raw]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": rows_of, ".csv": _csv, ".tsv": partial(_csv, tabs=True),
    ".parquet": _parquet, ".arrow": _arrow, **dict.fromkeys(COLUMNS, _conll),
}  # fmt: skip


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of classes by column, where the library datasets wrote them into the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return _names_in(features)
    except (ValueError, KeyError, TypeError, AttributeError):  # metadata of another writer
        return {}


def _names_in(features: dict[str, Any]) -> dict[str, list[str]]:
    """Names of classes by column, where a column holds classes or lists of them."""
    found = {n: _named(f) for n, f in features.items()}
    return {n: names for n, names in found.items() if names is not None}


def _named(feature: Any) -> list[str] | None:
    """The names of a feature of classes, or of a list of them, as the library datasets writes it; None for other features."""
    if isinstance(feature, list):
        return _named(feature[0]) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names: list[str] = feature["names"]
        return names
    return _named(feature.get("feature"))


def with_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The row with names in place of the numbers of classes, also in lists of them.

    A number outside of the names (-1: no label) becomes None.
    """
    for column, known in names.items():
        given = row.get(column)
        if isinstance(given, int):
            row[column] = _name_of(given, known)
        elif isinstance(given, list):
            row[column] = [_name_of(n, known) if isinstance(n, int) else n for n in given]
    return row


def _name_of(number: int, known: list[str]) -> str | None:
    return known[number] if 0 <= number < len(known) else None
