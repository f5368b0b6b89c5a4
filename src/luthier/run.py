"""A run: a recipe carried out in a folder that can be killed at any moment and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ruamel.yaml import YAML
from transformers import AutoConfig

from luthier import __version__, tracking
from luthier.data.prepare import Prepared, prepare
from luthier.data.reading import Tick, no_tick, read
from luthier.data.rendering import Renderer
from luthier.data.store import Rows
from luthier.errors import RecipeError
from luthier.generation import Completion
from luthier.model.anatomy import Anatomy
from luthier.model.loading import CLASSES, load_model, load_tokenizer, locate
from luthier.model.view import ModelView
from luthier.recipe import Recipe
from luthier.report.card import card
from luthier.report.page import write_report
from luthier.rng import Streams
from luthier.run_folder import RunFolder, recipe_hash
from luthier.scorer import Scores, evaluate, matched, mean_loss
from luthier.tracking import Trackers
from luthier.training import checkpoint
from luthier.training.loop import Interrupted, Loop, Progress
from luthier.tuners.base import with_head
from luthier.update import Update
from luthier.update.files import save_update, verify_update

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
Say = Callable[[str], None]


class Data(NamedTuple):
    """The rows of a recipe."""

    train: Prepared
    held: Prepared | None
    held_rows: Rows | None
    labels: dict[str | int, int]  # class index by label; empty for other tasks
    skipped: list[str]
    kept: list[Kept]


class Kept(NamedTuple):
    """What one step of `curate` left."""

    step: str
    rows: int
    of: int
    reasons: dict[str, int]


@dataclass
class Ready:
    """Everything loaded for a run."""

    recipe: Recipe
    folder: Path
    view: ModelView
    renderer: Renderer
    data: Data

    @property
    def train(self) -> Prepared:
        return self.data.train

    def held_out_loss(self) -> float:
        assert self.data.held is not None
        return mean_loss(self.view, self.data.held.rows, 2 * self.recipe.tokens_per_forward, self.recipe.task)[0]

    def scores(self) -> tuple[Scores, list[Completion]]:
        """Of the model as it stands, on the held-out rows."""
        assert self.data.held is not None and self.data.held_rows is not None
        return evaluate(
            self.view, self.data.held.rows, self.data.held_rows, self.renderer, self.recipe.evaluate,
            tokens_per_forward=2 * self.recipe.tokens_per_forward, task=self.recipe.task,
        )  # fmt: skip


def prepare_rows(recipe: Recipe, renderer: Renderer, config: Any, base: Path, tick: Tick = no_tick) -> Data:
    """Read, curate and render."""
    d = recipe.data
    how: dict[str, Any] = {"on_bad": d.on_bad_row, "tick": tick}
    rows, skipped = read(d.train, d.columns, base, recipe.task, "train", part=d.train_split, limit=d.limit, **how)
    rows, kept = curated(recipe, rows)
    held = None
    if d.eval:
        held, more = read(d.eval, d.columns, base, recipe.task, "eval", part=d.eval_split, **how)
        skipped += more
    labels = _labels(rows, held) if recipe.task == "classification" else {}
    room = d.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    fit: dict[str, Any] = {
        "max_length": room, "on_long": d.on_long, "on_unsupervised": d.on_unsupervised, "labels": labels or None, "tick": tick,
    }  # fmt: skip
    return Data(
        prepare(rows, renderer, **fit),
        prepare(held, renderer, **fit) if held is not None else None,
        held,
        labels,
        skipped,
        kept,
    )


def _labels(rows: Rows, held: Rows | None) -> dict[str | int, int]:
    names = sorted({r.values["label"] for r in rows}, key=str)
    for r in held or ():
        if r.values["label"] not in names:
            what = f"label {r.values['label']!r} occurs in no training row"
            raise RecipeError(r.key, what, "mend the label or drop the row")
    return {n: i for i, n in enumerate(names)}


def curated(recipe: Recipe, rows: Rows) -> tuple[Rows, list[Kept]]:
    """The rows that every step of `curate` keeps, in their order, and a count of the reasons by step."""
    streams, told = Streams(recipe.seed), []
    for step in recipe.curate:
        chosen = step.select(rows, streams)
        told.append(Kept(step.key(), len(chosen.keep), len(rows), dict(Counter(chosen.reason))))
        rows = rows.take(chosen.keep)
    return rows, told


def tokens_and_config(recipe: Recipe, base: Path) -> tuple[Any, Renderer, Any]:
    """(where the model is, renderer, configuration)."""
    located = locate(recipe.model if ":" in recipe.model else str(_beside(base, recipe.model)), recipe.revision)
    tokenizer = load_tokenizer(located)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    config = AutoConfig.from_pretrained(located.path, revision=located.revision)
    plain = {"auto": None, "chat": False, "plain": True}[recipe.data.template]
    if plain is False and tokenizer.chat_template is None:
        raise RecipeError("data.template", "this model has no chat template", "set data.template: plain")
    return located, Renderer(tokenizer, recipe.data.system, plain), config


def outline(recipe: Recipe, base: Path, tick: Tick = no_tick) -> Outline:
    """What `check` looks at: rows, configuration and the anatomy of a model without weights."""
    _, renderer, config = tokens_and_config(recipe, base)
    data = prepare_rows(recipe, renderer, config, base, tick)
    _check(recipe, config, data.train, None)
    if data.labels:
        config.num_labels = len(data.labels)
    with torch.device("meta"):
        return Outline(renderer, config, data, Anatomy(CLASSES[recipe.task].from_config(config)))


class Outline(NamedTuple):
    """A recipe with its rows, and its model without weights."""

    renderer: Renderer
    config: Any
    data: Data
    anatomy: Anatomy


def _check(recipe: Recipe, config: Any, train: Prepared, layout: str | None) -> None:
    total = Loop.length(train.rows, recipe) if train.rows else None
    recipe.check_methods(recipe.facts(model_config=config, total_steps=total, num_rows=len(train.rows), layout=layout))


def make_ready(recipe: Recipe, folder: Path, base: Path, tick: Tick = no_tick) -> Ready:
    """Load and check everything; the first fault is a RecipeError, before any training."""
    located, renderer, config = tokens_and_config(recipe, base)
    data = prepare_rows(recipe, renderer, config, base, tick)
    _check(recipe, config, data.train, None)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    view = load_model(located, recipe.task, dtype, num_labels=len(data.labels) or None, tokenizer=renderer.tokenizer)
    _check(recipe, config, data.train, view.layout)
    return Ready(recipe, folder, view, renderer, data)


def _beside(base: Path, name: str) -> Path | str:
    """A model path relative to the recipe where there is one."""
    return base / name if (base / name).exists() else name


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a question the loop asks between steps; a second Ctrl-C is immediate."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        def remember(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def run(
    recipe: Recipe, folder: Path, base: Path, *, say: Say = lambda _: None, on_step: Any = None, max_seconds: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Carry out a recipe; returns what run.json holds at the end.

    base      the folder that paths in the recipe are relative to
    on_step   called with (log entry, progress, total steps)
    Raises Interrupted after Ctrl-C, SIGTERM or max_seconds, with everything saved.
    """
    place, started = RunFolder(folder), time.monotonic()
    with place.locked(), StopRequest().listening() as stop:
        before = place.state()
        if before.get("state") == "done":
            say(f"{folder} is finished already")
            return before
        _begin(place, recipe, base)
        tracking.check(recipe.report_to)
        say(f"model   {recipe.model}")
        ready = make_ready(recipe, folder, base)
        census = ready.train.census
        say(
            f"rows    {census.rows} of {census.tokens} tokens, {census.supervised} supervised; layout {ready.view.layout}"
        )
        place.note(base=ready.view.base.model_dump(), data_hash=ready.train.digest, census=_census(ready.train))
        place.note(
            num_labels=getattr(ready.view.module.config, "num_labels", None)
            if recipe.task == "classification"
            else None
        )
        result = _before(ready, place, say)
        progress = _train(
            ready, place, result, stop, on_step, None if max_seconds is None else started + max_seconds, say
        )
        _finish(ready, place, result, progress, say)
        return place.state()


