"""From a row to token ids: one function for training, evaluation, generation and export.

A row becomes one text, the text that the model's chat template writes, cut where answers begin and end. Its ids are those of the
whole text, as `apply_chat_template` and `tokenizer(text)` give them. The ids before an answer are always those of the prompt by
itself, because generation starts from them; where a token of the whole text would cross that edge, the answer is tokenised
as text that follows other text. So the ids in training are the ids in use, with any template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from luthier.data.answers import Wrap, unwrapped, without_thought
from luthier.data.batch import IGNORE, front_of
from luthier.data.reading import ANSWERED, answers_of, shape_in
from luthier.data.template import Template, Unrenderable, check_calls
from luthier.data.tokens import Tokens, special_ids, stop_ids
from luthier.data.turns import ASSISTANT, calls_of, content_text, last_answer, supervised, template_turn

__all__ = ["Encoded", "Renderer", "Segment", "Unrenderable", "special_ids", "stop_ids"]


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
        self.template = None if tokenizer.chat_template is None else Template(tokenizer, self.options)
        self.tokens = Tokens(tokenizer)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        last = self.tokens.last[-1:] if self.plain and self.tokenizer.eos_token_id is None else ()
        return tuple(sorted({*stop_ids(self.tokenizer, self.ends, self.wrap.tail), *last}))

    @property
    def _chat(self) -> Template:
        if self.template is None:
            raise Unrenderable(
                "has messages, but this model has no chat template; write prompt and completion, or use a model with one"
            )
        if self.plain:
            raise Unrenderable(
                "has messages, which only a chat template writes, but data.template is plain; write prompt and completion, or "
                "leave data.template out"
            )
        return self.template

    @property
    def wrap(self) -> Wrap:
        """What the chat template writes around an answer."""
        return Wrap() if self.template is None else self.template.wrap

    @property
    def day(self) -> str:
        """The day that the chat template writes in its texts; "" for a template without a date."""
        return "" if self.template is None or self.template.day is None else self.template.day.isoformat()

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

    def templated(self, row: Mapping[str, Any]) -> bool:
        """True for a row that the chat template writes."""
        shape = shape_in(row, ANSWERED)
        return shape == "messages" or (not self.plain and shape != "text")

    def segments(self, row: Mapping[str, Any]) -> list[Segment]:
        """The row as pieces of text, cut where an answer begins and where its stop token ends."""
        if shape_in(row, ANSWERED) == "text":
            return [Segment(row["text"], True, self._first(row["text"]), self._end(row["text"]))]
        if self.templated(row):
            return self._conversation(row)
        return [self._prompt(row), Segment(row["completion"], True, (), self._end(row["completion"]))]

    def _conversation(self, row: Mapping[str, Any]) -> list[Segment]:
        template, turns = self._chat, self.messages(row)
        given = row.get("messages") or turns
        trained = [supervised(t) for t in given]
        trained = [False] * (len(turns) - len(given)) + trained  # luthier's system message stands before
        pieces = template.pieces(turns, template.tools_in(row), self._stop_texts)
        for text, turn in pieces:
            check_calls(text, turns[turn] if turn is not None else {})
        out = [Segment(p.text, p.turn is not None and trained[p.turn]) for p in pieces]
        eos = self.tokenizer.eos_token_id
        if pieces[-1].turn == len(turns) - 1 and eos in self.ends and not pieces[-1].text.endswith(self._stop_texts):
            out[-1] = replace(out[-1], after=(eos,))  # the template ends no answer, and generation stops at this token
        return out

    @cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        return tuple(t for t in map(self._written, self.stop_ids) if t.strip())

    @cached_property
    def _closing(self) -> str:
        """What the chat template writes between an answer and its end token."""
        tail = "" if self.plain else self.wrap.tail
        return tail[: min((tail.index(s) for s in self._stop_texts if s in tail), default=len(tail))]

    def _lead(self, row: Mapping[str, Any]) -> str:
        system = row.get("system") or self.system
        return f"{system}\n\n" if system else ""

    def _prompt(self, row: Mapping[str, Any]) -> Segment:
        text = self._lead(row) + row["prompt"]
        return Segment(text, False, self._first(text))

    def _first(self, text: str) -> tuple[int, ...]:
        """Ids before a plain text: those that the tokenizer puts there, unless the text begins with them itself.

        Texts that were written by a chat template do.
        """
        mark = self._marks(self.tokens.first)
        return () if mark and text.startswith(mark) else self.tokens.first

    def _end(self, text: str) -> tuple[int, ...]:
        """Ids after a plain text: what the tokenizer puts there, or the end token, unless the text ends with them itself."""
        eos = self.tokenizer.eos_token_id
        last = self.tokens.last or (() if eos is None else (eos,))
        mark = self._marks(last)
        return () if mark and text.endswith(mark) else last

    def _marks(self, ids: Sequence[int]) -> str:
        """The text that the tokenizer reads as these ids; empty if they are not all tokens that it finds in texts."""
        found = all(i in self.tokenizer.added_tokens_decoder for i in ids)
        return "".join(map(self._written, ids)) if found else ""

    def _written(self, i: int) -> str:
        """A token as it stands in a text. Decoding may write the marks of SentencePiece within added tokens as spaces."""
        added = self.tokenizer.added_tokens_decoder
        return str(added[i]) if i in added else self.tokenizer.decode([i])

    def bare(self, text: str) -> Segment:
        """A text that comes without a row; with the tokenizer's first token unless a chat template writes its own."""
        return Segment(text, False, self._first(text) if self.plain else ())

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
            return self.encode([[self._prompt(row)]])[0][0]
        turns = self.messages(row)
        if turns[-1]["role"] == ASSISTANT:
            turns = turns[:-1]
        return self.tokens.bare([self._chat.text(turns, True, self._chat.tools_in(row))])[0]

    def answer(self, row: Mapping[str, Any]) -> str:
        """The text to compare generation with: the last answer, the completion, or all of a plain text.

        An answer that calls tools is the text that the template writes for the calls.
        """
        if shape_in(row, ANSWERED) != "messages":
            return self._right(answers_of(row, ANSWERED)[0])
        turns = row["messages"]
        at = last_answer(turns)
        turns = turns if at is None else turns[: at + 1]
        turn = turns[-1]
        if calls_of(turn):
            template, last = self._chat, {**row, "messages": turns}
            pieces = template.pieces(self.messages(last), template.tools_in(last), self._stop_texts)
            written = self.tokens.bare([next(p.text for p in reversed(pieces) if p.turn is not None)])[0]
            self._refuse_cut(written)
            return self.answer_text(written)[0].strip()
        return self._right(content_text(turn.get("content")))

    def _refuse_cut(self, written: Sequence[int]) -> None:
        """Raises Unrenderable for a last answer with a token that ends answers, and more text after it."""
        inner = next((i for i, after in pairwise(written) if i in self.stop_ids and after not in self.stop_ids), None)
        if inner is not None:
            raise Unrenderable(
                f"ends in a call of a tool, within which the chat template writes {self.tokenizer.decode([inner])!r}; generation "
                "stops there, so the call cannot be compared; leave the row out of data.eval"
            )

    def _right(self, text: str) -> str:
        """An answer without what surrounds it: in plain text an end token that was written out, else the template's thoughts."""
        if not self.plain:
            return without_thought(text, self.wrap)
        return text.removesuffix(next((s for s in self._stop_texts if text.endswith(s)), ""))

    def answer_text(self, ids: Sequence[int], asked: Sequence[int] = ()) -> tuple[str, str]:
        """(answer, thought) of the ids that a model wrote. The ids end at its stop token.

        asked  the ids of its prompt; where they do not end in the header of an answer, the model writes it (after another answer)
        """
        end = next((n for n, i in enumerate(ids) if i in self.stop_ids), len(ids))
        ids = [i for i in ids[:end] if i < self.tokens.size]  # a model whose vocabulary is padded may write others
        if not self.plain:
            ids = ids[self._header_in(ids, asked) :]
        if self.plain or not self.wrap.is_text:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            wrap = Wrap() if self.plain else self.wrap
            return str(text).removeprefix(wrap.lead).removesuffix(self._closing), ""
        answer, thought = unwrapped(self.tokenizer.decode(ids, skip_special_tokens=False), self.wrap)
        answer, special = answer.removesuffix(self._closing), special_ids(self.tokenizer)
        for mark in {self.tokenizer.decode([i]) for i in ids if i in special}:
            answer, thought = answer.replace(mark, ""), thought.replace(mark, "")
        return answer, thought

    def _header_in(self, ids: Sequence[int], asked: Sequence[int]) -> int:
        """How many of the ids that a model wrote are the header of its answer, which its prompt does not end in."""
        for header in self._headers:
            room = 4 * len(header) + 8  # a character may take several ids
            found = [n for n in range(1, min(room, len(ids)) + 1) if self._read(ids[:n]) == header]
            if found and not self._read(asked[-room:]).endswith(header):
                return found[-1]
        return 0

    @cached_property
    def _headers(self) -> list[str]:
        """The header of an answer, and its ends that begin with an added token: it may begin with the end of the turn before."""
        if not self.wrap.header:
            return []
        whole = self._read(self.tokens.bare([self.wrap.header])[0])
        marks = [self._read([i]) for i in self.tokenizer.get_added_vocab().values()]
        starts = sorted({0, *(whole.index(m) for m in marks if m and m in whole)})
        return [h for h in (whole[n:] for n in starts) if h]

    def _read(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included, without white space around it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False)).strip()
