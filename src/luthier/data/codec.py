"""Rows in another form for training; the model's answers are changed back into the form of the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Codec(Protocol):
    """The change that a curator makes to the form of rows, with its inverse."""

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row in the form that the model is trained on. A row without an answer (only a prompt) gives the model's prompt."""

    def decode(self, values: Mapping[str, Any], answer: str) -> str:
        """The model's answer to an encoded row, in the form of the original row's answer.

        values  the row before it was encoded
        """


@dataclass(frozen=True)
class Chain:
    """Several codecs in order; an empty chain changes nothing.

    name  changes with the codecs
    """

    codecs: Sequence[Codec] = ()
    name: str = ""

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Encode in the order of the recipe."""
        out = dict(values)
        for codec in self.codecs:
            out = codec.encode(out)
        return out

    def decode(self, values: Mapping[str, Any], answer: str) -> str:
        """Decode in reverse order; each codec gets the row that it had encoded."""
        steps, form = [], dict(values)
        for codec in self.codecs:
            steps.append((codec, form))
            form = codec.encode(form)
        for codec, before in reversed(steps):
            answer = codec.decode(before, answer)
        return answer
