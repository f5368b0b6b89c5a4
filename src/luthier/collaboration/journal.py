"""Messages on disk, in the order of arrival. A restarted party continues from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luthier.collaboration.messages import Message, Refused, decode
from luthier.support.files import replaced, sweep, sync


class Journal:
    """A folder of messages. Each message is in it completely or not at all, even after a kill.

    limit  the largest payload in bytes that is read back
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)  # a write that was cut off was never acknowledged, so the sender still has the message
        self.count = len(list(folder.glob("*.message")))

    def append(self, message: Message) -> Path:
        """Write and sync. Once this returns, a power cut does not lose the message."""
        target = self.folder / f"{self.count:06d}.message"
        with replaced(target) as temporary:
            temporary.write_bytes(message.encode())
        sync(self.folder)
        self.count += 1
        return target

    def __iter__(self) -> Iterator[Message]:
        """All messages, oldest first. Raises Refused with the file name if a file was damaged."""
        for file in sorted(self.folder.glob("*.message")):
            try:
                yield decode(file.read_bytes(), self.limit)
            except Refused as error:
                raise Refused(error.name, f"{file}: {error}") from error
