"""From a row to token ids: one function for training, evaluation, generation and export.

A row becomes one text, the text that the model's chat template writes, cut where answers begin and end. Its ids are those of the
whole text, as `apply_chat_template` and `tokenizer(text)` give them. The ids before an answer are always those of the prompt by
itself, because generation starts from them; where a token of the whole text would cross that edge, the answer is tokenised
as text that follows other text. So the ids in training are the ids in use, with any template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import TemplateError

from luthier.data.answers import THOUGHTS, Wrap, closing_in, opened_in, unwrapped, without_thought
from luthier.data.batch import IGNORE, front_of
from luthier.data.reading import ANSWERED, answers_of, shape_in
from luthier.data.tokens import Tokens, special_ids, stop_ids
from luthier.data.turns import ASSISTANT, calls_of, content_text, last_answer, supervised, template_turn, tools_of
from luthier.support.errors import LuthierError

__all__ = ["Encoded", "Renderer", "Segment", "Unrenderable", "special_ids", "stop_ids"]

MARK = "\ue000"  # a character for private use, which no template writes
Turn = Mapping[str, Any]


class Unrenderable(LuthierError):
    """A row that the chat template cannot write, or not so that it can be trained on."""


@dataclass(frozen=True)
class Segment:
    """A piece of a row's text.

    before, after  ids that stand around it and have no text: BOS, the end token of plain text
    """

    text: str
    supervised: bool
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Encoded(NamedTuple):
    """The ids of each segment of a row.

    moved  True if the ids of the whole text differ, because a token would cross the edge of a segment
    """

    pieces: list[list[int]]
    moved: bool


class Renderer:
    """Rows to ids under one tokenizer.

    system        a system message for rows that have none
    plain         True: prompt and completion as bare text; False: through the chat template; None: through the template
                  where the tokenizer has one
    ends          ids that end an answer, from the model's generation settings
    stop_strings  texts that end an answer, from the same place
    options       variables of the chat template, such as enable_thinking
    """

    def __init__(
        self, tokenizer: Any, system: str | None = None, plain: bool | None = None, ends: Sequence[int] = (),
        stop_strings: Sequence[str] = (), options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.system = tokenizer, system
        self.plain = (tokenizer.chat_template is None) if plain is None else plain
        self.ends, self.stop_strings = tuple(ends), tuple(stop_strings)
        self.options = dict(options or {})
        self.tokens = Tokens(tokenizer)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        last = self.tokens.last[-1:] if self.plain and self.tokenizer.eos_token_id is None else ()
        return tuple(sorted({*stop_ids(self.tokenizer, self.ends, self.wrap.tail), *last}))

    @cached_property
    def wrap(self) -> Wrap:
        """What the chat template writes around an answer."""
        if self.tokenizer.chat_template is None:
            return Wrap()
        asked = [{"role": "user", "content": "x"}]
        try:
            before = self._template(asked, True)
            after = self._template([*asked, {"role": ASSISTANT, "content": MARK}], False)
        except Unrenderable:  # it asks for more than a question; answers are then shown as they are written
            return Wrap()
        at, opened = after.find(MARK), opened_in(before)
        lead = after[len(before) : at] if after.startswith(before) and at >= len(before) else ""
        closes = THOUGHTS.get(opened) or closing_in(str(self.tokenizer.chat_template))
        return Wrap(lead, after[at + 1 :] if at >= 0 else "", opened, closes)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row as a conversation in the form for templates, with luthier's system message if it has none."""
        given = row.get("messages")
        if given is None:
            given = [{"role": "user", "content": row["prompt"]}]
            if row.get("completion") is not None:
                given.append({"role": ASSISTANT, "content": row["completion"]})
        turns = [template_turn(t) for t in given]
        system = row.get("system") or self.system
        if system and turns[0]["role"] not in ("system", "developer"):
            turns.insert(0, {"role": "system", "content": system})
        return turns

    def _template(self, turns: Sequence[Turn], generate: bool, tools: Sequence[Any] | None = None) -> str:
        """What the chat template writes. Raises Unrenderable with the template's own reason."""
        first = None
        for form in FORMS if any("tool_calls" in t or "content" not in t for t in turns) else FORMS[:1]:
            try:
                text: str = self.tokenizer.apply_chat_template(
                    [form(t) for t in turns],
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **self.options,
                )
            except (TemplateError, TypeError, ValueError) as error:
                first = first or error
                continue
            return text
        raise Unrenderable(f"the chat template refuses it ({_first_line(first)})") from first

    def templated(self, row: Mapping[str, Any]) -> bool:
        """True for a row that the chat template writes."""
        shape = shape_in(row, ANSWERED)
        return shape == "messages" or (not self.plain and shape != "text")

    def segments(self, row: Mapping[str, Any]) -> list[Segment]:
        """The row as pieces of text, cut where an answer begins and where its stop token ends."""
        first, end = self.tokens.first, self._end
        if shape_in(row, ANSWERED) == "text":
            return [Segment(row["text"], True, first, end)]
        if self.templated(row):
            return self._conversation(row)
        return [Segment(self._lead(row) + row["prompt"], False, first), Segment(row["completion"], True, (), end)]

    def _conversation(self, row: Mapping[str, Any]) -> list[Segment]:
        if self.tokenizer.chat_template is None:
            raise Unrenderable(
                "has messages, but this model has no chat template; write prompt and completion, or use a model with one"
            )
        turns, tools = self.messages(row), self._tools(row)
        given = row.get("messages") or turns
        trained = [supervised(t) for t in given]
        trained = [False] * (len(turns) - len(given)) + trained  # luthier's system message stands before
        last = max((i for i, t in enumerate(turns) if t["role"] == ASSISTANT), default=-1)
        whole, out, done = self._template(turns, False, tools), list[Segment](), 0
        for i, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            place = self._place(turns, i, whole, tools)
            if place is None and i == last == len(turns) - 1 and self.wrap.opened:
                return [*out, *self._thinking(turns, whole[:done], tools)]
            if place is None or place[0] < done:
                raise Unrenderable(self._why_unplaced(turns, i, whole, tools))
            start, end = place
            out += [Segment(whole[done:start], False), Segment(whole[start:end], trained[i])]
            done = end
        if whole[done:].strip():
            out.append(Segment(whole[done:], False))
        return [s for s in out if s.text]

    def _place(self, turns: Sequence[Turn], i: int, whole: str, tools: Sequence[Any] | None) -> tuple[int, int] | None:
        """Where the answer of turn i stands in the text of the whole conversation: from the prompt's end to its own end token.

        None if the prompt that generation would start from does not stand before the last answer.
        """
        before = self._template(turns[:i], True, tools) if i else None
        stable = before is not None and whole.startswith(before)
        if stable and before is not None:
            after = whole if i == len(turns) - 1 else self._template(turns[: i + 1], False, tools)
            if after.startswith(before):
                end = len(before) + self._answer_end(after[len(before) :])
                if whole.startswith(after[:end]):
                    return len(before), end
        if not stable and before is not None and i == len(turns) - 1:
            return None
        # The template writes this turn in another way once others follow it (it may leave a thought out): find it by its content.
        marked = self._template([*turns[:i], {"role": ASSISTANT, "content": MARK}, *turns[i + 1 :]], False, tools)
        at = marked.find(MARK)
        rest = marked[at + 1 :]
        if at < 0 or not whole.startswith(marked[:at]) or not whole.endswith(rest) or at + len(rest) > len(whole):
            return None
        lead = self.wrap.lead
        start = at - len(lead) if lead and whole[:at].endswith(lead) else at
        if stable and before is not None and len(before) <= at:
            start = len(before)
        stop = len(whole) - len(rest)
        return start, stop + self._stop_in(rest)

    def _thinking(self, turns: Sequence[Turn], done: str, tools: Sequence[Any] | None) -> list[Segment]:
        """The last answer with its thought, for a template that opens a thought in the prompt and leaves it out afterwards.

        done  the text before that is cut into segments already
        """
        last, opened = turns[-1], self.wrap.opened
        closes = THOUGHTS[opened]
        thought, _, answer = str(last.get("content", "")).rpartition(closes)
        told = last.get("reasoning_content") or last.get("reasoning") or last.get("thinking")
        if told:
            thought, answer = f"{told}\n", f"\n\n{answer}"
        elif not thought:
            raise Unrenderable(
                f"the chat template opens a thought at the end of the prompt ({opened}), and this answer has none, so the model "
                f"would be asked for something else than it is trained on; write {opened} ... {closes} before the answer, or set "
                "data.template: plain"
            )
        before = self._template(turns[:-1], True, tools)
        marked = self._template([*turns[:-1], {"role": ASSISTANT, "content": MARK}], False, tools)
        text = thought.lstrip().removeprefix(opened).lstrip() + closes + answer + marked.partition(MARK)[2]
        if not before.startswith(done):
            raise Unrenderable(self._why_unplaced(turns, len(turns) - 1, marked, tools))
        return [Segment(before[len(done) :], False), Segment(text[: self._answer_end(text)], True)]

    def _why_unplaced(self, turns: Sequence[Turn], i: int, whole: str, tools: Sequence[Any] | None) -> str:
        before = self._template(turns[:i], True, tools) if i else ""
        pairs = enumerate(zip(before, whole, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(before), len(whole)))
        return (
            f"the chat template asks for turn {i + 1} with {before[same : same + 40]!r}, but writes the finished turn with "
            f"{whole[same : same + 40]!r} in this place, so the prompt in use would differ from the one in training; "
            "use another template, or set data.template: plain"
        )

    def _tools(self, row: Mapping[str, Any]) -> list[Any] | None:
        """The row's tools. Raises Unrenderable for tools and calls that the template does not write."""
        tools = tools_of(row) if "messages" in row else None
        source = str(self.tokenizer.chat_template)
        if tools and "tools" not in source:
            raise Unrenderable(
                "has tools, but the model's chat template writes none; use a model whose template does, or leave them out"
            )
        if "tool_calls" not in source and any(calls_of(t) for t in row.get("messages") or ()):
            raise Unrenderable(
                "calls tools, but the model's chat template writes no tool_calls; use a model whose template does, or write "
                "the calls as content"
            )
        return tools

    def _answer_end(self, answer: str) -> int:
        """The position after the stop token: text that a template puts after it (a newline) does not belong to the answer."""
        tail = self.wrap.tail
        if tail and answer.endswith(tail) and (end := self._stop_in(tail)):
            return len(answer) - len(tail) + end
        ends = [answer.rfind(s) + len(s) for s in self._stop_texts if s in answer]
        return max(ends, default=len(answer))

    def _stop_in(self, tail: str) -> int:
        """The position after the first stop token of a text that begins after an answer; 0 if there is none."""
        found = [(tail.index(s), tail.index(s) + len(s)) for s in self._stop_texts if s in tail]
        return min(found)[1] if found else 0

    @cached_property
    def _stop_texts(self) -> list[str]:
        texts = (self.tokenizer.decode([i]) for i in self.stop_ids)
        return [t for t in texts if t.strip()]

    def _lead(self, row: Mapping[str, Any]) -> str:
        system = row.get("system") or self.system
        return f"{system}\n\n" if system else ""

    @property
    def _end(self) -> tuple[int, ...]:
        """Ids after an answer in plain text: those that the tokenizer puts after a text, or the end token."""
        eos = self.tokenizer.eos_token_id
        return self.tokens.last or (() if eos is None else (eos,))

    def bare(self, text: str) -> Segment:
        """A text that comes without a row; with the tokenizer's first token unless a chat template writes its own."""
        return Segment(text, False, self.tokens.first if self.plain else ())

    def encoded(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Token ids of every segment of every row."""
        texts = ["".join(s.text for s in row) for row in rows]
        cuts = [list(accumulate(len(s.text) for s in row)) or [0] for row in rows]
        found = zip(rows, self.tokens.fronts(texts, cuts), strict=True)
        return [self._pieces(row, fronts[: len(row)]) for row, fronts in found]

    def _pieces(self, row: Sequence[Segment], fronts: Sequence[list[int]]) -> Encoded:
        """The segments' ids, from the ids of the texts up to the end of each segment."""
        pieces, before, moved = [], list[int](), False
        for segment, front in zip(row, fronts, strict=True):
            if front[: len(before)] == before:
                piece = front[len(before) :]
            else:
                piece, moved = self.tokens.following(segment.text), True
            pieces.append([*segment.before, *piece, *segment.after])
            before = front
        return Encoded(pieces, moved)

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of every segment of every row."""
        return [e.pieces for e in self.encoded(rows)]

    def training_row(self, segments: Sequence[Segment], pieces: Sequence[Sequence[int]], key: str) -> dict[str, Any]:
        """ids, aligned labels, and the per-token column "prompt" of a row's encoded segments."""
        ids: list[int] = []
        labels: list[int] = []
        for segment, piece in zip(segments, pieces, strict=True):
            silent = 0 if not segment.supervised else len(segment.before)
            ids += piece
            labels += [IGNORE] * silent + list(piece[silent:]) if segment.supervised else [IGNORE] * len(piece)
        front = front_of(labels)
        return {"ids": ids, "labels": labels, "key": key, "token": {"prompt": [1] * front + [0] * (len(ids) - front)}}

    def render(self, row: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A training row."""
        segments = self.segments(row)
        return self.training_row(segments, self.encode([segments])[0], key)

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The ids that generation starts from. If the row ends in an answer, these are the ids before it in training."""
        if not self.templated({"prompt": "", "completion": "", **row}):
            return self.encode([[Segment(self._lead(row) + row["prompt"], False, self.tokens.first)]])[0][0]
        turns = self.messages(row)
        if turns[-1]["role"] == ASSISTANT:
            turns = turns[:-1]
        return self.tokens.bare([self._template(turns, True, self._tools(row))])[0]

    def answer(self, row: Mapping[str, Any]) -> str:
        """The text to compare generation with: the last answer, the completion, or all of a plain text.

        An answer that calls tools is the text that the template writes for the calls.
        """
        if shape_in(row, ANSWERED) != "messages":
            return self._right(answers_of(row, ANSWERED)[0])
        turns = row["messages"]
        last = last_answer(turns)
        turn = turns[-1 if last is None else last]
        if calls_of(turn):
            segments = self.segments({**row, "messages": turns[: turns.index(turn) + 1]})
            written = self.tokens.bare([segments[-1].text])[0]
            return self.answer_text(written)[0].strip()
        return self._right(content_text(turn.get("content")))

    def _right(self, text: str) -> str:
        return text if self.plain else without_thought(text, self.wrap)

    def answer_text(self, ids: Sequence[int]) -> tuple[str, str]:
        """(answer, thought) of the ids that a model wrote. The ids end at its stop token."""
        end = next((n for n, i in enumerate(ids) if i in self.stop_ids), len(ids))
        ids = [i for i in ids[:end] if i < self.tokens.size]  # a model whose vocabulary is padded may write others
        if self.plain or not self.wrap.is_text:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            wrap = Wrap() if self.plain else self.wrap
            space = wrap.tail[: len(wrap.tail) - len(wrap.tail.lstrip())]
            return str(text).removeprefix(wrap.lead).removesuffix(space), ""
        answer, thought = unwrapped(self.tokenizer.decode(ids, skip_special_tokens=False), self.wrap)
        special = special_ids(self.tokenizer)
        for mark in {self.tokenizer.decode([i]) for i in ids if i in special}:
            answer, thought = answer.replace(mark, ""), thought.replace(mark, "")
        return answer, thought


def _as_given(turn: Turn) -> dict[str, Any]:
    return dict(turn)


def _with_content(turn: Turn) -> dict[str, Any]:
    """With an empty content where there is none, for templates that always read it."""
    return {"content": "", **turn}


def _with_texts(turn: Turn) -> dict[str, Any]:
    """With the arguments of calls as texts, for templates that join them to other texts."""
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in turn.get("tool_calls", ())
    ]
    return {"content": "", **turn, **({"tool_calls": calls} if calls else {})}


FORMS = (_as_given, _with_content, _with_texts)


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
