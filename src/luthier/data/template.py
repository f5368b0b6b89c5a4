"""A model's chat template: what it writes for a conversation, and where the answers stand in that text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from luthier.data.answers import THOUGHTS, Wrap, closing_in, opened_in
from luthier.data.turns import ASSISTANT, calls_of, tools_of
from luthier.support.errors import LuthierError

MARK = "\ue000"  # a character for private use, which no template writes
OPEN, SHUT = "\ue002", "\ue003"  # stand around what a turn says, to find it again
FEW = 8  # answers of a conversation of which each one is placed by its own prompt
MARKED = {"role": ASSISTANT, "content": MARK}
PLAIN = "or write prompt and completion and set data.template: plain"
ASKED = {"role": "user", "content": "\ue001"}
CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
SOME_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
Turn = Mapping[str, Any]


class Unrenderable(LuthierError):
    """A row that the chat template cannot write, or not so that it can be trained on."""


class Piece(NamedTuple):
    """A part of the text of a conversation; `turn` is the place of the assistant's turn that it is, None for other text."""

    text: str
    turn: int | None = None


class Template:
    """The chat template of a tokenizer. It must have one.

    options  variables of the template, such as enable_thinking
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self.tokenizer, self.options = tokenizer, dict(options)
        self.source = str(tokenizer.chat_template)
        self.day = date.today() if "strftime_now" in self.source else None
        given = tokenizer.chat_template
        self._fixed = self._dated(given) if isinstance(given, str) else None

    def _dated(self, source: str) -> str:
        """A template with the beginning of today in place of the time, which would differ from one text of a row to the next."""
        now = datetime.combine(self.day or date.today(), time())
        return CLOCK.sub(lambda call: repr(now.strftime(call.group(2))), source)

    def text(self, turns: Sequence[Turn], generate: bool, tools: Sequence[Any] | None = None) -> str:
        """What the template writes; with `generate`, up to where an answer begins. Raises Unrenderable with its own reason."""
        first, special = None, any("tool_calls" in t or "content" not in t for t in turns)
        for form in FORMS if special else FORMS[:1]:
            try:
                return self._applied([form(t) for t in turns], generate, tools)
            except REFUSALS as error:
                first = first or error
        raise Unrenderable(f"the chat template refuses it ({_first_line(first)})") from first

    def _applied(self, turns: Sequence[dict[str, Any]], generate: bool, tools: Sequence[Any] | None = None) -> str:
        given = [_in_parts(t) for t in turns] if self._wants_parts else turns
        written: str = self.tokenizer.apply_chat_template(
            given,
            chat_template=self._fixed,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generate,
            **self.options,
        )
        return written

    @cached_property
    def _wants_parts(self) -> bool:
        """True for a template that writes contents in parts, and nothing of a content that is a text, as some for images do."""
        asked = [{"role": "user", "content": MARK}]

        def writes(turns: list[dict[str, Any]]) -> bool:
            try:
                written = self.tokenizer.apply_chat_template(turns, tokenize=False, **self.options)
            except REFUSALS:
                return False
            return MARK in written

        return not writes(asked) and writes([_in_parts(t) for t in asked])

    def tools_in(self, row: Mapping[str, Any]) -> list[Any] | None:
        """The row's tools. Raises Unrenderable for tools and calls that the template does not write."""
        tools = tools_of(row) if "messages" in row else None
        if tools and "tools" not in self.source:
            raise Unrenderable(
                "has tools, but the model's chat template writes none; use a model whose template does, or leave them out"
            )
        if "tool_calls" not in self.source and any(calls_of(t) for t in row.get("messages") or ()):
            raise Unrenderable(
                "calls tools, but the model's chat template writes no tool_calls; use a model whose template does, or write "
                "the calls as content"
            )
        return tools

    @cached_property
    def wrap(self) -> Wrap:
        """What the template writes around an answer. Empty if the template wants more than a question and an answer."""
        try:
            before = self.text([ASKED], True, self._needed)
            after = self.text([ASKED, MARKED], False, self._needed)
        except Unrenderable:
            return Wrap()
        opened = opened_in(before)
        closes = THOUGHTS.get(opened) or closing_in(self.source)
        try:
            answer = self.answer_after(before, [ASKED, MARKED], after, self._needed)
        except Unrenderable:  # without a thought, or in another place; each row is told so
            answer = MARK + after.partition(MARK)[2]
        lead, mark, tail = answer.partition(MARK)
        return Wrap(lead, tail, opened, closes, self.header) if mark else Wrap("", "", opened, closes, self.header)

    @cached_property
    def _needed(self) -> list[Any] | None:
        """Tools for a template that refuses conversations without any."""
        try:
            self.text([ASKED], False)
        except Unrenderable:
            return [SOME_TOOL]
        return None

    @cached_property
    def header(self) -> str:
        """What the template writes after a question to ask for an answer; "" if it writes nothing more."""
        try:
            bare, asked = self.text([ASKED], False, self._needed), self.text([ASKED], True, self._needed)
        except Unrenderable:
            return ""
        return asked[len(bare) :] if asked.startswith(bare) else ""

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """The added tokens, and what opens and closes thoughts."""
        words = {*self.tokenizer.get_added_vocab(), *THOUGHTS, *THOUGHTS.values()} - {""}
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))

    @cached_property
    def _units(self) -> re.Pattern[str]:
        """A mark, or one other character."""
        return re.compile(f"{self.marks.pattern}|.", re.DOTALL)

    def pieces(self, turns: Sequence[Turn], tools: Sequence[Any] | None, stops: Sequence[str]) -> list[Piece]:
        """The text of a conversation, cut where an answer begins and where its end token ends.

        Up to the last answer it is the prompt that generation would start from, also where the template writes a finished
        conversation differently: a thought that only the prompt opens, a system text that stands before the last question.
        stops  texts of the tokens that end an answer
        """
        count = len(turns)
        finished = _Cut(self, turns, tools, stops, False, {})
        if turns[-1]["role"] == ASSISTANT and count > 1:
            before, whole = finished.upto(count - 1, True), finished.whole
            if not whole.startswith(before):
                answer = self.answer_after(before, turns, whole, tools)
                answer = answer[: self.end_of(answer, turns[-1], stops)]
                asked = _Cut(self, turns[:-1], tools, stops, True, finished.known)
                return [*asked.pieces(), Piece(answer, count - 1)]
        return finished.pieces()

    def answer_after(self, before: str, turns: Sequence[Turn], whole: str, tools: Sequence[Any] | None) -> str:
        """The text of the last answer as it follows its prompt `before`; `whole` is the finished conversation.

        Raises Unrenderable for an answer that does not fit the prompt.
        """
        if whole.startswith(before):
            return whole[len(before) :]
        same = self.edge(before, whole)
        asked, written = before[same:], whole[same:]
        opened = opened_in(before)
        if opened:
            return self._with_thought(turns, opened, asked, written)
        self._refuse_closed(asked, written, turns)
        head = self._head(asked, whole[:same], turns, tools)
        if head is not None and not head.strip():
            head = written[: min(len(head), len(written) - len(written.lstrip()))]
        if head is None or not written.startswith(head):
            raise Unrenderable(unplaced(len(turns), asked, written))
        return written[len(head) :]

    def _refuse_closed(self, asked: str, written: str, turns: Sequence[Turn]) -> None:
        """Raises Unrenderable for a last answer with a thought after a prompt that closes its thought."""
        closes = closing_in(self.source)
        told = thought_of(turns[-1], closes) if closes and asked.rstrip().endswith(closes) else None
        if told and closes in written and told.strip() in written.partition(closes)[0]:
            raise Unrenderable(
                f"the answer of turn {len(turns)} has a thought, but the prompt of the chat template ends in {asked[-40:]!r}, so "
                "the model is asked for an answer without one; leave the thought out, or look for a variable of the template "
                "that allows thoughts and set it in data.template_options"
            )

    def _head(self, asked: str, same: str, turns: Sequence[Turn], tools: Sequence[Any] | None) -> str | None:
        """What a finished conversation writes before its last answer in place of the end of the prompt, after the same text.

        asked  the end of the prompt
        None if what other turns say would stand in it, since then the two differ in more than in how the turn begins.
        """
        marked = self.text([*turns[:-1], MARKED], False, tools)
        at = marked.find(MARK)
        if at < len(same) or not marked.startswith(same):
            return None
        lead = marked[len(same) : at]
        start, end = self._same_end(asked, lead)
        others = self.marks.sub("", lead[:start]) + self.marks.sub("", lead[end:])
        if any(c in others for c in map(_content, turns[:-1]) if c):
            return None
        if asked[-1:].isspace() and lead[end:].isspace():
            end = len(lead)
        return lead[:end]

    def _same_end(self, asked: str, lead: str) -> tuple[int, int]:
        """(start, end) in `lead` of the longest text that `asked` ends with, or (0, 0). Marks are not taken apart."""
        a, b = self._units.findall(asked), self._units.findall(lead)
        best, at = 0, 0
        for j in range(1, len(b) + 1):
            same = sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(reversed(a), reversed(b[:j]), strict=False)))
            if same > best:
                best, at = same, j
        return len("".join(b[: at - best])), len("".join(b[:at]))

    def _with_thought(self, turns: Sequence[Turn], opened: str, asked: str, written: str) -> str:
        """The last answer after a prompt that opens its thought.

        asked, written  what the prompt and the finished conversation hold from where they differ
        """
        closes, last = THOUGHTS[opened], turns[-1]
        if closes in written:
            return written[_overlap(asked, written) :].removeprefix(opened).lstrip("\n" if asked.endswith("\n") else "")
        told = thought_of(last, closes)
        if told is None:
            raise Unrenderable(
                f"the chat template opens a thought at the end of the prompt ({opened}), and this answer has none, so the model "
                f"would be asked for something else than it is trained on; write {opened} ... {closes} before the answer, with "
                f"nothing between them where it has no thought, {PLAIN}"
            )
        space = "" if written[:1].isspace() else "\n\n"
        return f"{told}\n{closes}{space}{written}"

    def edge(self, a: str, b: str) -> int:
        """The number of characters up to which two texts are equal, at most up to a mark that is equal in part."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for text in (a, b):
            for found in self.marks.finditer(text, max(0, same - 99)):
                if found.start() < same < found.end():
                    same = found.start()
                    break
        return same

    def end_of(self, answer: str, turn: Turn, stops: Sequence[str]) -> int:
        """The position after the stop token: text that a template puts after it (a newline) does not belong to the answer."""
        told = [_content(turn), *names_of(turn)[-1:]]
        said = max((answer.rfind(t) + len(t) for t in told if t and t in answer), default=0)
        opener = self._next_turn(answer, said, stops) if said else -1
        if said and (end := stop_in(answer[said : opener if opener >= 0 else None], stops)):
            return said + end
        if opener >= 0:
            return opener
        tail = self.wrap.tail
        if tail and answer.endswith(tail) and (end := stop_in(tail, stops)):
            return len(answer) - len(tail) + end
        return max((answer.rfind(s) + len(s) for s in stops if s in answer), default=len(answer))

    def _next_turn(self, text: str, start: int, stops: Sequence[str]) -> int:
        """The place after `start` where the next turn begins, if an added token begins the turns of this template; else -1."""
        marks = (m for m in self.marks.finditer(self.header) if m.group() not in stops)
        first = next(marks, None)
        if first is None or self.marks.sub("", self.header[: first.start()]).strip():
            return -1
        return text.find(first.group(), start)

    def end_in(self, rest: str, stops: Sequence[str]) -> int:
        """The position after the stop token of an answer in the text that follows it, the next turns included; 0 for none."""
        tail = self.wrap.tail[: stop_in(self.wrap.tail, stops)]
        if tail and rest.startswith(tail):
            return len(tail)
        space = len(rest) - len(rest.lstrip())
        return next((space + len(s) for s in stops if rest.startswith(s, space)), 0)


class _Cut:
    """Finds the answers in the text that the template writes for a conversation.

    generate  the text ends with the beginning of another answer
    known     texts of the first turns, by their number and `generate`
    """

    def __init__(
        self, template: Template, turns: Sequence[Turn], tools: Sequence[Any] | None, stops: Sequence[str], generate: bool,
        known: dict[tuple[int, bool], str],
    ) -> None:  # fmt: skip
        self.template, self.turns, self.tools, self.stops = template, turns, tools, stops
        self.generate, self.known = generate, known
        self.whole = self.upto(len(turns), generate)

    def upto(self, count: int, generate: bool) -> str:
        """What the template writes for the first turns."""
        if (count, generate) not in self.known:
            self.known[count, generate] = self.template.text(self.turns[:count], generate, self.tools)
        return self.known[count, generate]

    def pieces(self) -> list[Piece]:
        out, done, found = list[Piece](), 0, self._alike()
        for i, turn in enumerate(self.turns):
            if turn["role"] != ASSISTANT:
                continue
            start, end = found[i] if i in found else self._place(i, done)
            out += [Piece(self.whole[done:start]), Piece(self.whole[start:end], i)]
            done = end
        if self.generate or self.whole[done:].strip():
            out.append(Piece(self.whole[done:]))
        return [p for p in out if p.text]

    def _alike(self) -> dict[int, tuple[int, int]]:
        """Places of answers in a long conversation, by their turns.

        Asking the template for the prompt of every answer takes a time that grows with the square of the turns. Here it is asked
        for two of those that stand between equal roles and hold the same things. If it writes the same text around both, the
        others are what stands in this text too.
        """
        out = dict[int, tuple[int, int]]()
        if sum(t["role"] == ASSISTANT for t in self.turns) <= FEW:
            return out
        gaps = self._gaps()
        kinds = dict[object, list[int]]()
        for i in gaps:
            held = sorted(k for k, v in self.turns[i].items() if v and k != "content"), self._reads_like(i)
            kinds.setdefault(repr((self.turns[i - 1]["role"], self.turns[i + 1]["role"], held)), []).append(i)
        for kind in kinds.values():
            first, other = kind[0], kind[-1]
            frames = set[tuple[str, str, str]]()
            for i in {first, other} if len(kind) > 2 else ():
                start, end = out[i] = self._place(i, gaps[i][0])
                stop = next((s for s in self.stops if self.whole.endswith(s, start, end)), "")
                frames.add((self.whole[gaps[i][0] : start], stop, self.whole[end : max(end, gaps[i][1])]))
            if len(frames) != 1:
                continue
            head, stop, tail = frames.pop()
            for i in kind[1:-1]:
                text = self.whole[gaps[i][0] : gaps[i][1]]
                if text.startswith(head) and text.endswith(stop + tail) and len(text) > len(head + stop + tail):
                    out[i] = gaps[i][0] + len(head), gaps[i][1] - len(tail)
        return out

    def _reads_like(self, i: int) -> list[str]:
        """What a template may look for in the content of turn i: whether there is any, white space at its edges, and marks."""
        said = str(self.turns[i].get("content", ""))
        edges = [
            said[:1] if said[:1].isspace() else "",
            said[-1:] if said[-1:].isspace() else "",
            "x" if said.strip() else "",
        ]
        return [*edges, *sorted({m.group() for m in self.template.marks.finditer(said)})]

    def _gaps(self) -> dict[int, tuple[int, int]]:
        """(start, end) of the text between what the turns before and after an answer say, by the turn of the answer.

        Empty for a template that does not write what turns say as it stands, each once and in order.
        """
        said = [i for i, t in enumerate(self.turns) if t["role"] != ASSISTANT and _content(t)]
        fenced = [{**t, "content": _fenced(str(t["content"]))} if i in said else t for i, t in enumerate(self.turns)]
        try:
            texts = re.split(f"[{OPEN}{SHUT}]", self.template.text(fenced, self.generate, self.tools))
        except Unrenderable:
            return {}
        contents = [_content(self.turns[i]) for i in said]
        if "".join(texts) != self.whole or texts[1::2] != contents:
            return {}
        ends = list(accumulate(map(len, texts)))  # texts[2 * n + 1] is the n-th content
        place = {i: (ends[2 * n], ends[2 * n + 1]) for n, i in enumerate(said)}
        answers = (i for i, t in enumerate(self.turns) if t["role"] == ASSISTANT)
        return {i: (place[i - 1][1], place[i + 1][0]) for i in answers if i - 1 in place and i + 1 in place}

    def _place(self, i: int, done: int) -> tuple[int, int]:
        """Where the answer of turn i stands: from the end of its prompt to its own end token.

        done  where the answer before it ends
        """
        before = self.upto(i, True) if i else None
        said = None if before is None else self._said(before, i)
        ways: tuple[Callable[[], tuple[int, int] | None], ...] = (
            lambda: self._stable(before, said), lambda: self._by_content(i, before),
            lambda: self._by_calls(i, before, said, done),
        )  # fmt: skip
        for way in ways:
            place = way()
            if place is not None and place[0] >= done:
                start, end = place
                ends = self.whole.endswith(tuple(self.stops), start, end)
                return start, end if ends else end + self.template.end_in(self.whole[end:], self.stops)
        if self._content_after_results(i, done):
            raise Unrenderable(
                f"the chat template writes the content of turn {i + 1} after the results of its calls, so the turn is no text in "
                "one piece; leave its content out, or write the content as a turn after the results"
            )
        if before is None or self.whole.startswith(before):
            raise Unrenderable(
                f"the chat template writes the answer of turn {i + 1} in another form once other turns follow it, so it is not "
                f"clear which text the model is trained on; let rows end in this turn, {PLAIN}"
            )
        self.template.answer_after(before, self.turns[: i + 1], self.upto(i + 1, False), self.tools)  # may say more
        same = self.template.edge(before, self.whole)
        raise Unrenderable(unplaced(i + 1, before[same:], self.whole[same:]))

    def _said(self, before: str, i: int) -> str | None:
        """The answer of turn i with its end token, as it is written when no turn follows."""
        turns = self.turns[: i + 1]
        try:
            said = self.template.answer_after(before, turns, self.upto(i + 1, False), self.tools)
        except Unrenderable:  # as the last turn it would not fit its prompt; as an earlier one it needs not
            return None
        return said[: self.template.end_of(said, turns[-1], self.stops)]

    def _stable(self, before: str | None, said: str | None) -> tuple[int, int] | None:
        """The usual way: the prompt stands at the beginning of the whole, and the answer follows it."""
        if before is None or said is None or not self.whole.startswith(before + said):
            return None
        return len(before), len(before) + len(said)

    def _by_content(self, i: int, before: str | None) -> tuple[int, int] | None:
        """For a template that writes this turn in another way once others follow it (it may leave a thought out)."""
        try:
            turns = [*self.turns[:i], MARKED, *self.turns[i + 1 :]]
            marked = self.template.text(turns, self.generate, self.tools)
        except Unrenderable:  # results of tools may only follow calls
            return None
        at = marked.find(MARK)
        rest, whole, lead = marked[at + 1 :], self.whole, self.template.wrap.lead
        if at < 0 or not whole.startswith(marked[:at]) or not whole.endswith(rest) or at + len(rest) > len(whole):
            return None
        start = at - len(lead) if lead and whole[:at].endswith(lead) else at
        if before is not None and len(before) <= at and whole.startswith(before):
            start = len(before)
        end = len(whole) - len(rest)
        if self._holds_results(i, whole[start:end]):
            return None
        return start, end + self.template.end_in(rest, self.stops)

    def _by_calls(self, i: int, before: str | None, said: str | None, done: int) -> tuple[int, int] | None:
        """For calls of tools, which no other content can replace where their results follow.

        The text that follows their own prompt is found again after the answer before it, or ends after the name of the last call.
        """
        names = names_of(self.turns[i])
        if not names:
            return None
        at = self.whole.find(said, done) if said else -1
        if said and at >= 0:
            return at, at + len(said)
        if before is None or not self.whole.startswith(before):
            return None
        named = self.whole.find(names[-1], len(before)) + len(names[-1])
        end = stop_in(self.whole[named:], self.stops)
        found = named >= len(before) + len(names[-1]) and end > 0
        return (
            (len(before), named + end)
            if found and not self._holds_results(i, self.whole[len(before) : named + end])
            else None
        )

    def _content_after_results(self, i: int, done: int) -> bool:
        """True if the content of turn i stands after the result of its first call in the text, not before."""
        said, names = _content(self.turns[i]), names_of(self.turns[i])
        result = next((_content(t) for t in self.turns[i + 1 : i + 2] if t["role"] == "tool"), "")
        if not (said and names and result):
            return False
        called = self.whole.find(names[0], done)
        told = self.whole.find(result, called)
        return 0 <= called < told and said not in self.whole[done:told] and said in self.whole[told:]

    def _holds_results(self, i: int, text: str) -> bool:
        """True if a text holds the result of a call of turn i, which the model does not write."""
        results = takewhile(lambda t: t["role"] == "tool", self.turns[i + 1 :])
        return any(c in text for c in map(_content, results) if c)


def stop_in(tail: str, stops: Sequence[str]) -> int:
    """The position after the first stop token of a text that begins after an answer, and after others that follow it directly.

    0 if there is none.
    """
    end = min(((tail.index(s), tail.index(s) + len(s)) for s in stops if s in tail), default=(0, 0))[1]
    while end and (more := [len(s) for s in stops if tail.startswith(s, end)]):
        end += max(more)
    return end


def names_of(turn: Turn) -> list[str]:
    """The names of the functions that a turn calls."""
    return [str(call["function"]["name"]) for call in turn.get("tool_calls", ())]


def thought_of(turn: Turn, closes: str) -> str | None:
    """The thought that stands in a turn by itself or before its content; "" for an empty one, None for none.

    closes  what closes a thought in the content
    """
    told = next((str(turn[n]) for n in ("reasoning_content", "reasoning", "thinking") if n in turn), None)
    if told is None and closes in _content(turn):
        told = _content(turn).rpartition(closes)[0].lstrip()
        told = told.removeprefix(
            next((o for o, c in THOUGHTS.items() if c == closes and told.startswith(o)), "")
        ).strip()
    return told


def _fenced(content: str) -> str:
    """A content with signs where its text begins and ends, within the white space around it."""
    text = content.strip()
    return content.replace(text, OPEN + text + SHUT, 1)


def _content(turn: Turn) -> str:
    return str(turn.get("content", "")).strip()


def check_calls(text: str, turn: Turn) -> None:
    """Raises Unrenderable for a turn with a call that the template did not write in its text."""
    for name in names_of(turn):
        if name not in text:
            raise Unrenderable(
                f"calls {name}, but the model's chat template writes no such call (some write one call a turn, "
                "or the call's id in place of its name); write the turn as the template expects it, or the calls as content"
            )


def unplaced(number: int, asked: str, written: str) -> str:
    """Why the answer of a turn has no place: its prompt and the finished conversation differ."""
    return (
        f"the chat template asks for turn {number} with {asked[:40]!r}, but writes the finished turn with "
        f"{written[:40]!r} in this place, so the prompt in use would differ from the one in training; "
        f"use another template, {PLAIN}"
    )


def _overlap(first: str, second: str) -> int:
    """The length of the longest text that `first` ends with and `second` begins with."""
    return next((n for n in range(min(len(first), len(second)), 0, -1) if first.endswith(second[:n])), 0)


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


def _in_parts(turn: Turn) -> dict[str, Any]:
    """With the content as a list of parts."""
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(turn)


FORMS = (_as_given, _with_content, _with_texts)
REFUSALS = (TemplateError, TypeError, ValueError)


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
