"""Rows in another form for training, and the model's answers back in the form of the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Codec(Protocol):
    """What a curator does to the form of rows, so that it can be undone in use."""

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the model is trained on it. A row without an answer (a bare prompt) gives what the model is asked."""

    def decode(self, values: Mapping[str, Any], answer: str) -> str:
        """The model's answer to an encoded row, in the form that the row's own answer has.

        values  the row before it was encoded
        """


@dataclass(frozen=True)
class Chain:
    """Several codecs one after another; none changes nothing.

    name  changes with what they do
    """

    codecs: Sequence[Codec] = ()
    name: str = ""

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """In the order of the recipe."""
        out = dict(values)
        for codec in self.codecs:
            out = codec.encode(out)
        return out

    def decode(self, values: Mapping[str, Any], answer: str) -> str:
        """In the reverse order, each with the row that it was given."""
        steps, form = [], dict(values)
        for codec in self.codecs:
            steps.append((codec, form))
            form = codec.encode(form)
        for codec, before in reversed(steps):
            answer = codec.decode(before, answer)
        return answer
