"""Rows to training rows: rendered, measured, and every fault counted before any work starts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from luthier.data import rendering, store
from luthier.data.batch import IGNORE, front_of
from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.data.store import Row, Rows, TokenRows
from luthier.support.cache import key_of
from luthier.support.errors import RecipeError
from luthier.support.sources import code_key


@dataclass
class Census:
    """What was found in a set of rows."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    length_99: int = 0  # tokens that would hold 99% of the rows whole
    too_long: int = 0
    cut: int = 0
    dropped: int = 0
    unsupervised: int = 0
    duplicates: int = 0
    without_stop: int = 0
    doubled_bos: int = 0
    prompt_no_prefix: int = 0


@dataclass(frozen=True)
class Prepared:
    """Training rows with their census and a hash of their content."""

    rows: TokenRows
    census: Census
    digest: str


class Fit(NamedTuple):
    """What a row must fit into, and what to do where it does not."""

    max_length: int
    on_long: str = "refuse"
    on_unsupervised: str = "refuse"


class RowMaker(Protocol):
    """Makes training rows of rows; every task has one."""

    @property
    def answers(self) -> bool:
        """Do rows end in answers? Then their stop tokens and their edge with the prompt are looked at."""

    @property
    def key(self) -> str:
        """Changes with all that decides what comes out, beside the rows, the tokenizer and the template."""

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        """A training row of each, as `collate` takes it."""

    def supervised(self, item: Mapping[str, Any]) -> int:
        """How many tokens (or classes) of a training row are learnt."""

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        """The training row cut to `limit` tokens."""


class AnswerRows:
    """Training rows of text: answers after their prompts, or the text itself."""

    answers = True

    @property
    def key(self) -> str:
        return "answers"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        segments = [_segments(r, renderer) for r in rows]
        pieces = renderer.encode(segments)
        return [renderer.training_row(s, p, r.key) for r, s, p in zip(rows, segments, pieces, strict=True)]

    def supervised(self, item: Mapping[str, Any]) -> int:
        return sum(y != IGNORE for y in item["labels"])

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        return shortened(item, limit, how)


def _segments(row: Row, renderer: Renderer) -> list[rendering.Segment]:
    try:
        return renderer.segments(row.values)
    except ValueError as error:
        raise RecipeError(row.key, str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):  # a template's own refusal: roles out of order, say
            raise RecipeError(row.key, f"the chat template refuses it ({error})") from error
        raise


ANSWERS = AnswerRows()


def prepare(
    rows: Rows | Sequence[Row], renderer: Renderer, *, max_length: int, on_long: str = "refuse", on_unsupervised: str = "refuse",
    maker: RowMaker = ANSWERS, tick: Tick = no_tick,
) -> Prepared:  # fmt: skip
    """Render every row and deal with the ones that do not fit.

    rows    from a file: the result is kept in the cache; a plain list: it stays in memory
    maker   of the task: makes the training rows
    Raises RecipeError naming the first row and the remedy where a fault is to be refused.
    """
    fit = Fit(max_length, on_long, on_unsupervised)
    work = _Preparation(renderer, fit, maker, tick)
    key = None
    if isinstance(rows, Rows):
        key = key_of(
            "tokens",
            rows.digest,
            _tokenizer_key(renderer),
            renderer.system,
            renderer.plain,
            fit,
            maker.key,
            code_key(__name__),
        )
    made = store.stored(key, store.TOKEN_SCHEMA, work.batches(rows), work.notes)
    census = Census(**made.notes["census"])
    _refuse_long(census, fit, made.notes["seen"])
    if census.rows and maker.answers and census.without_stop == census.rows:
        raise RecipeError(
            "data.train", "no answer ends in a stop token, so the tuned model would never stop",
            "use a chat template or a tokenizer with an end token",
        )  # fmt: skip
    return Prepared(TokenRows(made.table), census, made.notes["digest"])


def _tokenizer_key(renderer: Renderer) -> str:
    t = renderer.tokenizer
    return key_of(t.backend_tokenizer.to_str(), t.chat_template, str(t.special_tokens_map), renderer.stop_ids)


def _refuse_long(census: Census, fit: Fit, seen: int) -> None:
    if census.too_long and fit.on_long == "refuse":
        raise RecipeError(
            "data.max_length",
            f"{census.too_long} of {seen} rows are longer than {fit.max_length} tokens, the longest has {census.longest}",
            f"{census.length_99} would keep 99% whole and {census.longest} all; "
            "or set data.on_long: drop, trim_prompt or trim_end",
        )


