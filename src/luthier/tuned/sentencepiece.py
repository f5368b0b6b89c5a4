"""llama.cpp's tokenizer for SentencePiece vocabularies, in Python: to compare ids before a GGUF file is called done.

llama.cpp joins the pair with the best score, as SentencePiece does (llama-vocab.cpp, llm_tokenizer_spm). transformers applies a
list of merges. The two agree on vocabularies that SentencePiece trained, and need not agree on others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary.

    ids           piece -> id
    scores        by id; the larger is joined first
    whole         texts of control and added tokens, which are found in the text before anything else
    space_prefix  put a space before each stretch of text between such tokens
    """

    ids: Mapping[str, int]
    scores: Sequence[float]
    whole: Mapping[str, int]
    space_prefix: bool

    def encode(self, text: str) -> list[int]:
        """The ids that llama.cpp gives, without tokens before or after the text."""
        out: list[int] = []
        after_token = True
        for part, token in cut_at(text, sorted(self.whole, key=len, reverse=True)):
            if token:
                out.append(self.whole[part])
            else:
                prefix = " " if self.space_prefix and after_token else ""
                out += self._joined((prefix + part).replace(" ", SPACE))
            after_token = token
        return out

    def _joined(self, text: str) -> list[int]:
        """Neighbours are joined, best score first and from the left, until no two make a piece."""
        parts: list[str | None] = list(text)
        left, right = list(range(-1, len(parts) - 1)), [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(a: int, b: int) -> None:
            if a >= 0 and b >= 0:
                both = f"{parts[a]}{parts[b]}"
                if both in self.ids:
                    heapq.heappush(queue, (-self.scores[self.ids[both]], a, b, both))

        for i in range(1, len(parts)):
            offer(i - 1, i)
        while queue:
            _, a, b, both = heapq.heappop(queue)
            if parts[a] is None or parts[b] is None or f"{parts[a]}{parts[b]}" != both or right[a] != b:
                continue
            parts[a], parts[b] = both, None
            right[a] = right[b]
            if right[b] >= 0:
                left[right[b]] = a
            offer(left[a], a)
            offer(a, right[a])
        return [i for p in parts if p is not None for i in self._piece(p)]

    def _piece(self, piece: str) -> list[int]:
        """The piece's id, or those of its bytes."""
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids.get(f"<0x{b:02X}>", -1) for b in piece.encode()]


def cut_at(text: str, tokens: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Stretches of text, and the tokens between them (True). The first token of the list is cut out first."""
    if not text:
        return
    for i, token in enumerate(tokens):
        if token in text:
            before, _, after = text.partition(token)
            yield from cut_at(before, tokens[i + 1 :])
            yield token, True
            yield from cut_at(after, tokens[i:])
            return
    yield text, False
