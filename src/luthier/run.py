"""A run: a recipe carried out in a folder that can be killed at any moment and goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from transformers import AutoConfig

from luthier import __version__, tracking
from luthier.data.batch import collate
from luthier.data.prepare import Prepared, prepare
from luthier.data.reading import Row, read
from luthier.data.rendering import Renderer
from luthier.errors import LuthierError, RecipeError
from luthier.generation import Completion, generate
from luthier.model.anatomy import Anatomy
from luthier.model.loading import CLASSES, load_model, load_tokenizer, locate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward
from luthier.recipe import Recipe
from luthier.report.card import card
from luthier.report.page import write_report
from luthier.rng import Streams
from luthier.tracking import Trackers
from luthier.training import checkpoint
from luthier.training.loop import Interrupted, Loop, Progress
from luthier.training.order import micro_batches
from luthier.tuners.base import with_head
from luthier.update import Update
from luthier.update.files import save_update, verify_update

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
Say = Callable[[str], None]


@dataclass
class Scores:
    """Of a set of rows: mean loss in nats a token (or a row), and where answers were generated, the share right."""

    loss: float
    right: int | None = None
    of: int | None = None
    stopped: int | None = None
    seconds: float = 0.0
    per_row: list[float] = field(default_factory=list)


@dataclass
class Ready:
    """Everything loaded for a run."""

    recipe: Recipe
    folder: Path
    view: ModelView
    renderer: Renderer
    train: Prepared
    eval: Prepared | None
    eval_rows: list[Row]


class RunFolder:
    """The folder of one run: lock, log, state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process works in a folder. Raises LuthierError where another does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LuthierError(
                    f"{self.path}: another process is working in this folder; wait for it, or use --fresh"
                ) from error
            yield

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def state(self) -> dict[str, Any]:
        """What run.json says; empty for a new folder."""
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise LuthierError(f"{file}: is damaged ({error}); use --fresh to start in a new folder") from error

    def note(self, **more: Any) -> None:
        """Merge into run.json, as one act."""
        checkpoint.write_text(self.path / "run.json", json.dumps({**self.state(), **more}, indent=1))


def recipe_hash(recipe: Recipe) -> str:
    """Equal for recipes that ask for the same run."""
    return hashlib.sha256(json.dumps(recipe.as_dict(), sort_keys=True).encode()).hexdigest()


