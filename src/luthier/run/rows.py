"""The rows of a recipe: reading, curation and rendering."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.data.batch import WEIGHT
from luthier.data.codec import Chain
from luthier.data.columns import Carried
from luthier.data.held_out import set_apart, shared
from luthier.data.mixture import Mix, Origin
from luthier.data.prepare import Prepared, prepare
from luthier.data.reading import Tick, answers_of, no_tick, read, shape_in, shape_of, words_of
from luthier.data.rendering import Renderer
from luthier.data.spans import still_there
from luthier.data.store import Row, Rows, as_json, written
from luthier.data.table import DROP, KEEP, Table
from luthier.data.tokens import not_embedded
from luthier.inference.services import lab_with
from luthier.model.anatomy import max_positions
from luthier.model.view import ModelView
from luthier.recipe import Recipe
from luthier.recipe.settings import DataSettings
from luthier.step.lab import Lab, Runs
from luthier.step.settings import TrainSettings
from luthier.support.errors import RecipeError
from luthier.support.files import replaced
from luthier.training.loop import Loop

PLANE = 1000  # rows in the picture of a selection
TURNED = ("messages", "prompt and completion")  # shapes that have turns


class Data(NamedTuple):
    """The rows of a recipe."""

    train: Prepared
    held: Prepared | None
    held_rows: Rows | None
    labels: dict[str | int, int]  # label -> class index, in this order; empty for other tasks
    pool: Prepared | None  # rows without labels, for pipelines that label them
    skipped: list[str]
    kept: list[Kept]
    curation: Cost
    pool_shared: int = 0  # rows left out of the pool because they are also training rows
    head: str = ""  # what becomes of the head in the model's files
    forms: Mapping[str, list[str]] = {}  # "train", "eval" -> the forms that their rows were found in
    overlap: str = ""  # about held-out rows that are training rows too

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by index."""
        return [str(n) for n in self.labels]

    def sets(self) -> dict[str, Prepared]:
        """Rendered rows by the names that stages use."""
        pool = {} if self.pool is None else {"unlabelled": self.pool}
        return {"train": self.train, "labelled": self.train, **pool}


def tokens_a_step(rows: Prepared, settings: TrainSettings) -> float:
    """Tokens of the rows that an optimiser step is given, on average."""
    once = settings.model_copy(update={"epochs": 1.0, "max_steps": None})
    return rows.epoch_tokens / max(1, Loop.length(rows.rows, once))


class Cost(NamedTuple):
    """What curation cost."""

    flops: float
    seconds: float


class Kept(NamedTuple):
    """A summary of one `curate` step."""

    step: str
    rows: int
    of: int
    reasons: dict[str, int]
    plane: list[tuple[float, float, bool]]  # up to PLANE rows for a picture: coordinates, and whether the row stayed
    axes: tuple[str, str]

    @property
    def brief(self) -> dict[str, Any]:
        """What people and programs are told: names and counts."""
        return {"step": self.step, "rows": self.rows, "of": self.of, "reasons": self.reasons}


def told_about(forms: Mapping[str, Sequence[str]], overlap: str) -> list[str]:
    """Lines about the forms in which rows were found, and about held-out rows that are trained on."""
    return [f"{name}: {form}" for name, found in forms.items() for form in found] + (
        [f"eval: {overlap}"] if overlap else []
    )


def told(step: str, rows: int, of: int, reasons: Mapping[str, int]) -> list[str]:
    """Lines about a `curate` step: how many rows there were before and are after it, and the counts of its reasons."""
    counts = [f"  {count:,} {why}" for why, count in sorted(reasons.items())]
    return [f"{step}: {of:,} rows before, {rows:,} after", *counts]


