"""Bytes and lines of text files, unpacked while they are read. What is not UTF-8 text, or is damaged, costs one sentence."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from luthier.support.errors import RecipeError

PACKED = (".gz", ".zst")
LONGEST = 1 << 25  # bytes of a line or an item of a list: more is taken for damage
AS_UTF8 = "save the file as UTF-8"
# What files that are no UTF-8 text begin with. A longer mark comes before one that it begins with.
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (BOM_UTF32_LE, "is UTF-32 text", AS_UTF8), (BOM_UTF32_BE, "is UTF-32 text", AS_UTF8),
    (BOM_UTF16_LE, "is UTF-16 text", AS_UTF8), (BOM_UTF16_BE, "is UTF-16 text", AS_UTF8),
    (b"\x1f\x8b", "is a gzip file", "add .gz to its name"), (b"\x28\xb5\x2f\xfd", "is a zstandard file", "add .zst to its name"),
    (b"PK\x03\x04", "is a zip file, or a spreadsheet", "unpack it, or save the sheet as CSV"),
    (b"PAR1", "is a Parquet file", "let its name end in .parquet"), (b"ARROW1", "is an Arrow file", "let its name end in .arrow"),
    (b"version https://git-lfs", "is a pointer of git-lfs, not the rows", "run git lfs pull"),
    (b"<!doctype html", "is a page of HTML", "download the file itself"),
    (b"<html", "is a page of HTML", "download the file itself"),
)  # fmt: skip


def stream_of(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name says that it is packed."""
    packed = path.suffix.lower()
    if packed == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if packed == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd", buffer_size=1 << 16))
    return path.open("rb")


@contextmanager
def whole(path: Path, last: Callable[[], str]) -> Iterator[None]:
    """Raise RecipeError with the last line or item for a packed file that is cut off or damaged."""
    packed = path.suffix.lower()
    try:
        yield
    # pyarrow raises OSError for a cut zstandard file.
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        if packed not in PACKED:
            raise
        kind = {".gz": "gzip", ".zst": "zstandard"}[packed]
        what = f"is no whole {kind} file after {last()} ({first_line(error)})"
        raise RecipeError(str(path), what, "copy it again, or unpack it") from error


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file, from 1. Raises RecipeError for a line without an end, or if the file is damaged."""
    number = 0
    with stream_of(path) as file, whole(path, lambda: f"line {number}"):
        refuse_other_kind(path, file.peek(32)[:32])  # type: ignore[attr-defined]
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise RecipeError(f"{path}:{number}", f"is longer than {LONGEST >> 20} MiB", "write one row a line")
            yield number, line


def refuse_other_kind(path: Path, start: bytes) -> None:
    """Raises RecipeError, naming what it is, for a file that begins as another kind of file than UTF-8 text."""
    for mark, what, remedy in KINDS:
        if start.lower().startswith(mark.lower()):
            raise RecipeError(str(path), what, remedy)
    if b"\0" in start[:2]:
        raise RecipeError(str(path), "is UTF-16 text", AS_UTF8)


def no_text(error: UnicodeDecodeError, where: str) -> RecipeError:
    """The refusal of bytes that are no UTF-8 text."""
    return RecipeError(where, f"is not UTF-8 text ({error.reason} at byte {error.start})", AS_UTF8)


def texts_of(path: Path) -> Iterator[str]:
    """The lines of a text file; they may end in a carriage return alone. Raises RecipeError with the line of other bytes."""
    for number, line in lines_of(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise no_text(error, f"{path}:{number}") from error
        yield from re.findall(r"[^\r]*\r\n?|[^\r]+", text) if "\r" in text else (text,)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__
