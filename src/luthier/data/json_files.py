"""JSON files: an object a line, a list of objects, a list in an object, or objects over several lines."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from luthier.data import streams
from luthier.data.forms import FORMS, UNREAD
from luthier.data.streams import AS_UTF8, first_line, lines_of, no_text, refuse_other_kind, stream_of, whole
from luthier.support.errors import RecipeError

Raw = Iterator[tuple[int, "dict[str, Any] | RecipeError"]]  # (line or item, its values)
AS_ROWS = "write a list of objects, or one object a line"


def jsonl(path: Path) -> Raw:
    """An object a line. Lines may end in a carriage return alone, which no text in JSON holds."""
    number = 0
    for _, text in lines_of(path):
        for line in text.replace(b"\r\n", b"\n").split(b"\r") if b"\r" in text else (text,):
            number += 1
            if line.removeprefix(BOM_UTF8).strip():
                yield number, _object(line, f"{path}:{number}")


def _object(line: bytes, where: str) -> dict[str, Any] | RecipeError:
    try:
        value = json.loads(line.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return no_text(error, where)
    except (ValueError, RecursionError) as error:
        return RecipeError(where, f"is not JSON ({error})", "write one object a line")
    return value if isinstance(value, dict) else _no_object(value, where)


def _no_object(value: Any, where: str) -> RecipeError:
    what = f"holds a {type(value).__name__}, not an object"
    return RecipeError(where, what, 'write {"prompt": ..., "completion": ...}')


def rows_of(path: Path, lines: bool = False) -> Raw:
    """The rows of a file, one at a time. Files of lines and files of lists have both names, .json and .jsonl.

    lines  the name says that it holds an object a line
    """
    with stream_of(path) as file, whole(path, lambda: "line 0"):
        begun = file.read(1024)
    refuse_other_kind(path, begun)
    start = begun.removeprefix(BOM_UTF8).lstrip()[:1]
    if start == b"[":
        yield from _items(path, "item")
    elif lines or (start == b"{" and _one_a_line(path)):
        yield from jsonl(path)
    elif start == b"{":
        key = _list_in(path)
        yield from _items(path, "" if key is None else f"{key}.item")
    elif start:
        raise RecipeError(str(path), f"starts with {start!r}, not a list of rows", AS_ROWS)


def _one_a_line(path: Path) -> bool:
    """True if the first line that is not empty holds a whole object, unless it is all of the file and holds a list of rows."""
    found = jsonl(path)
    _, first = next(found, (0, None))
    if not isinstance(first, dict):
        return False
    return next(found, None) is not None or not any(_is_list_of_objects(v) for v in first.values()) or _is_row(first)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _is_row(names: Collection[str]) -> bool:
    """True for the fields of a known form: lists in them are turns, not rows."""
    known = [form.fields for form in FORMS] + [form.fields for form in UNREAD if form.fields]
    return any(all(n in names for n in fields) for fields in known)


def _list_in(path: Path) -> str | None:
    """The key under which a file's only object holds its rows; None if its objects are rows themselves.

    Raises RecipeError if there are several such lists.
    """
    import ijson

    names: dict[str, bool] = {}  # key -> whether it holds a list of objects
    objects = 0
    with _reading(path) as at:
        for prefix, event, value in ijson.parse(at.file, multiple_values=True):
            at.file.taken = 0
            if prefix == "":
                objects += event == "start_map"
                if event == "map_key":
                    names.setdefault(value, False)
            elif event == "start_map" and prefix.removesuffix(".item") in names and prefix.endswith(".item"):
                names[prefix.removesuffix(".item")] = True
    lists = [name for name, holds in names.items() if holds]
    if objects > 1 or not lists or _is_row(names):
        return None
    if len(lists) > 1:
        what = f"holds one object with several lists ({', '.join(lists)})"
        raise RecipeError(str(path), what, "write each list to a file of its own")
    return lists[0]


def _items(path: Path, prefix: str) -> Raw:
    """The values at this place of a file, as ijson names places; "": its values one after another."""
    import ijson

    with _reading(path) as at:
        for value in ijson.items(at.file, prefix, use_float=True, multiple_values=not prefix):
            at.number, at.file.taken = at.number + 1, 0
            where = f"{path}: item {at.number}"
            yield at.number, value if isinstance(value, dict) else _no_object(value, where)


class _Metered:
    """A stream that gives LONGEST bytes, until `taken` is set to 0 again. Raises ValueError if it is asked for more.

    begun  bytes of the file that were read before
    """

    def __init__(self, file: IO[bytes], begun: bytes) -> None:
        self.file, self.begun, self.taken = file, begun, 0

    def read(self, count: int = -1) -> bytes:
        if self.taken > streams.LONGEST:
            raise ValueError(f"an item is longer than {streams.LONGEST >> 20} MiB")
        data, self.begun = (self.begun, b"") if self.begun and count else (self.file.read(count), self.begun)
        self.taken += len(data)
        return data


@dataclass
class _Place:
    """The place of a reading in its file: the stream, and the number of the last item."""

    file: _Metered
    number: int = 0


@contextmanager
def _reading(path: Path) -> Iterator[_Place]:
    """Reads a file piece by piece. Raises RecipeError with the last item for what is not JSON."""
    import ijson

    with stream_of(path) as file:
        at = _Place(_Metered(file, b""))
        with whole(path, lambda: f"item {at.number}"):
            at.file.begun = file.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
            try:
                yield at
            except (ijson.JSONError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
                if isinstance(error, UnicodeDecodeError) or "invalid bytes in UTF8" in str(error):
                    raise RecipeError(str(path), f"is not UTF-8 text after item {at.number}", AS_UTF8) from error
                what = f"is not JSON after item {at.number} ({first_line(error)})"
                raise RecipeError(str(path), what, AS_ROWS) from error