def prepare_rows(
    recipe: Recipe, renderer: Renderer, config: Any, base: Path, view: Callable[[], ModelView], tick: Tick = no_tick,
    nested: Runs | None = None,
) -> Data:  # fmt: skip
    """Read, curate and render the rows.

    view    loads the base model, for curators that use it
    nested  carries out runs within this one, for curators that learn by training
    Held-out rows are rendered in the form that the model is trained on; `held_rows` have their original form.
    """
    d, task = recipe.data, recipe.task
    given = given_rows(d, base, task.shapes, tick)
    held, skipped = given.held, given.skipped
    table, kept, cost = curated(recipe, Table.of(given.rows), curation_lab(recipe, renderer, view, tick, nested))
    rows, chain = table.weighed, recipe.codec
    if held is not None:
        for evaluator in recipe.evaluators():
            evaluator.check_rows(rows, held)
    labels = task.labels(rows, held, config.label2id or {})
    if d.system is not None and not any(shape_in(r.values, TURNED) for r in rows):
        raise RecipeError("data.system", "is not read by rows of plain text, which have no turns", "remove it")
    room = d.max_length or max_positions(config)
    fit: dict[str, Any] = {
        "max_length": room, "on_long": d.on_long, "on_unsupervised": d.on_unsupervised, "tick": tick,
        "maker": task.maker(renderer, config, labels),
    }  # fmt: skip
    pool, shared = None, 0
    if d.pool:
        unlabelled, more = read(
            d.pool, d.columns, base, "pool", shapes=task.pool_shapes, part=d.train_split, on_bad=d.on_bad_row, tick=tick
        )
        skipped = [*skipped, *more]
        new = apart(unlabelled, rows)
        shared = len(unlabelled) - len(new)
        if not new:
            what = f"all its {shared} rows are training rows too"
            raise RecipeError("data.pool", what, "name rows that are not labelled")
        pool = prepare(
            encoded(new, chain), renderer, **{**fit, "maker": task.maker(renderer, config, labels, labelled=False)}
        )
    train = prepare(rows, renderer, **fit, carried=d.carried, mix=given.mix)
    held_out = prepare(encoded(held, chain), renderer, **fit, held=True) if held is not None else None
    refuse_unknown_tokens([train, held_out, pool], renderer.tokenizer, config)
    return Data(
        train,
        held_out,
        held,
        labels,
        pool,
        skipped,
        kept,
        cost,
        shared,
        task.head(rows, [str(n) for n in labels], config),
        given.forms,
        _told_overlap(table, held),
    )


