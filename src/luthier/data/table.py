"""A set of rows during curation: the decision about each row, with the reason. No row ever leaves the table."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from luthier.data import store
from luthier.data.store import Row, Rows
from luthier.support.errors import LuthierError

KEEP, DROP, REWRITE, SPLIT = 0, 1, 2, 3
DECISIONS = ("keep", "drop", "rewrite", "split")
SCHEMA = pa.schema(
    {
        "id": pa.int64(), "key": pa.string(), "parent": pa.int64(), "step": pa.string(), "decision": pa.string(),
        "score": pa.float64(), "reason": pa.string(), "weight": pa.float64(), "values": pa.large_string(),
    }
)  # fmt: skip
Reasons = str | Sequence[str]  # one for all rows, or one for each
Positions = Sequence[int] | np.ndarray


class Picture(NamedTuple):
    """The coordinates of a step's rows: points [M, 2] of the rows with these numbers, and names of the axes."""

    turn: int
    numbers: np.ndarray
    points: np.ndarray
    axes: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows with columns for the decisions about them. Each operation returns a new table; its rows are the M in the set.

    Operations take positions: places in `rows`, from 0 to M - 1. A reason is one text for all M rows, or one for each.

    entries   all N rows so far: the original ones, then those that curators made
    incoming  number of original rows
    live      [M] numbers of the entries in the set, in its order
    decision  [N] index into DECISIONS: in the set, left out, or replaced by the rows whose parent it is
    score     [N] the number that decided, NaN if there was none
    reason    [N] texts
    parent    [N] number of the entry that a row was made from, -1 for none
    turn      [N] the number of the step that decided last about an entry: 1 for the first step, 0 if no step has decided yet
    weight    [N] how much a row counts in training
    """

    entries: Rows
    incoming: int
    live: np.ndarray
    decision: np.ndarray
    score: np.ndarray
    reason: np.ndarray
    parent: np.ndarray
    turn: np.ndarray
    weight: np.ndarray
    steps: tuple[str, ...] = ()
    picture: Picture | None = None

    @classmethod
    def of(cls, rows: Rows | Sequence[Row]) -> Table:
        """The table of rows without decisions."""
        given = rows if isinstance(rows, Rows) else Rows.of(rows)
        n, none = len(given), np.full(len(given), "", dtype=object)
        weight = np.ones(n) if given.weights is None else given.weights
        return cls(
            given.weighing(None), n, np.arange(n), np.zeros(n, np.int8), np.full(n, np.nan), none, np.full(n, -1),
            np.zeros(n, np.int16), weight,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.live)

    @property
    def rows(self) -> Rows:
        """The rows in the set, read at first use."""
        whole = len(self.live) == len(self.entries) and bool((self.live == np.arange(len(self.live))).all())
        return self.entries if whole else self.entries.take(self.live)

    @property
    def weighed(self) -> Rows:
        """The rows in the set with their weights; without weights if all are 1."""
        weight = self.weight[self.live]
        return self.rows if bool((weight == 1).all()) else self.rows.weighing(weight)

    def at(self, step: str) -> Table:
        """The table with this step as the current one: further decisions are its decisions."""
        return replace(self, steps=(*self.steps, step))

    @property
    def step(self) -> str:
        """The name of the current step."""
        return self.steps[-1] if self.steps else "nobody"

    # --- operations ---

    def keep(self, positions: Positions, score: np.ndarray | None = None, reason: Reasons = "") -> Table:
        """Keep the rows at these positions and drop the others. Each of the M rows gets its score, of [M], and its reason."""
        inside = self._marked(positions)
        told = np.array(self._told(reason), dtype=object)
        told[~inside & (told == "")] = f"not chosen by {self.step}"
        decision = self.decision.copy()
        decision[self.live[~inside]] = DROP
        out = self._decided(self.live, told, score)
        return replace(out, live=self.live[inside], decision=decision)

    def drop(self, positions: Positions, reason: Reasons, score: np.ndarray | None = None) -> Table:
        """Drop the rows at these positions. Each of the M rows gets its score, of [M]; only dropped rows get their reason."""
        gone = self._marked(positions)
        told = np.array(self._told(reason), dtype=object)[gone]
        if not all(told) or (isinstance(reason, str) and not reason):
            raise LuthierError(f"{self.step}: drops rows without a reason; give one")
        decision = self.decision.copy()
        decision[self.live[gone]] = DROP
        scored = self if score is None else replace(self, score=_put(self.score, self.live, score))
        out = scored._decided(self.live[gone], told)
        return replace(out, live=self.live[~gone], decision=decision)

    def weigh(self, weights: np.ndarray, reason: Reasons = "weighed") -> Table:
        """Multiply the weight of every row; weights [M], 0 or more."""
        given = np.asarray(weights, dtype=np.float64)
        if given.shape != (len(self),) or not bool((np.isfinite(given) & (given >= 0)).all()):
            raise LuthierError(f"{self.step}: weights are not {len(self)} finite numbers of 0 or more")
        out = self._decided(self.live, reason)
        return replace(out, weight=_put(self.weight, self.live, self.weight[self.live] * given))

    def score_rows(self, score: np.ndarray, reason: Reasons = "") -> Table:
        """Only note a score [M] and a reason."""
        return self._decided(self.live, reason, score)

    def rewrite(self, values: Iterable[Mapping[str, Any] | None], reason: Reasons = "rewritten") -> Table:
        """Rewrite rows, which keep their keys; None leaves a row unchanged. Values are read one at a time."""
        return self._replaced((None if v is None else (v,) for v in values), REWRITE, reason)

    def split(self, values: Iterable[Sequence[Mapping[str, Any]] | None], reason: Reasons = "split") -> Table:
        """Replace rows by several rows each, with keys KEY/1, KEY/2, ...; None leaves a row unchanged."""
        return self._replaced(values, SPLIT, reason)

    def add(
        self, values: Iterable[Mapping[str, Any]], parents: Sequence[int] | None = None, reason: Reasons = "added"
    ) -> Table:
        """Add rows at the end. With parents (a position for each) their keys are KEY+1, ..., without parents STEP:1, ...

        reason  for all new rows, or one for each
        """
        if parents is not None:
            self._marked(parents)
        made = array("q")
        own = int((self.parent[self.incoming :] < 0).sum())
        children = np.bincount(self.parent[self.parent >= 0], minlength=len(self.entries))

        def items() -> Iterator[tuple[str, bytes]]:
            for k, v in enumerate(values):
                if parents is None:
                    made.append(-1)
                    key = f"{self.step}:{own + k + 1}"
                elif k == len(parents):
                    raise LuthierError(f"{self.step}: adds more rows than the {k} parents it gives")
                else:
                    made.append(int(self.live[parents[k]]))
                    children[made[-1]] += 1
                    key = f"{self.entries.key(made[-1])}+{children[made[-1]]}"
                yield key, store.as_json(Row(key, dict(v)))

        new = store.written(items(), self.entries.on_disk)
        if parents is not None and len(made) < len(parents):
            raise LuthierError(f"{self.step}: adds {len(made)} rows and gives {len(parents)} parents")
        number = len(self.entries) + np.arange(len(made))
        return self._grown(new, made, reason, np.concatenate([self.live, number]))

    def shown(self, points: np.ndarray, axes: tuple[str, str]) -> Table:
        """The table with a picture of its M rows, [M, 2]."""
        return replace(self, picture=Picture(len(self.steps), self.live, points, axes))

    # --- shared parts ---

    def _marked(self, positions: Positions) -> np.ndarray:
        """[M] bool, True at these positions. Raises LuthierError for flags in their place, and for places that do not exist."""
        given = np.asarray(positions)
        if given.dtype == bool:
            what = f"{self.step}: gives {given.size} flags where positions belong"
            raise LuthierError(f"{what}; write np.flatnonzero(flags)")
        if given.size and given.dtype.kind not in "iu":
            raise LuthierError(f"{self.step}: gives positions of type {given.dtype}; write whole numbers")
        beyond = given[(given < 0) | (given >= len(self))]
        if beyond.size:
            raise LuthierError(
                f"{self.step}: gives position {beyond[0]}; the {len(self)} rows have 0 to {len(self) - 1}"
            )
        marked = np.zeros(len(self), dtype=bool)
        marked[given.astype(np.int64)] = True
        return marked

    def _told(self, reason: Reasons, count: int | None = None) -> list[str]:
        count = len(self) if count is None else count
        if isinstance(reason, str):
            return [reason] * count
        if len(reason) != count:
            raise LuthierError(f"{self.step}: gives {len(reason)} reasons for {count} rows")
        return list(reason)

    def _decided(self, numbers: np.ndarray, reason: Reasons | np.ndarray, score: np.ndarray | None = None) -> Table:
        """The table with a reason (and a score) of the current step at these entries."""
        told = np.array(reason if isinstance(reason, np.ndarray) else self._told(reason, len(numbers)), dtype=object)
        out = replace(
            self, reason=_put(self.reason, numbers, told), turn=_put(self.turn, numbers, np.int16(len(self.steps)))
        )  # fmt: skip
        return out if score is None else replace(out, score=_put(self.score, numbers, score))

    def _replaced(self, children: Iterable[Sequence[Mapping[str, Any]] | None], word: int, reason: Reasons) -> Table:
        """Replace every row that has children by them."""
        live, parents, gone = array("q"), array("q"), array("q")
        told, held = self._told(reason), iter(children)
        start = len(self.entries)

        def items() -> Iterator[tuple[str, bytes]]:
            for position, number in enumerate(self.live.tolist()):
                try:
                    new = next(held)
                except StopIteration:
                    raise LuthierError(f"{self.step}: gives values for {position} of {len(self)} rows") from None
                if new is None:
                    live.append(number)
                    continue
                key = self.entries.key(number)
                if not new:
                    raise LuthierError(f"{self.step}: splits {key} into no row; drop it, with a reason")
                gone.append(position)
                for k, v in enumerate(new, start=1):
                    live.append(start + len(parents))
                    parents.append(number)
                    name = key if word == REWRITE else f"{key}/{k}"
                    yield name, store.as_json(Row(name, dict(v)))
            if next(held, self) is not self:
                raise LuthierError(f"{self.step}: gives values for more than {len(self)} rows")

        new = store.written(items(), self.entries.on_disk)
        places, why = np.array(gone, dtype=np.int64), np.array(told, dtype=object)
        old = self.live[places]
        decision = self.decision.copy()
        decision[old] = word
        given = dict(zip(old.tolist(), why[places].tolist(), strict=True))
        out = replace(self, decision=decision)._decided(old, why[places])
        return out._grown(new, parents, [given[p] for p in parents], np.array(live, dtype=np.int64))

    def _grown(self, new: Rows, parents: array[int], reason: Reasons, live: np.ndarray) -> Table:
        """The table with more entries; they have the weight of their parents."""
        if not parents:
            return self
        n, parent = len(parents), np.array(parents, dtype=np.int64)
        weight = np.where(parent < 0, 1.0, self.weight[parent])
        return replace(
            self,
            entries=Rows.joined([self.entries, new]),
            live=live,
            decision=np.concatenate([self.decision, np.zeros(n, np.int8)]),
            score=np.concatenate([self.score, np.full(n, np.nan)]),
            reason=np.concatenate([self.reason, np.array(self._told(reason, n), dtype=object)]),
            parent=np.concatenate([self.parent, parent]),
            turn=np.concatenate([self.turn, np.full(n, len(self.steps), np.int16)]),
            weight=np.concatenate([self.weight, weight]),
        )

    # --- questions ---

    def follows(self, before: Table) -> bool:
        """True if this table was made from that one by operations only."""
        n, mine, theirs = len(before.entries), self.entries.parts, before.entries.parts
        return (
            self.steps == before.steps
            and len(self.entries) >= n
            and len(mine) >= len(theirs)
            and all(a is b for a, b in zip(mine, theirs, strict=False))
            and bool((self.entries.places[:n] == before.entries.places).all())
            and bool((self.parent[:n] == before.parent).all())
        )

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """[M] the original entry that each of these entries comes from; -1 if none."""
        found = np.asarray(numbers, dtype=np.int64).copy()
        while bool((on := (found >= 0) & (self.parent[found] >= 0)).any()):
            found[on] = self.parent[found[on]]
        found[found >= self.incoming] = -1
        return found

    def line(self, number: int) -> dict[str, Any]:
        """The columns of an entry, without its values."""
        turn, score, parent = int(self.turn[number]), float(self.score[number]), int(self.parent[number])
        return {
            "id": number, "key": self.entries.key(number), "parent": None if parent < 0 else parent,
            "step": self.steps[turn - 1] if turn else None, "decision": DECISIONS[self.decision[number]],
            "score": None if np.isnan(score) else score, "reason": self.reason[number], "weight": float(self.weight[number]),
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Every entry with its columns and its values (as JSON) into a Parquet file, batch by batch."""
        with pa.parquet.ParquetWriter(path, SCHEMA) as writer:
            for part in store.chunks(iter(range(len(self.entries)))):
                lines = [
                    {**self.line(i), "values": json.dumps(self.entries[i].values, ensure_ascii=False)} for i in part
                ]
                writer.write_batch(pa.RecordBatch.from_pylist(lines, SCHEMA))


def _put(values: np.ndarray, at: np.ndarray, new: Any) -> np.ndarray:
    """A copy with new values at these places."""
    out = values.copy()
    out[at] = new
    return out
