"""An update as the tensors of a message, and back."""

from __future__ import annotations

import json

from torch import Tensor

from luthier.collaboration.messages import Message, Refused
from luthier.update import Update
from luthier.update.forms import restore


def packed(update: Update) -> dict[str, Tensor]:
    """An update's tensors, under the names of its parts."""
    return {f"{i}.{n}": t for i, p in enumerate(update.parts) for n, t in p.tensors().items()}


def headers(update: Update) -> str:
    """What belongs to the tensors of each part, in JSON."""
    return json.dumps([[p.kind, p.header()] for p in update.parts])


def unpacked(message: Message) -> Update:
    """The update of a message. Raises Refused for tensors that are no update."""
    head, tensors = message.header, message.tensors()
    try:
        kinds = json.loads(str(head.notes.get("parts", "[]")))
        parts = []
        for i, (kind, header) in enumerate(kinds):
            mine = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            parts.append(restore(kind, mine, header))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused("form", f"from {head.sender}: its parts cannot be read ({error})") from error
    return Update(head.base, tuple(parts))