def refuse_unknown_tokens(sets: Sequence[Prepared | None], tokenizer: Any, config: Any) -> None:
    """Raises RecipeError for the first token of these rows that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None or max(tokenizer.get_vocab().values(), default=0) < size:
        return
    for rows in sets:
        if rows is not None and (found := rows.rows.beyond(size)) is not None:
            key, token = found
            raise RecipeError(key, *not_embedded(tokenizer, token, size))


def _told_overlap(table: Table, held: Rows | None) -> str:
    """What to say about held-out rows that are trained on too, in the form of their files; an empty text if none is."""
    if held is None:
        return ""
    roots = np.unique(table.roots(table.live))
    return str(shared(table.entries.take(roots[roots >= 0]), held) or "")


def curation_lab(
    recipe: Recipe, renderer: Renderer, view: Callable[[], ModelView], tick: Tick = no_tick, nested: Runs | None = None
) -> Lab:
    """The services for curators."""
    lab = lab_with(
        renderer, {"base": view}, task=recipe.task, tokens_per_forward=2 * recipe.tokens_per_forward, seed=recipe.seed,
        tick=tick,
    )  # fmt: skip
    return replace(lab, nested=nested)


def apart(pool: Rows, labelled: Rows) -> Rows:
    """The rows of the pool that have no labelled row with the same text, apart from case and white space."""
    known = {_likeness(r) for r in labelled}
    keep = [i for i, r in enumerate(pool) if _likeness(r) not in known]
    return pool if len(keep) == len(pool) else pool.take(np.array(keep, dtype=np.int64))


def _likeness(row: Row) -> bytes:
    """A key that is equal for texts that differ only in case and white space."""
    return hashlib.blake2b(" ".join(words_of(row.values).casefold().split()).encode(), digest_size=16).digest()


class Given(NamedTuple):
    """The rows that a recipe names.

    rows     to train on: of all sources, without those that are held out
    held     held-out rows; None if there are none
    skipped  messages about rows that cannot be read
    mix      how the sources are mixed; None for a single source
    forms    for a reader: what each set was read as
    """

    rows: Rows
    held: Rows | None
    skipped: list[str]
    mix: Mix | None
    forms: dict[str, list[str]]


def given_rows(
    data: DataSettings, base: Path, shapes: Sequence[str], tick: Tick = no_tick, held_too: bool = True
) -> Given:
    """Read the training rows and the held-out rows.

    held_too  False: read no file of held-out rows
    Raises RecipeError for the first row that cannot be used.
    """
    rows, skipped, mix = _of_sources(data, base, shapes, tick)
    held, forms = None, {"train": rows.forms}
    if isinstance(data.eval, float):
        rows, held = set_apart(rows, data.eval, data.eval_by)
    elif data.eval and held_too:
        held, more = read(
            data.eval,
            data.columns,
            base,
            "eval",
            shapes=shapes,
            part=data.eval_split,
            on_bad=data.on_bad_row,
            tick=tick,
        )
        skipped, forms["eval"] = [*skipped, *more], held.forms
    return Given(rows, held, skipped, mix, forms)


def training_rows(
    data: DataSettings, base: Path, shapes: Sequence[str], tick: Tick = no_tick
) -> tuple[Rows, list[str], Mix | None]:
    """(the rows to train on, messages about skipped rows, how the sources are mixed)."""
    given = given_rows(data, base, shapes, tick, held_too=False)
    return given.rows, given.skipped, given.mix


def _of_sources(
    data: DataSettings, base: Path, shapes: Sequence[str], tick: Tick
) -> tuple[Rows, list[str], Mix | None]:
    """(the rows of all sources, messages about skipped rows, how the sources are mixed; None for a single source).

    Raises RecipeError if two sources are the same file: their keys would be the same too.
    """
    found, skipped = [], []
    origins: list[Origin] = []
    for number, source in enumerate(data.sources):
        rows, bad = read(
            source.path, source.columns or {}, base, "train", shapes=shapes, part=source.split, limit=source.limit,
            on_bad=data.on_bad_row, carried=data.carried, tick=tick,
        )  # fmt: skip
        prefixes = tuple(part.prefix or "" for part in rows.parts)
        if twice := {p for o in origins for p in o.prefixes}.intersection(prefixes):
            what = f"{source.path} is named twice" if source.path in min(twice) else f"{min(twice)} is in two sources"
            raise RecipeError(f"data.train.{number}", what, "raise its weight instead")
        found.append(rows)
        skipped += bad
        origins.append(Origin(source.path, prefixes, source.weight))
    mix = None if isinstance(data.train, str) else Mix(tuple(origins), data.temperature)
    return Rows.joined(found), skipped, mix


class CurateStep(NamedTuple):
    """One `curate` step: the table before it and the table after it."""

    name: str
    before: Table
    after: Table


def steps(recipe: Recipe, table: Table, lab: Lab) -> Iterator[CurateStep]:
    """Carry out the steps in order. Each works on the table that the step before it left.

    Raises RecipeError for a step that leaves no row, loses rows without a decision, makes rows of an unknown shape, or changes
    an answer but not its spans.
    """
    for i, curator in enumerate(recipe.curate):
        where, before = f"curate.{i}.{curator.key()}", table.at(curator.key())
        table = curator.curate(before, lab)
        if not table.follows(before):
            raise RecipeError(
                where,
                "returns a table that does not come from its argument",
                "return what the table's operations return",
            )
        if not len(table):
            raise RecipeError(where, f"leaves none of {len(before)} rows", "ask for less, or look at the rows")
        for number in range(len(before.entries), len(table.entries)):
            shape_of(table.entries[number], recipe.task.shapes)
            _refuse_lost_spans(where, table, number, recipe)
        yield CurateStep(curator.key(), before, table)


def _refuse_lost_spans(where: str, table: Table, number: int, recipe: Recipe) -> None:
    """Raise RecipeError if this entry's spans (`data.spans`) are still those of a parent that has another answer."""
    name, parent = recipe.data.spans, int(table.parent[number])
    if name is None or parent < 0:
        return
    old, new = table.entries[parent], table.entries[number]
    given, now = (recipe.data.carried.value(r.key, r.values, name) for r in (old, new))
    before, after = ("".join(answers_of(r.values, recipe.task.shapes)[-1:]) for r in (old, new))
    if given == now and not still_there(before, after, given):
        raise RecipeError(
            where,
            f"changes the answer of {old.key} and leaves its {name} as they are, so they mark other characters",
            f"let the step give {name} new places in the new answer, or leave out data.spans",
        )