def _begin(place: RunFolder, recipe: Recipe, base: Path) -> None:
    with (place.path / "recipe.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(recipe.as_dict(), file)
    (place.path / "env.txt").write_text(environment(), encoding="utf-8")
    place.note(
        state="running",
        recipe_hash=recipe_hash(recipe),
        luthier=__version__,
        recipe_folder=str(base.resolve()),
    )


def _census(prepared: Prepared) -> dict[str, Any]:
    return asdict(prepared.census)


def _before(ready: Ready, place: RunFolder, say: Say) -> dict[str, Any]:
    """Scores of the untouched model; read back where an earlier attempt has them."""
    if ready.data.held is None:
        return {}
    file = place.path / "before.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    scores, answers = ready.scores()
    result = {"scores": asdict(scores), "answers": [a.text for a in answers]}
    checkpoint.write_text(file, json.dumps(result))
    say(f"before  {shown(scores)}")
    return result


def shown(scores: Scores) -> str:
    """One line."""
    text = f"loss {scores.loss:.4f}"
    return text if scores.of is None else f"{text}, {scores.right} of {scores.of} right ({scores.seconds:.0f} s)"


def _train(
    ready: Ready,
    place: RunFolder,
    result: dict[str, Any],
    stop: StopRequest,
    on_step: Any,
    deadline: float | None,
    say: Say,
) -> Progress:
    recipe = ready.recipe
    total = Loop.length(ready.train.rows, recipe)
    trainable = with_head(recipe.tuner.attach(ready.view, None, total), ready.view.anatomy.task_head)

    trackers = Trackers(recipe.report_to, place.path, place.path.name, total, ready.view.module)

    def listen(entry: dict[str, float], progress: Progress) -> None:
        place.log(entry)
        trackers.step(entry)
        if on_step is not None:
            on_step(entry, progress, total)

    loop = Loop(
        ready.view, ready.train.rows, trainable, recipe.objective, recipe, folder=place.path, compute=recipe.compute,
        evaluate=None if ready.data.held is None else ready.held_out_loss,
        on_step=listen, stop=stop, data_hash=ready.train.digest,
    )  # fmt: skip
    trained = sum(p.numel() for p in trainable.parameters())
    say(f"train   {trained:,} of {ready.view.anatomy.num_parameters:,} weights, {total} steps")
    try:
        progress = loop.run(deadline)
    except Interrupted:
        place.note(state="stopped", signal=stop.signal)
        raise
    finally:
        trackers.close()
    result["trainable"], result["trained_weights"] = trainable, trained
    return progress


def _finish(ready: Ready, place: RunFolder, result: dict[str, Any], progress: Progress, say: Say) -> None:
    trainable = result.pop("trainable")
    after: dict[str, Any] = {}
    with trainable.phase("score"):
        if ready.data.held is not None:
            scores, answers = ready.scores()
            say(f"after   {shown(scores)}")
            after = {"scores": asdict(scores), "answers": [a.text for a in answers]}
        update = trainable.update()
        save_update(update, place.path, ready.view)
        worst = verify_update(place.path, trainable, ready.view, ready.train.rows[0])
    say(f"saved   {place.path}, reloaded and compared: largest difference {worst:.1e}")
    place.note(
        state="done", steps=progress.step, tokens=progress.tokens, train_seconds=progress.seconds,
        trained_weights=result["trained_weights"], before=_scores(result), after=_scores(after), peak_memory_bytes=peak_memory(),
        reload_difference=worst,
    )  # fmt: skip
    _write_samples(ready, place, result, after)
    checkpoint.write_text(
        place.path / "all_results.json", json.dumps({"before": _scores(result), "after": _scores(after)})
    )
    _leave_model(ready, place, update)
    write_report(place.path, ready.renderer, ready.train.rows[:3])


def _leave_model(ready: Ready, place: RunFolder, update: Update) -> None:
    """What other tools open: tokenizer and card; where most weights changed, the whole model too."""
    ready.renderer.tokenizer.save_pretrained(place.path)
    anatomy = ready.view.anatomy
    touched = {n for part in update.parts if part.kind in ("dense", "replace") for n in part.tensors()}
    whole = 2 * len(touched) > len(anatomy.parameters)
    if whole:
        update.merge_into(ready.view.module)
        ready.view.module.save_pretrained(place.path)
    relation = "finetune" if whole else "adapter"
    text = card(place.path, place.state(), ready.recipe, ready.view.name, relation)
    checkpoint.write_text(place.path / "README.md", text)


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.get("scores", {}).items() if k != "per_row"}


def _write_samples(ready: Ready, place: RunFolder, before: dict[str, Any], after: dict[str, Any]) -> None:
    answers, rows = after.get("answers", []), ready.data.held_rows
    lines = []
    for i, text in enumerate(answers):
        assert rows is not None
        row = rows[i]
        wanted = ready.renderer.answer(row.values)
        how = ready.recipe.evaluate.match
        turns = ready.renderer.messages(row.values)
        entry = {
            "key": row.key, "prompt": turns[-2]["content"],
            "wanted": wanted, "before": before["answers"][i], "after": text,
            "before_right": matched(before["answers"][i], wanted, how), "after_right": matched(text, wanted, how),
        }  # fmt: skip
        lines.append(json.dumps(entry, ensure_ascii=False))
    checkpoint.write_text(place.path / "samples.jsonl", "".join(line + "\n" for line in lines))


def peak_memory() -> int:
    """Bytes this process held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> str:
    """A block to paste into a bug report."""
    lines = [
        f"luthier {__version__}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        f"cores {os.cpu_count()}",
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines) + "\n"
