"""What an Arrow file would unpack to, read before anything is unpacked.

pyarrow allocates what a packed buffer says of itself: eight bytes before it. A single flipped bit there can ask for gigabytes.
So the messages of the file are walked first (Arrow's columnar format, "Encapsulated message format"; Message.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

CONTINUES = 0xFFFFFFFF  # stands before the length of a message since version 0.15
FOOTED = b"ARROW1\0\0"  # the start of a file with a footer; a stream starts with its first message
DICTIONARY, RECORDS = 2, 3  # kinds of messages that have a body
PACKED = 1000  # times: text packs less well than this
LARGEST = 1 << 26  # bytes of a message, without its body
FREE = 1 << 26  # bytes of a buffer that are never too many


class Buffer(NamedTuple):
    """A packed buffer: its bytes in the file, and the bytes that it says it unpacks to."""

    packed: int
    unpacked: int


class _Table:
    """A table of a flatbuffer: its fields by number."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.fields = at - struct.unpack_from("<i", data, at)[0]
        self.size = struct.unpack_from("<H", data, self.fields)[0]

    def place(self, field: int) -> int | None:
        """Where a field's value is; None if it has the default value."""
        entry = 4 + 2 * field
        if entry + 2 > self.size:
            return None
        offset = struct.unpack_from("<H", self.data, self.fields + entry)[0]
        return self.at + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        at = self.place(field)
        return 0 if at is None else int(struct.unpack_from(kind, self.data, at)[0])

    def table(self, field: int) -> _Table | None:
        at = self.place(field)
        return None if at is None else _Table(self.data, at + struct.unpack_from("<I", self.data, at)[0])

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structs of two long numbers."""
        at = self.place(field)
        if at is None:
            return []
        start = at + struct.unpack_from("<I", self.data, at)[0]
        count = struct.unpack_from("<I", self.data, start)[0]
        if 16 * count > len(self.data):
            raise ValueError("a list in a message has no end")
        flat = struct.unpack_from(f"<{2 * count}q", self.data, start + 4)
        return list(zip(flat[::2], flat[1::2], strict=True))


def packed_buffers(file: IO[bytes], size: int) -> Iterator[Buffer]:
    """The packed buffers of a file or a stream of this size. Raises ValueError where a message does not lie within it."""
    at = len(FOOTED) if file.read(len(FOOTED)) == FOOTED else 0
    while at + 4 <= size:
        file.seek(at)
        (length,) = struct.unpack("<I", file.read(4))
        if length == CONTINUES:
            (length,) = struct.unpack("<I", file.read(4))
        if not length:
            return
        start = file.tell() + length
        if length > LARGEST or start > size:
            raise ValueError("a message does not lie within the file")
        data = file.read(length)
        message = _Table(data, struct.unpack_from("<I", data)[0])
        body = message.number(3, "<q")
        if body < 0 or start + body > size:
            raise ValueError("the body of a message does not lie within the file")
        for offset, packed in _buffers(message):
            if offset < 0 or packed < 0 or offset + packed > body:
                raise ValueError("a buffer does not lie within its message")
            if packed >= 8:
                file.seek(start + offset)
                yield Buffer(packed, *struct.unpack("<q", file.read(8)))
        at = start + body


def _buffers(message: _Table) -> list[tuple[int, int]]:
    """(place in the body, bytes) of the buffers of a message, if they are packed."""
    kind, batch = message.number(1, "<B"), message.table(2)
    if kind == DICTIONARY and batch is not None:
        batch = batch.table(1)
    packed = kind in (DICTIONARY, RECORDS) and batch is not None and batch.place(3) is not None
    return batch.pairs(2) if packed and batch is not None else []


def refuse_oversized(path: Path) -> None:
    """Raises ValueError if a buffer would unpack to more than its packed bytes can hold."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            for buffer in packed_buffers(file, size):
                if buffer.unpacked > max(FREE, PACKED * buffer.packed):
                    raise ValueError("a column would unpack to more than its bytes can hold")
        except struct.error as error:
            raise ValueError(f"a message has no end ({error})") from error
