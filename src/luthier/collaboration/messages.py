"""Messages between parties: a header in JSON and tensors in safetensors, with version, size limit and digest."""

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
NAME = r"^\w[\w .-]{0,63}$"  # of a party; folders get these names
# Other names in the results folder, and the sender of results.
TAKEN = ("report.html", "report.json", "so-far", "server")
# Dtypes that a message may hold.
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint16)
Kind = Literal["update", "scalars", "state", "result", "refusal"]


class Refused(LuthierError):
    """A message that is not accepted. `name` gives the reason in one word, for logs and for the sender."""

    def __init__(self, name: str, what: str) -> None:
        self.name = name
        super().__init__(f"{name}: {what}")


def refuse_name(name: str) -> None:
    """Raises LuthierError for a text that cannot be a party's name."""
    if name.lower() in TAKEN:
        raise LuthierError(f"{name!r} cannot be the name of a party: {', '.join(TAKEN)} are taken")
    if re.fullmatch(NAME, name) is None:
        raise LuthierError(
            f"{name!r} cannot be the name of a party: use letters, digits, '_', '-', '.' and spaces, 64 at most"
        )


class Header(BaseModel, frozen=True, extra="forbid"):
    """The header of a message."""

    kind: Kind
    run: str
    """Digest of the contract that the message belongs to."""
    round: int = Field(0, ge=0)
    sender: str = Field(pattern=NAME)
    nonce: str
    """A new random value for each message. The same nonce twice is a duplicate or a replay."""
    base: Fingerprint
    """Fingerprint of the model that the tensors change."""
    notes: dict[str, str | int | float] = {}
    """Small values that belong to the tensors, such as the number of rows."""


class Message(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """A header and its payload, as they are sent."""

    header: Header
    payload: bytes

    @classmethod
    def of(
        cls, kind: Kind, run: str, sender: str, base: Fingerprint, tensors: Mapping[str, Tensor], *, round: int = 0,
        notes: Mapping[str, str | int | float] | None = None,
    ) -> Message:  # fmt: skip
        """A new message. Tensors are copied to the CPU."""
        payload = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
        nonce = secrets.token_hex(16)
        header = Header(
            kind=kind, run=run, round=round, sender=sender, nonce=nonce, base=base, notes=dict(notes or {})
        )  # fmt: skip
        return cls(header=header, payload=payload)

    @property
    def digest(self) -> str:
        """SHA-256 over header and payload. It finds damage; it does not prove who sent the message."""
        return hashlib.sha256(_canonical(self.header) + self.payload).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors. Raises Refused if the payload is not safetensors, or has a dtype that no update has."""
        try:
            # Not torch.load: safetensors holds only tensors, so nothing of a stranger's bytes is unpickled or run.
            found = safetensors.torch.load(self.payload)
        except (SafetensorError, KeyError, ValueError) as error:
            raise Refused("payload", f"from {self.header.sender}: no safetensors ({error})") from error
        for name, t in found.items():
            if t.dtype not in NUMBERS:
                raise Refused("dtype", f"from {self.header.sender}: {name} is of {t.dtype}, which no update has")
        return found

    def encode(self) -> bytes:
        """The bytes for a network or a file."""
        head = json.dumps(
            {"header": self.header.model_dump(), "digest": self.digest, "size": len(self.payload)}
        ).encode()
        if len(head) > HEADER_LIMIT:
            raise ValueError(f"a header of {len(head)} bytes is over {HEADER_LIMIT}")
        return MAGIC + len(head).to_bytes(4, "little") + head + self.payload


def decode(data: bytes, limit: int) -> Message:
    """A message from bytes. Of the payload, only the size and the digest are read.

    limit  the largest payload in bytes that is accepted
    Raises Refused with one of these names: version, truncated, header, size, digest.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise Refused("version", f"starts with {bytes(data[: len(MAGIC)])!r}, messages of this version with {MAGIC!r}")
    at = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : at], "little")
    if length > HEADER_LIMIT:
        raise Refused("header", f"{length} bytes, but at most {HEADER_LIMIT} are accepted")
    if len(data) < at + length:
        raise Refused("truncated", f"{len(data)} bytes end inside the header")
    head = _head(data[at : at + length])
    header, size = head.header, head.size
    if size > limit:
        raise Refused("size", f"from {header.sender}: a payload of {size} bytes, but at most {limit} are accepted")
    payload = data[at + length :]
    if len(payload) != size:
        raise Refused("truncated", f"from {header.sender}: {len(payload)} bytes of payload, but {size} were announced")
    message = Message(header=header, payload=payload)
    if message.digest != head.digest:
        raise Refused("digest", f"from {header.sender}: header or payload were changed after sending")
    return message


class _Head(BaseModel, extra="forbid"):
    """The header and the sizes before the payload."""

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