def curated(recipe: Recipe, table: Table, lab: Lab) -> tuple[Table, list[Kept], Cost]:
    """The table after all `curate` steps, a summary of each step, and their cost."""
    kept, started = [], time.perf_counter()
    for step in steps(recipe, table, lab):
        kept.append(kept_by(step))
        table = step.after
    return table, kept, Cost(sum(lab.ledger.flops.values()), time.perf_counter() - started)


def kept_by(step: CurateStep) -> Kept:
    """A summary of a step's decisions. Rows that replace another row are counted in its place."""
    after = step.after
    now = (after.turn == len(after.steps)) & (after.decision <= DROP)
    reasons = Counter(after.reason[now].tolist())
    reasons.pop("", None)
    plane, axes = _plane(after)
    return Kept(step.name, len(after), len(step.before), dict(reasons), plane, axes)


def _plane(table: Table) -> tuple[list[tuple[float, float, bool]], tuple[str, str]]:
    """Evenly spaced rows of the last step's picture, if it has one."""
    picture = table.picture
    if picture is None or picture.turn != len(table.steps):
        return [], ("", "")
    count = len(picture.points)
    shown = np.linspace(0, count - 1, min(PLANE, count)).astype(int)
    stays = table.decision[picture.numbers] == KEEP
    points = [(float(picture.points[i, 0]), float(picture.points[i, 1]), bool(stays[i])) for i in shown]
    return [p for p in points if np.isfinite(p[:2]).all()], picture.axes


def encoded(rows: Rows, chain: Chain) -> Rows:
    """Rows in the form that the recipe's curators give them, as far as their answers can be decoded."""
    if not chain.codecs:
        return rows
    return written(((r.key, as_json(Row(r.key, chain.encode(r.values)))) for r in rows), rows.on_disk)


def write_rows(path: Path, rows: Rows, carried: Carried) -> Path:
    """Write rows as lines of JSON unless the file exists: a file that exists is complete. Returns its whole path."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(as_lines(rows, carried))
    return path.resolve()


def as_lines(rows: Rows, carried: Carried) -> Iterator[str]:
    """Yield the rows' values as lines of JSON. If curators weighed the rows, "weight" is their weight times the user's own.

    Raises RecipeError for a field of that name which means something else.
    """
    for i, row in enumerate(rows):
        if rows.weights is None:
            yield _line(row.values)
            continue
        kept = WEIGHT in carried.keep
        if WEIGHT in row.values and not kept:
            what = "has a field weight that data.keep does not name, and a curator weighs rows"
            raise RecipeError(row.key, what, "keep it, or rename it with data.columns")
        own = carried.value(row.key, row.values, WEIGHT) if kept else 1.0
        yield _line({**row.values, WEIGHT: float(rows.weights[i]) * own})


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"
