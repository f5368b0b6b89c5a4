"""What a Parquet file would unpack to, read from the headers of its pages, before anything is unpacked.

pyarrow allocates what a page's header asks for. A single flipped bit in a header can ask for gigabytes, in a file of kilobytes.
So the headers are read first (Thrift's compact protocol, parquet.thrift) and compared with the totals in the file's footer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

SLACK = 1 << 16  # bytes; some writers leave headers out of the totals
LARGEST_HEADER = 1 << 24  # bytes of a page header: it may hold two values of the column as statistics
BOMB = 100_000  # times as large as the file: no codec of Parquet packs text so well


class Page(NamedTuple):
    """A page's header: sizes in bytes, values in a data page (0 in others), and the bytes of the header itself."""

    header: int
    packed: int
    unpacked: int
    values: int


class Column(NamedTuple):
    """A column chunk as the footer describes it: where it lies, and its totals."""

    start: int
    packed: int
    unpacked: int
    values: int


class _Reader:
    """Reads structs of Thrift's compact protocol from bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number in a header has no end")

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("a header has no end")
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        raw = self.varint()
        return (raw >> 1) ^ -(raw & 1)

    def struct(self, depth: int = 0) -> dict[int, object]:
        """The numbers, lists and structs of a struct, by field id; other values are passed over."""
        if depth > 16:
            raise ValueError("a header is nested too deeply")
        out: dict[int, object] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            out[field] = self._value(head & 15, depth)
        return out

    def _value(self, kind: int, depth: int) -> object:
        if kind in (1, 2):  # true, false
            return None
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.number()
        if kind == 7:
            self.skip(8)
            return None
        if kind == 8:
            self.skip(self.varint())
            return None
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a header has a field of the unknown type {kind}")

    def _list(self, depth: int) -> list[object]:
        head = self.byte()
        count = head >> 4 if head >> 4 != 15 else self.varint()
        if count > len(self.data) - self.at:
            raise ValueError("a list has no end")
        if head & 15 in (1, 2):  # in a list, true and false take a byte
            self.skip(count)
            return []
        return [self._value(head & 15, depth + 1) for _ in range(count)]

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("a header has no end")


def page_of(data: bytes) -> Page:
    """The header at the start of these bytes. Raises ValueError for bytes that are none."""
    reader = _Reader(data)
    found = reader.struct()
    unpacked, packed = (_whole(found.get(i)) for i in (2, 3))
    detail = found.get(5) or found.get(8)  # a data page, of version 1 or 2
    values = _whole(detail.get(1)) if isinstance(detail, dict) else 0
    return Page(reader.at, packed, unpacked, values)


def _whole(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a header says {value!r} where a size belongs")
    return value


def pages(file: IO[bytes], column: Column) -> Iterator[Page]:
    """The pages of a column chunk, until they hold all its values."""
    at, end, values = column.start, column.start + column.packed + SLACK, 0
    while values < column.values:
        file.seek(at)
        try:
            page = page_of(file.read(4096))
        except ValueError:
            file.seek(at)
            page = page_of(file.read(LARGEST_HEADER))
        at, values = at + page.header + page.packed, values + page.values
        if at > end:
            raise ValueError("a page does not lie within its column")
        yield page


def columns_of(footer: bytes) -> Iterator[Column]:
    """The column chunks of a file. Raises ValueError for bytes that are no footer.

    The footer is read here, because pyarrow ends the whole process over some damaged ones when it is asked for a column's sizes.
    """
    for group in _structs(_Reader(footer).struct().get(4)):
        for chunk in _structs(group.get(1)):
            found = chunk.get(3)
            if not isinstance(found, dict):
                raise ValueError("a column has no description, or it is encrypted")
            values, unpacked, packed, start = (_whole(found.get(i)) for i in (5, 6, 7, 9))
            before = found.get(11)  # the page of a dictionary; 0 is written for none
            yield Column(min(start, _whole(before)) if before else start, packed, unpacked, values)


def _structs(value: object) -> list[dict[int, object]]:
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise ValueError("the footer has no list of columns")
    return value


def refuse_oversized(path: Path) -> None:
    """Raises ValueError if a page would unpack to more bytes, or hold more values, than the file's footer says of its column."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        if file.read(4) != b"PAR1" or length > size - 8:
            raise ValueError("it does not end as such a file does")
        file.seek(size - 8 - length)
        for column in columns_of(file.read(length)):
            _check_column(file, column, size)


def _check_column(file: IO[bytes], column: Column, size: int) -> None:
    if column.start + column.packed > size or column.unpacked > BOMB * size:
        raise ValueError("a column does not lie within the file")
    seen_bytes = seen_values = 0
    for page in pages(file, column):
        seen_bytes, seen_values = seen_bytes + page.unpacked, seen_values + page.values
        if seen_bytes > column.unpacked + SLACK or seen_values > column.values:
            raise ValueError("a column would unpack to more than the file says")
