"""Make training rows from rows: render, measure, and count every fault before any work starts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from luthier.data import rendering, store
from luthier.data.batch import IGNORE, WEIGHT, predicted
from luthier.data.columns import Carried, Column, Survey
from luthier.data.mixture import Mix, Mixture
from luthier.data.reading import NOTHING, Tick, no_tick, told_in
from luthier.data.rendering import Renderer
from luthier.data.spans import placed
from luthier.data.store import Row, Rows, TokenRows
from luthier.data.tokens import tokenizer_key
from luthier.support.cache import key_of
from luthier.support.errors import RecipeError
from luthier.support.sources import code_key


@dataclass
class Census:
    """The numbers that were found in a set of rows."""

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
    stop_within: int = 0  # rows with a stop token within an answer, or twice at its end: their texts hold its name
    doubled_bos: int = 0
    prompt_no_prefix: int = 0
    empty_answers: int = 0  # rows with an answer that holds no text


@dataclass(frozen=True)
class Prepared:
    """Training rows with their census and a hash of their content."""

    rows: TokenRows
    census: Census
    digest: str

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name, rows and share of each source; empty for a single source."""
        mixture = self.rows.mixture
        return [] if mixture is None else mixture.table()

    @property
    def epoch_tokens(self) -> float:
        """Tokens of an epoch; of several sources, on average."""
        mixture = self.rows.mixture
        return float(self.census.tokens) if mixture is None else mixture.tokens(self.rows.lengths)


class Fit(NamedTuple):
    """The limits of a row, and what to do with rows beyond them.

    held  the rows are not trained on, so their answers may be empty
    """

    max_length: int
    on_long: str = "refuse"
    on_unsupervised: str = "refuse"
    held: bool = False


class RowMaker(Protocol):
    """Makes training rows from rows. Every task has one."""

    @property
    def answers(self) -> bool:
        """Whether rows end in answers. Then their stop tokens and the edge between prompt and answer are checked."""

    @property
    def key(self) -> str:
        """A key that changes with the settings that decide the result."""

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        """A training row for each row, as `collate` takes it."""

    def supervised(self, item: Mapping[str, Any]) -> int:
        """The number of supervised tokens (or classes) of a training row."""

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
        found = zip(rows, segments, renderer.encoded(segments), strict=True)
        stops = frozenset(renderer.stop_ids)
        items = [{**renderer.training_row(s, e.pieces, r.key), "moved": e.moved} for r, s, e in found]
        for item, parts in zip(items, segments, strict=True):
            item["stopped"] = len(parts) > 1 and _stops_within(
                item["labels"], stops
            )  # a plain text may hold many turns
        return items

    def supervised(self, item: Mapping[str, Any]) -> int:
        return sum(predicted(item))

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        return shortened(item, limit, how)


def _segments(row: Row, renderer: Renderer) -> list[rendering.Segment]:
    try:
        return renderer.segments(row.values)
    except rendering.Unrenderable as error:
        raise RecipeError(row.key, str(error)) from error


ANSWERS = AnswerRows()


def prepare(
    rows: Rows | Sequence[Row], renderer: Renderer, *, max_length: int, on_long: str = "refuse", on_unsupervised: str = "refuse",
    maker: RowMaker = ANSWERS, carried: Carried = NOTHING, mix: Mix | None = None, held: bool = False, tick: Tick = no_tick,
) -> Prepared:  # fmt: skip
    """Render every row and handle the rows that do not fit.

    rows     rows of a file are kept in the cache; a list of rows stays in memory
    maker    of the task; it makes the training rows
    carried  fields of the rows that become columns; the weights of `rows`, where they have any, become "weight"
    mix      how the rows' sources are mixed; None: each row once an epoch
    held     the rows are not trained on: an empty answer is then counted only; in training rows it counts as unsupervised
    Raises RecipeError with the first row and the remedy for a fault that is refused.
    """
    fit = Fit(max_length, on_long, on_unsupervised, held)
    work = _Preparation(renderer, fit, maker, _Columns(rows, carried), tick)
    key = None
    if isinstance(rows, Rows) and rows.on_disk:
        key = key_of(
            "tokens",
            rows.digest,
            [part.prefix for part in rows.parts],  # the same rows in another file have other keys
            tokenizer_key(renderer.tokenizer),
            renderer.stop_ids,
            renderer.ends,  # decide whether an answer that the template does not end gets an end token
            sorted(renderer.options.items()),
            renderer.system,
            renderer.plain,
            fit,
            maker.key,
            carried.content,
            code_key(__name__, type(maker).__module__),
        )
    made = store.stored(key, lambda: store.token_schema(work.columns.all), work.batches(rows), work.notes)
    census = Census(**made.notes["census"])
    _refuse_long(census, fit, made.notes["seen"])
    if census.rows and maker.answers and census.without_stop == census.rows:
        raise RecipeError(
            "data.train", "no answer ends in a stop token, so the tuned model would never stop",
            "use a chat template or a tokenizer with an end token",
        )  # fmt: skip
    done = TokenRows(made.table)
    if mix is not None and len(done):
        done.mixture = Mixture.of(done.keys, mix)
    return Prepared(done, census, made.notes["digest"])