def choose_folder(recipe: Recipe, name: str, fresh: bool, base: Path) -> Path:
    """The folder to work in: output_dir, or the newest unfinished run of the same recipe, or a new one.

    Raises LuthierError where output_dir holds the run of another recipe.
    """
    mine = recipe_hash(recipe)
    if recipe.output_dir is not None:
        path = base / recipe.output_dir
        there = RunFolder(path).state()
        if there and there.get("recipe_hash") != mine and not fresh:
            raise LuthierError(
                f"output_dir: {path} holds the run of another recipe; choose another folder, or use --fresh"
            )
        return _unused(path) if fresh and there else path
    runs = Path("runs")
    if not fresh:
        for path in sorted(runs.glob(f"{name}-*"), reverse=True):
            state = RunFolder(path).state()
            if state.get("recipe_hash") == mine and state.get("state") != "done":
                return path
    return _unused(runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def prepare_rows(
    recipe: Recipe, renderer: Renderer, config: Any, base: Path
) -> tuple[Prepared, Prepared | None, list[Row], dict]:
    """(training rows, evaluation rows, their sources, label indices)."""
    d = recipe.data
    rows = curated(recipe, read(d.train, d.columns, base, recipe.task, "train")[: d.limit])
    held = read(d.eval, d.columns, base, recipe.task, "eval") if d.eval else []
    labels = None
    if recipe.task == "classification":
        names = sorted({r.values["label"] for r in rows}, key=str)
        labels = {n: i for i, n in enumerate(names)}
        for r in held:
            if r.values["label"] not in labels:
                raise RecipeError(
                    r.key,
                    f"label {r.values['label']!r} occurs in no training row",
                    "mend the label or drop the row",
                )
    room = d.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    how: dict[str, Any] = {
        "max_length": room,
        "on_long": d.on_long,
        "on_unsupervised": d.on_unsupervised,
        "labels": labels,
    }
    return (
        prepare(rows, renderer, **how),
        prepare(held, renderer, **how) if held else None,
        held,
        labels or {},
    )


def curated(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """The rows that every step of `curate` keeps, in their order."""
    streams = Streams(recipe.seed)
    for step in recipe.curate:
        rows = [rows[i] for i in step.select(rows, streams).keep]
    return rows


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


def outline(recipe: Recipe, base: Path) -> tuple[Renderer, Any, Prepared, Prepared | None, Anatomy]:
    """What `check` looks at: rows, configuration and the anatomy of a model without weights."""
    _, renderer, config = tokens_and_config(recipe, base)
    train, held, _, labels = prepare_rows(recipe, renderer, config, base)
    _check(recipe, config, train, None)
    if labels:
        config.num_labels = len(labels)
    with torch.device("meta"):
        return renderer, config, train, held, Anatomy(CLASSES[recipe.task].from_config(config))


def _check(recipe: Recipe, config: Any, train: Prepared, layout: str | None) -> None:
    total = Loop.length(train.rows, recipe) if train.rows else None
    recipe.check_methods(recipe.facts(model_config=config, total_steps=total, num_rows=len(train.rows), layout=layout))


def make_ready(recipe: Recipe, folder: Path, base: Path) -> Ready:
    """Load and check everything; the first fault is a RecipeError, before any training."""
    located, renderer, config = tokens_and_config(recipe, base)
    train, held, held_rows, labels = prepare_rows(recipe, renderer, config, base)
    _check(recipe, config, train, None)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    view = load_model(located, recipe.task, dtype, num_labels=len(labels) or None, tokenizer=renderer.tokenizer)
    _check(recipe, config, train, view.layout)
    return Ready(recipe, folder, view, renderer, train, held, held_rows)


def _beside(base: Path, name: str) -> Path | str:
    """A model path relative to the recipe where there is one."""
    return base / name if (base / name).exists() else name


@torch.no_grad()
def mean_loss(ready: Ready, prepared: Prepared) -> tuple[float, list[float]]:
    """(mean loss over all supervised tokens, or rows; per row means). One forward at a time, running sums only."""
    view, per_row = ready.view, [0.0] * len(prepared.rows)
    total, count, training = 0.0, 0.0, view.module.training
    view.module.eval()
    lengths = [len(r["ids"]) for r in prepared.rows]
    try:
        for part in micro_batches(lengths, 2 * ready.recipe.tokens_per_forward)[0]:
            batch = collate([prepared.rows[i] for i in part]).to(view.device)
            fwd = Forward(batch, view)
            if ready.recipe.task == "classification":
                values = torch.nn.functional.cross_entropy(fwd.logits(), batch.row["label"], reduction="none")
                sums, n = values, torch.ones_like(values)
            else:
                where = batch.seq[batch.supervised]
                nll = fwd.nll()
                sums = torch.zeros(len(part), device=nll.device).index_add(0, where, nll)
                n = torch.bincount(where, minlength=len(part)).float()
            total, count = total + float(sums.sum()), count + float(n.sum())
            for i, value in zip(part, (sums / n.clamp_min(1)).tolist(), strict=True):
                per_row[i] = value
    finally:
        view.module.train(training)
    return total / max(count, 1.0), per_row


def evaluate(ready: Ready) -> tuple[Scores, list[Completion]]:
    """Loss on the held-out rows, and answers where the recipe asks for them."""
    assert ready.eval is not None
    started = time.perf_counter()
    loss, per_row = mean_loss(ready, ready.eval)
    scores, answers = Scores(loss, per_row=per_row), []
    wanted = min(ready.recipe.evaluate.generate, len(ready.eval_rows))
    if wanted and ready.recipe.task == "causal-lm":
        rows = [r.values for r in ready.eval_rows[:wanted]]
        prompts = [ready.renderer.prompt_ids(r) for r in rows]
        answers = generate(ready.view, prompts, ready.renderer, ready.recipe.evaluate.max_new_tokens)
        matches = [
            matched(a.text, ready.renderer.answer(r), ready.recipe.evaluate.match)
            for a, r in zip(answers, rows, strict=True)
        ]
        scores.right, scores.of, scores.stopped = sum(matches), wanted, sum(a.stopped for a in answers)
    scores.seconds = time.perf_counter() - started
    return scores, answers


def matched(output: str, answer: str, how: str) -> bool:
    """True for an answer that counts as right."""
    if how == "text":
        return output.strip() == answer.strip()
    try:
        return json.loads(output) == json.loads(answer)
    except (ValueError, RecursionError):
        return False


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
    return {k: v for k, v in asdict(prepared.census).items() if k != "lengths"}


def _before(ready: Ready, place: RunFolder, say: Say) -> dict[str, Any]:
    """Scores of the untouched model; read back where an earlier attempt has them."""
    if ready.eval is None:
        return {}
    file = place.path / "before.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    scores, answers = evaluate(ready)
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
        evaluate=None if ready.eval is None else lambda: mean_loss(ready, ready.eval)[0],  # type: ignore[arg-type]
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
        if ready.eval is not None:
            scores, answers = evaluate(ready)
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
    answers = after.get("answers", [])
    lines = []
    for i, text in enumerate(answers):
        row = ready.eval_rows[i]
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