class _Preparation:
    """One pass over rows: batches of training rows come out, counts stay."""

    def __init__(self, renderer: Renderer, fit: Fit, maker: RowMaker, tick: Tick) -> None:
        self.renderer, self.fit, self.maker, self.tick = renderer, fit, maker, tick
        self.census, self.digest = Census(), hashlib.sha256()
        self.lengths, self.hashes = array("q"), array("Q")

    def batches(self, rows: Sequence[Row]) -> Iterator[pa.RecordBatch]:
        source, done = iter(rows), 0
        while part := list(islice(source, store.BATCH)):
            self.tick("rendering", done, part[0].key)
            done += len(part)
            kept = [x for x in map(self._fitted, part, self.maker.made(part, self.renderer)) if x is not None]
            self._measure(kept)
            if kept:
                yield store.token_batch(kept)

    def notes(self) -> dict[str, Any]:
        lengths = np.sort(np.frombuffer(self.lengths, dtype=np.int64))
        found = replace(
            self.census,
            longest=int(lengths[-1]) if len(lengths) else 0,
            length_99=int(lengths[max(0, int(len(lengths) * 0.99) - 1)]) if len(lengths) else 0,
            duplicates=len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.uint64))),
        )
        return {"census": asdict(found), "digest": self.digest.hexdigest(), "seen": len(lengths)}

    def _fitted(self, row: Row, item: dict[str, Any]) -> dict[str, Any] | None:
        """The row as it will be trained on, or None where it is left out."""
        census, n = self.census, len(item["ids"])
        self.lengths.append(n)
        if n > self.fit.max_length:
            census.too_long += 1
            if self.fit.on_long in ("refuse", "drop"):
                census.dropped += self.fit.on_long == "drop"
                return None
            census.cut += 1
            item = self.maker.shortened(item, self.fit.max_length, self.fit.on_long)
        if not self.maker.supervised(item):
            census.unsupervised += 1
            if self.fit.on_unsupervised == "refuse":
                raise RecipeError(
                    row.key,
                    f"has no supervised token ({_why(row, item)})",
                    "mend the row, or set data.on_unsupervised: drop",
                )
            census.dropped += 1
            return None
        return item

    def _measure(self, items: list[dict[str, Any]]) -> None:
        census, bos = self.census, self.renderer.tokenizer.bos_token_id
        for item in items:
            ids, labels = item["ids"], item["labels"]
            supervised = [y for y in labels if y != IGNORE]
            census.rows += 1
            census.tokens += len(ids)
            census.supervised += self.maker.supervised(item)
            census.doubled_bos += bos is not None and ids[:2] == [bos, bos]
            if self.maker.answers:
                census.without_stop += supervised[-1] not in self.renderer.stop_ids
            content = array("i", ids).tobytes()
            self.hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
            self.digest.update(content)
        if self.maker.answers and items:
            self._count_moved_edges(items)

    def _count_moved_edges(self, items: list[dict[str, Any]]) -> None:
        """Rows whose prompt would have other ids if prompt and answer were tokenised in one piece."""
        t = self.renderer.tokenizer
        whole = t(t.batch_decode([x["ids"] for x in items]), add_special_tokens=False)["input_ids"]
        for item, other in zip(items, whole, strict=True):
            front = front_of(item["labels"])
            self.census.prompt_no_prefix += other[:front] != item["ids"][:front]


def shortened(item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
    """The row cut to `limit` tokens: "trim_prompt" before its answer, "trim_end" behind."""
    over = len(item["ids"]) - limit
    front = sum(item["token"]["prompt"]) if "token" in item else 0
    # trim_prompt takes from the middle of what stands before the answer: its end holds the turn's opening.
    start = max(0, front - over - 8) if how == "trim_prompt" and front >= over else limit
    stop = start + over
    token = {k: [*v[:start], *v[stop:]] for k, v in item.get("token", {}).items()}
    ids, labels = item["ids"], item["labels"]
    return {**item, "ids": ids[:start] + ids[stop:], "labels": labels[:start] + labels[stop:], "token": token}


def _why(row: Row, item: dict[str, Any]) -> str:
    if not str(row.values.get("text", "text")).strip():
        return "its text is empty"
    if row.values.get("completion") == "" or (not item["ids"]):
        return "its answer is empty"
    if "messages" in row.values and not any(t["role"] == "assistant" for t in row.values["messages"]):
        return "it has no assistant turn"
    return "its answer was cut off or is empty"
