"""Turn spans of characters into spans of tokens, by the tokenizer's offsets, for any chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.columns import Span
from luthier.data.reading import ANSWERED, answers_of, shape_in
from luthier.data.rendering import Renderer, Segment
from luthier.data.template import MARK
from luthier.support.errors import RecipeError


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
        if "text" not in values:
            raise RecipeError(key, "has spans in characters, and words instead of a text", "leave out data.spans")
        answer, text, at = values["text"], values["text"], 0
        found = renderer.tokenizer(text, return_offsets_mapping=True)
        ids, offsets, before = found["input_ids"], found["offset_mapping"], 0
        written = list(pieces[0])
    else:
        which = max(i for i, s in enumerate(segments) if s.supervised)
        segment, ahead = segments[which], "".join(s.text for s in segments[:which])
        answer, text, at = answers_of(values, ANSWERED)[-1], segment.text, _begin(renderer, key, values, which)
        if text[at : at + len(answer)] != answer:
            raise RecipeError(
                key,
                "has spans, but the chat template changes its answer's text",
                "mark spans in the text that the template writes",
            )
        written = list(pieces[which][len(segment.before) : len(pieces[which]) - len(segment.after)])
        ids, offsets = _offsets(renderer, ahead, text, len(written))
        before = sum(map(len, pieces[:which])) + len(segment.before)
    if ids != written:
        raise RecipeError(key, "has spans, but its text is trained on within a prompt", "leave out data.spans")
    out = []
    for start, end, kind in given:
        tokens = covering(offsets, at + start, at + end)
        if not 0 <= start < end <= len(answer) or tokens is None:
            raise RecipeError(
                key, f"has the span [{start}, {end}], its answer has {len(answer)} characters",
                "write start and end of at least one character of it",
            )  # fmt: skip
        out.append((before + tokens[0], before + tokens[1], kind))
    return out


def _offsets(renderer: Renderer, ahead: str, text: str, count: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The last `count` ids of a text that stands after other text, and the characters of the text that each one holds.

    If a token would cross the edge, they are those of the text alone, as in rendering.
    """
    whole = renderer.tokenizer(ahead + text, add_special_tokens=False, return_offsets_mapping=True)
    places = whole["offset_mapping"][len(whole["input_ids"]) - count :]
    if not places or places[0][0] < len(ahead):
        whole, ahead = renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True), ""
        places = whole["offset_mapping"]
        return list(whole["input_ids"]), [(a, b) for a, b in places]
    return list(whole["input_ids"][-count:]), [(a - len(ahead), b - len(ahead)) for a, b in places]


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
