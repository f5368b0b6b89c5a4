"""What travels between parties: a header in JSON and tensors in safetensors, versioned, capped in size, with a digest."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from luthier.model.fingerprint import Fingerprint
from luthier.support.errors import LuthierError

MAGIC = b"LUTHIER\x01"  # the last byte is the version
HEADER_LIMIT = 64 * 1024  # bytes
NAME = r"^\w[\w .-]{0,63}$"  # of a party: names of folders are made of it
TAKEN = ("report.html", "report.json", "so-far", "server")  # what lies beside those folders, and who makes them
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint16)  # that travel
Kind = Literal["update", "scalars", "state", "result", "refusal"]


class Refused(LuthierError):
    """A message that is not taken. `name` says why in one word, for logs and for the peer."""

    def __init__(self, name: str, what: str) -> None:
        self.name = name
        super().__init__(f"{name}: {what}")


def refuse_name(name: str) -> None:
    """Raises LuthierError for what cannot be a party's name."""
    if name.lower() in TAKEN:
        raise LuthierError(f"{name!r} is no name for a party: {', '.join(TAKEN)} are taken")
    if re.fullmatch(NAME, name) is None:
        raise LuthierError(
            f"{name!r} is no name for a party: take letters, digits, '_', '-', '.' and spaces, 64 at most"
        )


class Header(BaseModel, frozen=True, extra="forbid"):
    """What a message says of itself."""

    kind: Kind
    run: str
    """Digest of the contract it was made under."""
    round: int = Field(0, ge=0)
    sender: str = Field(pattern=NAME)
    nonce: str
    """Drawn anew for each message: the same nonce twice is a duplicate or a replay."""
    base: Fingerprint
    """Fingerprint of the model that the tensors change."""
    notes: dict[str, str | int | float] = {}
    """Small values that belong to the tensors: how many rows, which chart."""


class Message(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """A header and its payload as it travels."""

    header: Header
    payload: bytes

    @classmethod
    def of(
        cls, kind: Kind, run: str, sender: str, base: Fingerprint, tensors: Mapping[str, Tensor], *, round: int = 0,
        notes: Mapping[str, str | int | float] | None = None,
    ) -> Message:  # fmt: skip
        """A new message. Tensors are copied to the CPU."""
        payload = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
        header = Header(
            kind=kind,
            run=run,
            round=round,
            sender=sender,
            nonce=secrets.token_hex(16),
            base=base,
            notes=dict(notes or {}),
        )
        return cls(header=header, payload=payload)

    @property
    def digest(self) -> str:
        """SHA-256 over header and payload. It finds damage; it does not prove who sent the message."""
        return hashlib.sha256(_canonical(self.header) + self.payload).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Raises Refused for a payload that is no safetensors file, or numbers that no update is made of."""
        try:
            # Not torch.load: safetensors holds tensors alone, so that nothing of a stranger's bytes is unpickled or run.
            found = safetensors.torch.load(self.payload)
        except (SafetensorError, KeyError, ValueError) as error:
            raise Refused("payload", f"from {self.header.sender}: no safetensors ({error})") from error
        for name, t in found.items():
            if t.dtype not in NUMBERS:
                raise Refused(
                    "dtype", f"from {self.header.sender}: {name} is of {t.dtype}, which nothing here is made of"
                )
        return found

    def encode(self) -> bytes:
        """Bytes for a wire or a file."""
        head = json.dumps(
            {"header": self.header.model_dump(), "digest": self.digest, "size": len(self.payload)}
        ).encode()
        if len(head) > HEADER_LIMIT:
            raise ValueError(f"a header of {len(head)} bytes is over {HEADER_LIMIT}")
        return MAGIC + len(head).to_bytes(4, "little") + head + self.payload


def decode(data: bytes, limit: int) -> Message:
    """A message from bytes; nothing of the payload is looked at but its size and digest.

    limit  bytes of payload that are taken
    Raises Refused by name: version, truncated, header, size, digest.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise Refused("version", f"starts with {bytes(data[: len(MAGIC)])!r}, messages of this version with {MAGIC!r}")
    at = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : at], "little")
    if length > HEADER_LIMIT:
        raise Refused("header", f"{length} bytes where at most {HEADER_LIMIT} are taken")
    if len(data) < at + length:
        raise Refused("truncated", f"{len(data)} bytes end inside the header")
    head = _head(data[at : at + length])
    header, size = head.header, head.size
    if size > limit:
        raise Refused("size", f"from {header.sender}: a payload of {size} bytes where at most {limit} are taken")
    payload = data[at + length :]
    if len(payload) != size:
        raise Refused("truncated", f"from {header.sender}: {len(payload)} bytes of payload where {size} were announced")
    message = Message(header=header, payload=payload)
    if message.digest != head.digest:
        raise Refused("digest", f"from {header.sender}: header or payload were changed on the way")
    return message


class _Head(BaseModel, extra="forbid"):
    """What stands before the payload."""

    header: Header
    digest: str
    size: int = Field(ge=0)


def _head(data: bytes) -> _Head:
    try:
        return _Head.model_validate_json(data)
    except ValidationError as error:
        raise Refused("header", f"cannot be read ({' '.join(str(error).split())})") from error


def _canonical(header: Header) -> bytes:
    return json.dumps(header.model_dump(), sort_keys=True).encode()
