"""Turn spans of characters into spans of tokens, by the tokenizer's offsets, for any chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.columns import Span
from luthier.data.reading import shape_in
from luthier.data.rendering import Renderer, Segment
from luthier.support.errors import RecipeError

MARK = "\ue000"  # a character for private use, which no template writes


def covering(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """(first token, token after the last) that hold a character of [start, end); None if there is none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1] + 1) if inside else None


def still_there(before: str, after: str, given: Sequence[tuple[int, int, Any]]) -> bool:
    """True if spans of an answer mark the same characters, at the same places, in the answer made from it."""
    end = max((s[1] for s in given), default=0)
    return before[:end] == after[:end]


def placed(
    renderer: Renderer, key: str, values: Mapping[str, Any], given: Sequence[tuple[int, int, int]],
    segments: Sequence[Segment] | None, pieces: Sequence[Sequence[int]],
) -> list[Span]:  # fmt: skip
    """The spans of tokens for spans of characters in a row's answer.

    given     (start, end, type) in characters: of the completion, the last answer, or the text
    segments  the row's texts; None: the row is its text, tokenised in one piece with special tokens
    pieces    the ids of each segment; without segments, one list with the ids of the row
    Raises RecipeError with the row's key for a span that lies outside the answer or covers no token, and for an answer whose
    text is changed by rendering.
    """
    if not given:
        return []
    if segments is None:
        answer, text, at, before = values["text"], values["text"], 0, 0
        ids, special = pieces[0], True
    else:
        which = max(i for i, s in enumerate(segments) if s.supervised)
        answer, text, at = renderer.answer(values), segments[which].text, _begin(renderer, key, values, which)
        before, ids, special = sum(map(len, pieces[:which])), pieces[which], False
        if text[at : at + len(answer)] != answer:
            raise RecipeError(
                key,
                "has spans, but the chat template changes its answer's text",
                "mark spans in the text that the template writes",
            )
    found = renderer.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    added = len(ids) - len(found["input_ids"])  # a first token that the renderer adds
    if list(ids[added:]) != found["input_ids"]:
        raise RecipeError(key, "has spans, but its text is trained on within a prompt", "leave out data.spans")
    before += added
    out = []
    for start, end, kind in given:
        tokens = covering(found["offset_mapping"], at + start, at + end)
        if not 0 <= start < end <= len(answer) or tokens is None:
            raise RecipeError(
                key, f"has the span [{start}, {end}], its answer has {len(answer)} characters",
                "write start and end of at least one character of it",
            )  # fmt: skip
        out.append((before + tokens[0], before + tokens[1], kind))
    return out


def _begin(renderer: Renderer, key: str, values: Mapping[str, Any], which: int) -> int:
    """The number of characters before the answer in its segment; a mark in the answer's place finds it."""
    if "messages" not in values and (renderer.plain or shape_in(values) != "prompt and completion"):
        return 0
    if "messages" in values:
        *turns, last = values["messages"]
        if last["role"] != "assistant":
            raise RecipeError(key, "has spans, but does not end in an answer", "let an assistant's turn be its last")
        marked: dict[str, Any] = {**values, "messages": [*turns, {**last, "content": MARK}]}
    else:
        marked = {**values, "completion": MARK}
    return renderer.segments(marked)[which].text.find(MARK)