def _refuse_long(census: Census, fit: Fit, seen: int) -> None:
    if census.too_long and fit.on_long == "refuse":
        raise RecipeError(
            "data.max_length",
            f"{census.too_long} of {seen} rows are longer than {fit.max_length} tokens, the longest has {census.longest}",
            f"{census.length_99} would keep 99% whole and {census.longest} all; "
            "or set data.on_long: drop, trim_prompt or trim_end",
        )


class _Columns:
    """The columns besides ids and labels, and how a row fills them. All rows are read at the first use."""

    def __init__(self, rows: Rows | Sequence[Row], carried: Carried) -> None:
        self.rows, self.carried = rows, carried
        self.weights = rows.weights if isinstance(rows, Rows) else None

    @cached_property
    def all(self) -> list[Column]:
        """Every column with its type. Raises RecipeError with the key of the first row that does not fit."""
        survey = Survey(self.carried)
        for row in self.rows if self.carried.fields else ():
            survey.look(row.key, row.values)
        found = survey.columns()
        for c in found:
            if c.name == WEIGHT and (c.level != "row" or c.width):
                raise RecipeError("data.keep", "weight is not a number in these rows", "rename it with data.columns")
        if self.weights is not None:
            found = [*(c for c in found if (c.level, c.name) != ("row", WEIGHT)), Column("row", WEIGHT)]
        return found

    @cached_property
    def _types(self) -> dict[str, int]:
        """The number of each label that is a text."""
        return {n: i for c in self.all if c.level == "span" for i, n in enumerate(c.names)}

    def given(self, row: Row) -> list[tuple[int, int, int]]:
        """A row's spans of characters, their labels as numbers."""
        assert self.carried.spans is not None
        spans = self.carried.value(row.key, row.values, self.carried.spans)
        return [(a, b, self._types[label] if isinstance(label, str) else label) for a, b, label in spans]

    def put(self, item: dict[str, Any], row: Row, place: int) -> None:
        """Fill the columns of the whole row; `place` is its number among the rows."""
        for column in self.all:
            if column.level == "span":
                continue
            if column.name == WEIGHT:
                value: Any = self._weight(row, place)
            else:
                value = self.carried.value(row.key, row.values, column.name)
            item.setdefault(column.level, {})[column.name] = value

    def _weight(self, row: Row, place: int) -> float:
        """The user's own weight times the curators'."""
        own = self.carried.value(row.key, row.values, WEIGHT) if WEIGHT in self.carried.keep else 1.0
        if own < 0:
            raise RecipeError(row.key, f"weight is {own}", "a weight is 0 or more")
        return own if self.weights is None else float(own) * float(self.weights[place])


