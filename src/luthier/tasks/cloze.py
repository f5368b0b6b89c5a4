"""Sentences with a gap in which a word stands for a class: putting a text into a sentence, and the token of a word there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from luthier.data.batch import IGNORE
from luthier.data.prepare import without
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.support.errors import RecipeError


class Cloze(NamedTuple):
    """A sentence with {text} and {label}. `mask` is the text in the gap, None if the sentence ends before it."""

    prompt: str
    mask: str | None

    @property
    def stem(self) -> str:
        """The text before the gap, with an example text."""
        return self.prompt.partition("{label}")[0].replace("{text}", "x")

    def filled(self, text: str) -> Filled:
        """The sentence with this text."""
        front, _, back = self.prompt.partition("{label}")
        if self.mask is None:
            front, back = front.rstrip(" "), ""  # the space belongs to the next word
        marked, gap = front + (self.mask or "") + back, len(front)
        at = marked.index("{text}")
        gap += len(text) - len("{text}") if at < gap else 0
        whole = marked.replace("{text}", text, 1)
        return Filled(whole, (at, at + len(text)), (gap, gap + len(self.mask or "")))


class Filled(NamedTuple):
    """A sentence, and the places of the row's text and the gap in it, in characters."""

    whole: str
    text: tuple[int, int]
    gap: tuple[int, int]


def word_id(tokenizer: Any, stem: str, word: str, label: str) -> int:
    """The token of a word after this stem. Raises RecipeError, with its tokens, if it is not one token."""
    front = stem.rstrip(" ")
    before, whole = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (front, f"{front}{stem[len(front) :]}{word}")
    )
    new = whole[len(before) :]
    if whole[: len(before)] != before or len(new) != 1 or new[0] == tokenizer.unk_token_id:
        pieces = " ".join(tokenizer.convert_ids_to_tokens(new))
        what = f"{word!r} is not one token for this model, it is {pieces!r}"
        raise RecipeError(f"task.classification.words.{label}", what, "choose a word that is")
    return int(new[0])


@dataclass(frozen=True)
class ClozeRows:
    """Training rows of sentences with a gap. Row columns: "slot" (the position of the word) and "words" (each class's token)."""

    cloze: Cloze
    words: tuple[int, ...]
    labels: Mapping[str | int, int]
    labelled: bool
    answers: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return f"cloze {self.cloze} {self.words} {sorted(self.labels.items(), key=str)} {self.labelled}"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        filled = [self.cloze.filled(r.values["text"]) for r in rows]
        found = renderer.tokenizer([f.whole for f in filled], return_offsets_mapping=True) if rows else {}
        ids, offsets = found.get("input_ids", []), found.get("offset_mapping", [])
        return [self._made(r, f, i, o) for r, f, i, o in zip(rows, filled, ids, offsets, strict=True)]

    def _made(self, row: Row, filled: Filled, ids: list[int], offsets: list[tuple[int, int]]) -> dict[str, Any]:
        said = [i for i, (a, b) in enumerate(offsets) if a < b]  # tokens that the tokenizer adds have no characters
        if self.cloze.mask is None:
            slot = said[-1] if said else 0
            ids = ids[: slot + 1]  # tokens that a tokenizer adds after a whole text would be in the gap
        else:
            slot = next(i for i in said if offsets[i][0] <= filled.gap[0] and filled.gap[1] <= offsets[i][1])
        inside = [i for i in said if offsets[i][1] > filled.text[0] and offsets[i][0] < filled.text[1]]
        columns: dict[str, Any] = {"slot": slot, "words": list(self.words)}
        if self.labelled:
            columns["label"] = self.labels[row.values["label"]]
        span = (inside[0], inside[-1] + 1) if inside else (slot, slot)
        return {"ids": ids, "labels": [IGNORE] * len(ids), "key": row.key, "row": columns, "text_at": span}

    def supervised(self, item: Mapping[str, Any]) -> int:
        return 1

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        """Cut the text within the sentence, at its start ("trim_prompt") or its end. The rest of the sentence stays."""
        (start, stop), over = item["text_at"], len(item["ids"]) - limit
        if over > stop - start:
            rest = len(item["ids"]) - (stop - start)
            raise RecipeError(
                item["key"], f"the prompt alone has {rest} tokens, more than data.max_length = {limit}", "raise it"
            )
        a = start if how == "trim_prompt" else stop - over
        slot = item["row"]["slot"]
        row = {**item["row"], "slot": slot - over if slot >= a + over else slot}
        return {**without(item, a, a + over), "row": row, "text_at": (start, stop - over)}
