"""The rows of a recipe: read, curated, rendered."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.curation.base import Base, Selection
from luthier.data.prepare import Prepared, prepare
from luthier.data.reading import Tick, no_tick, read
from luthier.data.rendering import Renderer
from luthier.data.store import Row, Rows
from luthier.model.view import ModelView
from luthier.recipe import Recipe
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams

PLANE = 1000  # rows of a selection that a picture shows


class Data(NamedTuple):
    """The rows of a recipe."""

    train: Prepared
    held: Prepared | None
    held_rows: Rows | None
    labels: dict[str | int, int]  # class index by label, in that order; empty for other tasks
    pool: Prepared | None  # rows without labels, for pipelines that make them
    skipped: list[str]
    kept: list[Kept]
    curation: Cost
    pool_shared: int = 0  # rows of the pool that were left out, since the training rows hold them as well

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by index."""
        return [str(n) for n in self.labels]


class Cost(NamedTuple):
    """Of choosing rows."""

    flops: float
    seconds: float


class Kept(NamedTuple):
    """What one step of `curate` left."""

    step: str
    rows: int
    of: int
    reasons: dict[str, int]
    plane: list[tuple[float, float, bool]]  # where rows lie and whether they stayed; of up to PLANE rows, for a picture
    axes: tuple[str, str]


def prepare_rows(
    recipe: Recipe, renderer: Renderer, config: Any, base: Path, view: Callable[[], ModelView], tick: Tick = no_tick
) -> Data:
    """Read, curate and render.

    view  loads the untouched model, for curators that ask it
    """
    d = recipe.data
    how: dict[str, Any] = {"on_bad": d.on_bad_row, "tick": tick}
    rows, skipped = read(d.train, d.columns, base, recipe.task, "train", part=d.train_split, limit=d.limit, **how)
    rows, kept, cost = curated(recipe, rows, Base(view, renderer, 2 * recipe.tokens_per_forward, tick))
    held = None
    if d.eval:
        held, more = read(d.eval, d.columns, base, recipe.task, "eval", part=d.eval_split, **how)
        skipped += more
        for evaluator in recipe.evaluators():
            evaluator.check_rows(rows, held)
    labels = _labels(rows, held, config.label2id or {}) if recipe.task == "classification" else {}
    room = d.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    fit: dict[str, Any] = {
        "max_length": room, "on_long": d.on_long, "on_unsupervised": d.on_unsupervised, "labels": labels or None, "tick": tick,
    }  # fmt: skip
    pool, shared = None, 0
    if d.pool:
        unlabelled, more = read(d.pool, d.columns, base, "unlabelled", "pool", part=d.train_split, **how)
        skipped += more
        new = apart(unlabelled, rows)
        shared = len(unlabelled) - len(new)
        if not new:
            what = f"the training rows hold all {shared} rows of it as well"
            raise RecipeError("data.pool", what, "name rows that are not labelled")
        pool = prepare(new, renderer, **{**fit, "labels": {}})
    return Data(
        prepare(rows, renderer, **fit),
        prepare(held, renderer, **fit) if held is not None else None,
        held,
        labels,
        pool,
        skipped,
        kept,
        cost,
        shared,
    )


def apart(pool: Rows, labelled: Rows) -> Rows:
    """The rows of the pool whose text, but for case and white space, is that of no labelled row."""
    known = {_likeness(r) for r in labelled}
    keep = [i for i, r in enumerate(pool) if _likeness(r) not in known]
    return pool if len(keep) == len(pool) else pool.take(np.array(keep, dtype=np.int64))


def _likeness(row: Row) -> bytes:
    """Equal for texts that differ in case and white space only."""
    return hashlib.blake2b(" ".join(row.values["text"].casefold().split()).encode(), digest_size=16).digest()


def _labels(rows: Rows, held: Rows | None, known: Mapping[str, int]) -> dict[str | int, int]:
    """Class index by label: as the model has them where it knows these very names, else in alphabetical order."""
    names = sorted({r.values["label"] for r in rows}, key=str)
    if {str(n) for n in names} == set(known):
        names.sort(key=lambda n: known[str(n)])
    for r in held or ():
        if r.values["label"] not in names:
            what = f"label {r.values['label']!r} occurs in no training row"
            raise RecipeError(r.key, what, "mend the label or drop the row")
    return {n: i for i, n in enumerate(names)}


class Decided(NamedTuple):
    """What one step of `curate` decided about every row it saw."""

    step: str
    rows: Rows  # that it saw
    chosen: Selection


def decisions(recipe: Recipe, rows: Rows, base: Base) -> Iterator[Decided]:
    """Each step in turn, on the rows that the one before kept."""
    streams = Streams(recipe.seed)
    for step in recipe.curate:
        chosen = step.select(rows, streams, base)
        yield Decided(step.key(), rows, chosen)
        rows = rows.take(chosen.keep)


def curated(recipe: Recipe, rows: Rows, base: Base) -> tuple[Rows, list[Kept], Cost]:
    """The rows that every step of `curate` keeps, in their order, a count of the reasons by step, and what it took."""
    told, flops, started = [], 0.0, time.perf_counter()
    for step, seen, chosen in decisions(recipe, rows, base):
        told.append(kept_by(step, len(seen), chosen))
        rows, flops = seen.take(chosen.keep), flops + chosen.flops
    return rows, told, Cost(flops, time.perf_counter() - started)


def kept_by(step: str, of: int, chosen: Selection) -> Kept:
    """A step's decision in short."""
    return Kept(step, len(chosen.keep), of, dict(Counter(chosen.reason)), _plane(chosen), chosen.axes)


def _plane(chosen: Selection) -> list[tuple[float, float, bool]]:
    """Evenly spaced rows of a selection's plane."""
    if chosen.plane is None:
        return []
    shown = np.linspace(0, len(chosen.plane) - 1, min(PLANE, len(chosen.plane))).astype(int)
    inside = set(chosen.keep.tolist())
    points = [(float(chosen.plane[i, 0]), float(chosen.plane[i, 1]), int(i) in inside) for i in shown]
    return [p for p in points if np.isfinite(p[:2]).all()]
