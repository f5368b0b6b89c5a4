"""The rows of a recipe: read, curated, rendered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from luthier.data.prepare import Prepared, prepare
from luthier.data.reading import Tick, no_tick, read
from luthier.data.rendering import Renderer
from luthier.data.store import Rows
from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.rng import Streams


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


def prepare_rows(recipe: Recipe, renderer: Renderer, config: Any, base: Path, tick: Tick = no_tick) -> Data:
    """Read, curate and render."""
    d = recipe.data
    how: dict[str, Any] = {"on_bad": d.on_bad_row, "tick": tick}
    rows, skipped = read(d.train, d.columns, base, recipe.task, "train", part=d.train_split, limit=d.limit, **how)
    rows, kept, cost = curated(recipe, rows)
    held = None
    if d.eval:
        held, more = read(d.eval, d.columns, base, recipe.task, "eval", part=d.eval_split, **how)
        skipped += more
    labels = _labels(rows, held, config.label2id or {}) if recipe.task == "classification" else {}
    room = d.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    fit: dict[str, Any] = {
        "max_length": room, "on_long": d.on_long, "on_unsupervised": d.on_unsupervised, "labels": labels or None, "tick": tick,
    }  # fmt: skip
    pool = None
    if d.pool:
        unlabelled, more = read(d.pool, d.columns, base, "unlabelled", "pool", part=d.train_split, **how)
        skipped += more
        pool = prepare(unlabelled, renderer, **{**fit, "labels": {}})
    return Data(
        prepare(rows, renderer, **fit),
        prepare(held, renderer, **fit) if held is not None else None,
        held,
        labels,
        pool,
        skipped,
        kept,
        cost,
    )


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


def curated(recipe: Recipe, rows: Rows) -> tuple[Rows, list[Kept], Cost]:
    """The rows that every step of `curate` keeps, in their order, a count of the reasons by step, and what it took."""
    streams, told, flops, started = Streams(recipe.seed), [], 0.0, time.perf_counter()
    for step in recipe.curate:
        chosen = step.select(rows, streams)
        told.append(Kept(step.key(), len(chosen.keep), len(rows), dict(Counter(chosen.reason))))
        rows, flops = rows.take(chosen.keep), flops + chosen.flops
    return rows, told, Cost(flops, time.perf_counter() - started)