class _Preparation:
    """One pass over rows: batches of training rows come out, counts stay."""

    def __init__(self, renderer: Renderer, fit: Fit, maker: RowMaker, columns: _Columns, tick: Tick) -> None:
        self.renderer, self.fit, self.maker, self.columns, self.tick = renderer, fit, maker, columns, tick
        self.census, self.digest, self.stops = Census(), hashlib.sha256(), frozenset(renderer.stop_ids)
        self.lengths, self.hashes = array("q"), array("Q")

    def batches(self, rows: Sequence[Row]) -> Iterator[pa.RecordBatch]:
        done = 0
        for part in store.chunks(iter(rows)):
            self.tick("rendering", done, part[0].key)
            rendered = self._rendered(part)
            if self.columns.all:
                for i, (row, item) in enumerate(zip(part, rendered, strict=True)):
                    self.columns.put(item, row, done + i)
            done += len(part)
            kept = [x for x in map(self._fitted, part, rendered) if x is not None]
            self._measure(kept)
            if kept:
                yield store.token_batch(kept, self.columns.all)

    def notes(self) -> dict[str, Any]:
        lengths = np.sort(np.frombuffer(self.lengths, dtype=np.int64))
        found = replace(
            self.census,
            longest=int(lengths[-1]) if len(lengths) else 0,
            length_99=int(lengths[max(0, int(len(lengths) * 0.99) - 1)]) if len(lengths) else 0,
            duplicates=len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.uint64))),
        )
        return {"census": asdict(found), "digest": self.digest.hexdigest(), "seen": len(lengths)}

    def _rendered(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Training rows, with spans of tokens where the rows bring spans of characters."""
        items, name = self.maker.made(rows, self.renderer), self.columns.carried.spans
        for row, item in zip(rows, items, strict=True) if name else ():
            segments = self.renderer.segments(row.values) if self.maker.answers else None
            pieces = [item["ids"]] if segments is None else self.renderer.encode([segments])[0]
            found = placed(self.renderer, row.key, row.values, self.columns.given(row), segments, pieces)
            item["span"] = {name: found}
        return items

    def _fitted(self, row: Row, item: dict[str, Any]) -> dict[str, Any] | None:
        """The row as it will be trained on; None if it is left out."""
        census, n = self.census, len(item["ids"])
        self.lengths.append(n)
        if n > self.fit.max_length:
            census.too_long += 1
            if self.fit.on_long in ("refuse", "drop"):
                census.dropped += self.fit.on_long == "drop"
                return None
            census.cut += 1
            item = self.maker.shortened(item, self.fit.max_length, self.fit.on_long)
        empty = self.maker.answers and any(not a.strip() for a in told_in(row.values))
        census.empty_answers += empty
        if not self.maker.supervised(item) or (empty and not self.fit.held):
            census.unsupervised += 1
            if self.fit.on_unsupervised == "refuse":
                raise RecipeError(
                    row.key,
                    f"has no supervised token ({_why(row, item)})",
                    "correct the row, or set data.on_unsupervised: drop",
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
                census.without_stop += supervised[-1] not in self.stops
                census.prompt_no_prefix += item["moved"]
                census.stop_within += item["stopped"]
            content = array("i", ids).tobytes()
            self.hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
            self.digest.update(b"%d " % len(ids) + content + array("i", labels).tobytes())
            self.digest.update(repr((item.get("row"), item.get("targets"))).encode())
            for c in self.columns.all:
                self.digest.update(repr(item[c.level][c.name]).encode())


def _stops_within(labels: Sequence[int], stops: frozenset[int]) -> bool:
    """True if a supervised stop token is followed by itself or by a supervised token that is no stop."""
    return any(y in stops and after != IGNORE and (after == y or after not in stops) for y, after in pairwise(labels))


def shortened(item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
    """The training row cut to `limit` tokens: "trim_prompt" before its answer if enough tokens are there, else at its end."""
    over = len(item["ids"]) - limit
    front = sum(item["token"]["prompt"]) if "prompt" in item.get("token", ()) else 0
    # trim_prompt cuts in the middle of the text before the answer: its end holds the opening of the turn.
    start = max(0, front - over - 8) if how == "trim_prompt" and front >= over else limit
    return without(item, start, start + over)


def without(item: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The training row without the tokens from `start` to `stop`, in its token columns and spans as well.

    A span keeps its remaining tokens, and is removed with the last of them.
    """

    def moved(at: int) -> int:
        return at if at <= start else max(start, at - (stop - start))

    out = {
        **item,
        "ids": item["ids"][:start] + item["ids"][stop:],
        "labels": item["labels"][:start] + item["labels"][stop:],
    }
    if "targets" in item:
        out["targets"] = item["targets"][:start] + item["targets"][stop:]
    if "token" in item:
        out["token"] = {k: [*v[:start], *v[stop:]] for k, v in item["token"].items()}
    if "span" in item:
        spans = {k: [(moved(a), moved(b), kind) for a, b, kind in v] for k, v in item["span"].items()}
        out["span"] = {k: [s for s in v if s[1] > s[0]] for k, v in spans.items()}
    return out


def _why(row: Row, item: dict[str, Any]) -> str:
    if not str(row.values.get("text", "text")).strip():
        return "its text is empty"
    if "tokens" in row.values:
        return "none of its words has a token"
    if not str(row.values.get("completion", "answer")).strip() or not item["ids"]:
        return "its answer is empty"
    empty = next((i for i, text in enumerate(told_in(row.values), start=1) if not text.strip()), None)
    if empty is not None:
        return f"answer {empty} of the conversation is empty; weight: 0 in its turn leaves it out"
    if "messages" in row.values and not any(t["role"] == "assistant" for t in row.values["messages"]):
        return "it has no assistant turn"
    if len(item["ids"]) == 1:
        return "it is a single token, with nothing before it to predict it from"
    return "its answer was cut off or is empty"
