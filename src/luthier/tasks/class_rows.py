"""Training rows of one or two texts with their class: as the tokenizer makes them, and as it cuts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from luthier.data.batch import IGNORE, TYPE_IDS
from luthier.data.prepare import without
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.support.errors import RecipeError

PAIR = "text_pair"  # the second text of a row


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """(tokens that stay of the first text, of the second): the longer one is cut until both are equal, then both.

    first, second  how many they have
    room           how many may stay; where it is odd, the first one keeps one less, unless it was the longer one
    Departs from slow tokenizers, which leave that odd token to the first text: this is the rule of the library tokenizers.
    """
    short, long = sorted((first, second))
    long = short if short > room else max(short, min(long, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


@dataclass(frozen=True)
class ClassRows:
    """Training rows of one or two texts with their class.

    labels     empty for rows without a class
    num_types  the number of token types that the model embeds; None or 0: it does not say, or embeds none
    """

    labels: Mapping[str | int, int]
    num_types: int | None = None
    answers: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return f"classes {sorted(self.labels.items(), key=str)} {self.num_types}"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        out = []
        for _, part in groupby(rows, key=lambda r: PAIR in r.values):
            some = list(part)
            found = renderer.tokenizer(*_texts(some))
            out += [self._made(row, found, i, renderer.tokenizer) for i, row in enumerate(some)]
        return out

    def _made(self, row: Row, found: Any, at: int, tokenizer: Any) -> dict[str, Any]:
        places = _places(row, found, at, tokenizer)
        return {**item_of(row, found, at, self.num_types), "row": self._columns(row), "texts_at": places}

    def _columns(self, row: Row) -> dict[str, int]:
        return {"label": self.labels[row.values["label"]]} if self.labels else {}

    def supervised(self, item: Mapping[str, Any]) -> int:
        return 1 if item["ids"] else 0  # an empty text, for a tokenizer without marks at its ends

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        return cut_ends(item, limit)


def item_of(row: Row, found: Any, at: int, num_types: int | None) -> dict[str, Any]:
    """A training row without labels, from what the tokenizer found: ids, and the token types where it gives them.

    num_types  as for ClassRows. Raises RecipeError for a type that the model does not embed.
    """
    ids = found["input_ids"][at]
    item = {"ids": ids, "labels": [IGNORE] * len(ids), "key": row.key}
    if TYPE_IDS not in found:
        return item
    types = found[TYPE_IDS][at]
    if num_types and max(types, default=0) >= num_types:
        what = f"its tokenizer gives tokens of the type {max(types)}, and the model embeds only {num_types} of them"
        raise RecipeError(row.key, what, "use the model's own tokenizer")
    return {**item, "token": {TYPE_IDS: types}}


def cut_ends(item: dict[str, Any], limit: int) -> dict[str, Any]:
    """The training row with `limit` tokens: the ends of its texts ("texts_at") are cut, special tokens around them stay.

    Raises RecipeError where these alone are too many.
    """
    places = item["texts_at"]
    given = [stop - start for start, stop in places]
    room = limit - (len(item["ids"]) - sum(given))
    if room < 0:
        what = f"its special tokens alone are {limit - room}, more than data.max_length = {limit}"
        raise RecipeError(item["key"], what, "raise it")
    stays = longest_first(given[0], given[1], room) if len(given) == 2 else (room,)
    for (start, stop), count in reversed(list(zip(places, stays, strict=True))):
        item = without(item, start + count, stop)
    return item


def spans_of(owners: Sequence[int | None], count: int) -> list[tuple[int, int]]:
    """(first token, token after the last) of each text; `owners` says whose each token is, None: a special one."""
    spans = ([i for i, owner in enumerate(owners) if owner == n] for n in range(count))
    return [(s[0], s[-1] + 1) if s else (0, 0) for s in spans]


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    """The first texts of these rows, and, if they have two, the second ones."""
    names = ("text", PAIR) if PAIR in rows[0].values else ("text",)
    return [[r.values[name] for r in rows] for name in names]


def _places(row: Row, found: Any, at: int, tokenizer: Any) -> list[tuple[int, int]]:
    """(first token, token after the last) of each text among the ids of a row."""
    texts = [row.values[n] for n in ("text", PAIR) if n in row.values]
    if tokenizer.is_fast:
        return spans_of(found.sequence_ids(at), len(texts))
    alone = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    ids, out, begin = found["input_ids"][at], [], 0
    for part in alone:
        start = next(i for i in range(begin, len(ids) + 1) if ids[i : i + len(part)] == part)
        out.append((start, begin := start + len(part)))
    return out
