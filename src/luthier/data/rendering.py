"""From a row to token ids: one function for training, evaluation, generation and export.

Prompt and answer are tokenised separately, at the point where generation will start. So the ids in training are the ids in use,
with any template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.batch import IGNORE, front_of
from luthier.data.reading import ANSWERED, answers_of, shape_in

Message = Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """A piece of text that is tokenised by itself."""

    text: str
    supervised: bool


class Renderer:
    """Rows to ids under one tokenizer.

    system    a system message for rows that have none
    plain     True: prompt and completion as bare text; False: through the chat template; None: through the template
              where the tokenizer has one
    """

    def __init__(self, tokenizer: Any, system: str | None = None, plain: bool | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.plain = (tokenizer.chat_template is None) if plain is None else plain
        self.stop_ids = stop_ids(tokenizer)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The row as a conversation, with luthier's system message if it has none."""
        turns = row.get("messages")
        if turns is None:
            turns = [{"role": "user", "content": row["prompt"]}]
            if row.get("completion") is not None:
                turns.append({"role": "assistant", "content": row["completion"]})
        turns = [dict(t) for t in turns]
        system = row.get("system") or self.system
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return turns

    def _template(self, turns: Sequence[Message], generate: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate)
        return text

    def segments(self, row: Mapping[str, Any]) -> list[Segment]:
        """The row as pieces of text, cut where an answer begins and where its stop token ends."""
        if shape_in(row, ANSWERED) == "text":
            return [Segment(row["text"] + self._eos(), True)]
        if self.plain and "messages" not in row:
            return [
                Segment(self._lead(row) + row["prompt"], False),
                Segment(row["completion"] + self._eos(), True),
            ]
        turns, out, done, whole = self.messages(row), [], "", None
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, after = self._template(turns[:i], True), self._template(turns[: i + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError(
                    f"the chat template rewrites earlier turns, so turn {i + 1} has no fixed prompt; "
                    "keep only the last answer of such rows"
                )
            answer = after[len(before) :]
            end = self._answer_end(answer)
            out += [Segment(before[len(done) :], False), Segment(answer[:end], True)]
            done = before + answer[:end]
            whole = after if i == len(turns) - 1 else None
        rest = (self._template(turns, False) if whole is None else whole)[len(done) :]
        if rest.strip():
            out.append(Segment(rest, False))
        return [s for s in out if s.text]

    def _answer_end(self, answer: str) -> int:
        """The position after the stop token: text that a template puts after it (a newline) does not belong to the answer."""
        stops = [self.tokenizer.decode([i]) for i in self.stop_ids]
        ends = [answer.rfind(s) + len(s) for s in stops if s and s in answer]
        return max(ends, default=len(answer))

    def _lead(self, row: Mapping[str, Any]) -> str:
        system = row.get("system") or self.system
        return f"{system}\n\n" if system else ""

    def _eos(self) -> str:
        return self.tokenizer.eos_token or ""

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of every segment of every row, from one call of the tokenizer, which works in threads.

        The tokenizer's first token is added to plain text only; a chat template writes its own.
        """
        texts = [segment.text for row in rows for segment in row]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        bos = self.tokenizer.bos_token_id
        adds = self.plain and getattr(self.tokenizer, "add_bos_token", False) and bos is not None
        out = [[next(ids) for _ in row] for row in rows]
        for pieces in out if adds else []:
            if pieces:
                pieces[0] = [bos, *pieces[0]]
        return out

    def training_row(self, segments: Sequence[Segment], pieces: Sequence[Sequence[int]], key: str) -> dict[str, Any]:
        """ids, aligned labels, and the per-token column "prompt" of a row's encoded segments."""
        ids: list[int] = []
        labels: list[int] = []
        for segment, piece in zip(segments, pieces, strict=True):
            ids += piece
            labels += piece if segment.supervised else [IGNORE] * len(piece)
        front = front_of(labels)
        return {"ids": ids, "labels": labels, "key": key, "token": {"prompt": [1] * front + [0] * (len(ids) - front)}}

    def render(self, row: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A training row."""
        segments = self.segments(row)
        return self.training_row(segments, self.encode([segments])[0], key)

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The ids that generation starts from. If the row ends in an answer, these are the ids before it in training."""
        if self.plain and "messages" not in row:
            return self.encode([[Segment(self._lead(row) + row["prompt"], False)]])[0][0]
        turns = self.messages(row)
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        segments = self.segments({"messages": [*turns, {"role": "assistant", "content": "x"}]})
        return [i for piece in self.encode([segments[:-1]])[0] for i in piece]

    def answer(self, row: Mapping[str, Any]) -> str:
        """The text to compare generation with: the last answer, the completion, or all of a plain text."""
        text: str = row["messages"][-1]["content"] if "messages" in row else answers_of(row, ANSWERED)[0]
        return text


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that stand for no text: the named ones, and all that were added as special."""
    return {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a turn: the end of text, and the markers that templates use for it."""
    known = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[t] for t in known if t in vocabulary}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))
