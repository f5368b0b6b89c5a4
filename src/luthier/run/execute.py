"""Carry out a recipe in a folder. A run can be killed at any moment and continues from there."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from luthier.data.reading import Tick, no_tick
from luthier.evaluation.base import Results
from luthier.evaluation.measures import beside_base
from luthier.integrations.tracking import Trackers
from luthier.model.loading import NEW_POOLER_TOLD
from luthier.pipelines.base import Apply, Train, run_pipeline
from luthier.recipe import Recipe
from luthier.recipe.text import as_yaml
from luthier.report import token_view
from luthier.report.card import card
from luthier.report.page import write_report
from luthier.run.evaluations import BUILTIN, remember
from luthier.run.folder import RunFolder, recipe_hash
from luthier.run.forecast import NoForecast, miss, peak_memory, refuse_full_disk, reset_peak_memory
from luthier.run.nested import NestedRuns
from luthier.run.ready import Admitted, Ready, admit, make_ready
from luthier.run.result import leave_model
from luthier.run.rows import told, told_about
from luthier.run.stopping import StopRequest
from luthier.run.trainer_files import trainer_files
from luthier.step.outcome import Outcome
from luthier.step.probe import Probe
from luthier.step.progress import Progress, together
from luthier.support.environment import environment
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import beside
from luthier.support.progress import Say
from luthier.support.units import in_bytes, in_time
from luthier.support.version import __version__
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.base import with_head
from luthier.update import Update
from luthier.update.files import save_update, verify_update

log = logging.getLogger(__name__)


def run(
    recipe: Recipe, folder: Path, base: Path, *, say: Say = lambda _: None, on_step: Any = None, max_seconds: float | None = None,
    tick: Tick = no_tick, keep: bool = True, forecast: bool = True, judge: bool = True, nested: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Carry out a recipe. Returns the final contents of run.json.

    base      the folder that paths in the recipe are relative to
    on_step   called with (log entry, progress, total steps)
    tick      called with (what is done, rows so far, the row at work) while rows are read and rendered
    keep      False: keep scores and log, but not the weights
    forecast  False: make no forecast of memory and time
    judge     False: only measure what a step costs: evaluate the base model only, and keep nothing but the costs
    nested    False: this is a nested run, which has no nested runs of its own
    Under `torchrun` or `accelerate launch`, every process calls this function; the first process writes and prints.
    Raises Interrupted after Ctrl-C, SIGTERM or max_seconds. Everything is saved first.
    """
    if recipe.collaborate is not None:
        raise RecipeError("collaborate", "is for `luthier collaborate`", "remove it to tune alone")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    place, started = RunFolder(folder, writes=accelerator.is_main_process), time.monotonic()
    if not accelerator.is_main_process:
        say, on_step = (lambda _: None), None
    say = _logged(say)
    with place.locked(), StopRequest().listening() as stop:
        before = place.state()
        if before.get("state") == "done":
            say(f"{folder} is finished already")
            return before
        reset_peak_memory()  # this process may have done other work before: a worker carries out one run after another
        _begin(place, recipe, base)
        say(f"model   {recipe.model}")
        deadline = None if max_seconds is None else started + max_seconds
        # Several processes would each start the same nested runs.
        runs = NestedRuns(recipe, base, stop) if nested and accelerator.num_processes == 1 else None
        try:
            admitted = admit(recipe, base, tick, accelerator.num_processes, runs, forecast)
            _tell_forecast(admitted, place, say, forecast and accelerator.num_processes == 1)
            ready = make_ready(admitted.recipe, folder, base, admitted.gathered, accelerator)
            ready.tick, ready.nested = tick, runs
            _carry_out(ready, place, stop, on_step, deadline, say, keep, judge)
        except Interrupted:
            place.note(state="stopped", signal=stop.signal, seconds=place.seconds())
            raise
        accelerator.wait_for_everyone()
        return place.state()


def _logged(say: Say) -> Say:
    """Write every line into the log of this module, too (LUTHIER_LOG)."""

    def both(text: str) -> None:
        log.info(text)
        say(text)

    return both


def whole_run(recipe: Recipe, folder: Path, request: Mapping[str, Any]) -> None:
    """Carry out a worker's request: a run of a comparison, or a nested run."""
    how = {name: request[name] for name in ("keep", "judge", "nested")}
    run(recipe, folder, Path(request["base"]), forecast=False, **how)


def _carry_out(
    ready: Ready, place: RunFolder, stop: StopRequest, on_step: Any, deadline: float | None, say: Say, keep: bool, judge: bool
) -> None:  # fmt: skip
    """Evaluate, train, evaluate, and write the results."""
    _tell_rows(ready, place, say)
    with contextlib.ExitStack() as under:
        if ready.start is not None:
            say(f"start   {ready.recipe.start}")
            under.enter_context(ready.start.bind(ready.view))
        result = _before(ready, place, say, judge)
        train = _pipeline if ready.recipe.pipeline is not None else _train
        trained = train(ready, place, stop, on_step, deadline, say)
        if ready.start is not None:
            trained = _over(ready.start, trained, under)
        if judge:
            _finish(ready, place, result, trained, say, keep)
            return
        _note_spent(ready, place, result, trained, peak_memory(), evaluation_seconds=result.seconds, kept=False)


def _over(start: Update, trained: Trained, under: contextlib.ExitStack) -> Trained:
    """The result of training over an update, as one update of the base. Raises LuthierError if there is none."""
    try:
        update = start.then(trained.update)
    except TypeError as error:
        raise LuthierError(f"start: {error}; set model to the adapter, which merges it") from error

    def detach() -> None:
        trained.detach()
        under.close()

    return replace(trained, update=update, detach=detach)


def _begin(place: RunFolder, recipe: Recipe, base: Path) -> None:
    """Write the recipe, the environment and the first state. Notes of another recipe, whose run did nothing, are replaced."""
    if place.state().get("recipe_hash") not in (None, recipe_hash(recipe)):
        place.write("run.json", "{}")
    place.write("recipe.yaml", as_yaml(recipe.as_dict()))
    place.write("env.txt", environment())
    place.note(
        state="running",
        recipe_hash=recipe_hash(recipe),
        luthier=__version__,
        recipe_folder=str(base.resolve()),
        eval_file=_eval_file(recipe, base),
        model_files=_model_files(recipe, base),
    )


def _eval_file(recipe: Recipe, base: Path) -> str | None:
    """The path of the held-out rows, if they are on this machine."""
    source = recipe.data.eval
    if not isinstance(source, str):
        return None
    if source.startswith(BUILTIN):
        return source
    return str((base / source).resolve()) if (base / source).is_file() else None


def _model_files(recipe: Recipe, base: Path) -> str | None:
    """The folder or file of the base model, if it is on this machine."""
    path = Path(beside(base, recipe.model))
    return str(path.resolve()) if ":" not in recipe.model and path.exists() else None


def _tell_forecast(admitted: Admitted, place: RunFolder, say: Say, asked: bool) -> None:
    """Say and note the forecast. Raises LuthierError if the disk has too little room."""
    expected = admitted.forecast
    if isinstance(expected, NoForecast):
        if asked:
            say(f"expect  no forecast ({expected.reason})")
        return
    place.note(forecast=asdict(expected))
    say(f"expect  {in_bytes(expected.memory_bytes)} of memory, {in_time(expected.seconds)} of training")
    if admitted.recipe.gradient_checkpointing:
        say("memory  is short, so activations are computed again in the backward pass (gradient_checkpointing)")
    refuse_full_disk(admitted.recipe, expected, place.path)


def _tell_rows(ready: Ready, place: RunFolder, say: Say) -> None:
    """Say which rows there are, and note it in run.json."""
    census, data = ready.train.census, ready.data
    for step in data.kept:
        first, *counts = told(**step.brief)
        for line in (f"curate  {first}", *(f"      {count}" for count in counts)):
            say(line)
    if data.skipped:
        say(f"skipped {len(data.skipped)} rows that cannot be read; the first one: {data.skipped[0]}")
    if data.pool_shared:
        say(f"pool    {data.pool_shared} rows are left out, because they are also training rows")
    if data.head:
        say(f"head    {data.head}")
    if ready.view.anatomy.new_pooler:
        say(f"head    {NEW_POOLER_TOLD}")
    for line in told_about(data.forms, data.overlap):
        say(f"data    {line}")
    say(f"rows    {census.rows} of {census.tokens} tokens, {census.supervised} supervised; layout {ready.view.layout}")
    for source in ready.train.sources:
        say(f"source  {source['name']}: {source['rows']} rows, {source['share']:.1%} of the draws")
    place.note(
        base=ready.view.base.model_dump(), data_hash=ready.train.digest, census=asdict(census), skipped=data.skipped,
        sources=ready.train.sources, curated=[k.brief for k in data.kept], classes=data.classes, pool_shared=data.pool_shared,
        forms=data.forms, overlap=data.overlap,
    )  # fmt: skip
    place.write("curation.json", json.dumps([k._asdict() for k in data.kept]))


def _before(ready: Ready, place: RunFolder, say: Say, show_tokens: bool) -> Results:
    """Evaluate the base model."""
    results = ready.results("none" if ready.start is None else ready.start.digest())
    say(f"before  {shown(results)}")
    if show_tokens and place.writes and not (place.path / "tokens.json").exists():
        rows = ready.first_rows(token_view.SHOWN)
        tokens = token_view.tokens_of(ready.renderer, rows, ready.recipe.task, ready.data.classes)
        if ready.recipe.task.token_losses:
            token_view.note_losses(tokens, ready.view, rows, "before")
        token_view.save(tokens, place.path)
    return results


def shown(results: Results) -> str:
    """One line with the first few measures."""
    names = [n for n in results.measures if n not in ("bits_per_byte", "canary_loss", "answer_tokens")][:5]
    return ", ".join(f"{n.replace('_', ' ')} {results.measures[n].value:.4g}" for n in names) or "nothing is measured"


@dataclass
class Trained:
    """The result of training, still on the model."""

    update: Update
    live: Callable[[], contextlib.AbstractContextManager[Any]]  # entered for evaluations of the tuned model
    detach: Callable[[], None]  # restores the base model
    weights: int
    progress: Progress


def _train(
    ready: Ready, place: RunFolder, stop: StopRequest, on_step: Any, deadline: float | None, say: Say
) -> Trained:
    """Train one stage with the recipe's tuner and objective."""
    recipe = ready.recipe
    total = Loop.length(ready.train.rows, recipe)
    trainable = with_head(recipe.tuner.attach(ready.view, ready.lab(), total), ready.view.anatomy.task_head)
    weights = sum(p.numel() for p in trainable.parameters())
    with _listening(ready, place, on_step, total) as listen:
        loop = Loop(
            ready.view, ready.train.rows, trainable, recipe.objective, recipe, lab=ready.lab(), folder=place.path,
            evaluate=None if ready.data.held is None else ready.held_out_loss, accelerator=ready.accelerator,
            on_step=listen, stop=stop, data_hash=ready.train.digest, draw=ready.draw,
        )  # fmt: skip
        say(f"train   {weights:,} of {ready.view.anatomy.num_parameters:,} weights, {total} steps")
        _weigh_tokens(ready, place, loop)
        progress = loop.run(deadline)
    return Trained(trainable.update(), contextlib.nullcontext, trainable.detach, weights, progress)


def _weigh_tokens(ready: Ready, place: RunFolder, loop: Loop) -> None:
    """Note, before the first step, how the objective weighs the tokens of a few rows."""
    recipe, tokens = ready.recipe, token_view.load(place.path)
    known = not tokens or any("kept" in t for row in tokens for t in row)
    if known or not recipe.task.token_losses or not ready.accelerator.is_main_process:
        return
    if recipe.gradient_checkpointing:  # memory is short, and this look keeps all activations of a forward pass
        return
    rows = ready.first_rows(token_view.WINDOW)
    # No sum over ranks, because only the first one looks. The look does not change the state of the run's own objective.
    alone = Probe(loop.view, loop.objective.fresh(), loop.extra)
    token_view.note_weights(
        tokens, alone, rows, recipe.batch_size, loop.total_steps, loop.lab, recipe.tokens_per_forward
    )
    token_view.save(tokens, place.path)


def _pipeline(
    ready: Ready, place: RunFolder, stop: StopRequest, on_step: Any, deadline: float | None, say: Say
) -> Trained:
    """Train several stages. The result is the Update of the last one."""
    recipe = ready.recipe
    assert recipe.pipeline is not None
    held = None if ready.data.held is None else ready.held_out_loss

    def told(stage: Train | Apply) -> None:
        say(f"stage   {stage.name}")

    with _listening(ready, place, on_step, None) as listen:
        done = run_pipeline(
            recipe.pipeline, ready.view, ready.lab(), place.path, deadline=deadline, before_stage=told, evaluate=held,
            pace=recipe.pace, save_memory=recipe.gradient_checkpointing is True, on_step=listen, stop=stop,
            accelerator=ready.accelerator, data_hash=ready.train.digest, draw=ready.draw,
        )  # fmt: skip
    update = next((o.update for o in reversed(done.values()) if o.update is not None), None)
    if update is None:
        raise LuthierError(f"pipeline.{recipe.pipeline.key()}: no stage changed the model, so nothing is left")
    place.note(stages=[_stage_note(o) for o in done.values()])
    stack = contextlib.ExitStack()
    stack.enter_context(update.bind(ready.view))
    weights = sum(t.numel() for part in update.parts for t in part.tensors().values())
    return Trained(update, contextlib.nullcontext, stack.close, weights, together(o.progress for o in done.values()))


def _stage_note(outcome: Outcome) -> dict[str, Any]:
    """The costs and measures of a stage, for run.json."""
    p = outcome.progress
    return {
        "name": outcome.name, "steps": p.step, "tokens": p.tokens, "row_tokens": p.row_tokens, "seconds": p.seconds,
        "select_seconds": p.select_seconds, "flops": p.flops, "metrics": dict(outcome.metrics),
    }  # fmt: skip


@contextlib.contextmanager
def _listening(ready: Ready, place: RunFolder, on_step: Any, total: int | None) -> Iterator[Any]:
    """The function to call after steps and evaluations: it feeds the log, the trackers and the progress bar."""
    names = ready.recipe.report_to if ready.accelerator.is_main_process else ()
    trackers = Trackers(names, place.path, place.path.name, total or 0, ready.view.module)

    def listen(entry: dict[str, float], progress: Progress, of: int) -> None:
        if progress.log and progress.log[-1] is entry:  # not one between logging_steps
            place.log(entry)
            trackers.step(entry)
        if on_step is not None:
            on_step(entry, progress, of)

    try:
        yield listen
    finally:
        trackers.close()


def _finish(ready: Ready, place: RunFolder, before: Results, trained: Trained, say: Say, keep: bool) -> None:
    """Evaluate, save, read back and report. Only the first process does this."""
    trained_peak = peak_memory()
    if not ready.accelerator.is_main_process:
        return
    digest, started, worst = trained.update.digest(), time.monotonic(), None
    with trained.live():
        after = ready.results(digest)
        say(f"after   {shown(after)}")
        gates = [g for e in ready.recipe.evaluators() for g in e.gates(before, [after])]
        for g in gates:
            say(f"gate    {g.measure} {g.change.value:+.3f} ({g.change.low:.3f} to {g.change.high:.3f}): {g.outcome}")
        evaluation = time.monotonic() - started
        if ready.recipe.task.token_losses:
            tokens = token_view.load(place.path)
            token_view.note_losses(tokens, ready.view, ready.first_rows(token_view.SHOWN), "after")
            token_view.save(tokens, place.path)
        if keep:
            save_update(trained.update, place.path, ready.view)
            worst = verify_update(place.path, trained.detach, ready.view, ready.train.rows[0])
            say(f"saved   {place.path}, reloaded and compared: largest difference {worst:.1e}")
    progress, peak = trained.progress, max(trained_peak, peak_memory())
    place.write("before.json", json.dumps(before.as_dict(), ensure_ascii=False))
    place.write("after.json", json.dumps(after.as_dict(), ensure_ascii=False))
    place.write("samples.jsonl", _samples(before, after))
    rows = {"train": len(ready.train.rows), "eval": 0 if ready.data.held is None else len(ready.data.held.rows)}
    total = progress.step if ready.recipe.pipeline is not None else Loop.length(ready.train.rows, ready.recipe)
    values = {n: m.value for n, m in after.measures.items()}
    for name, text in trainer_files(ready.recipe, progress, values, rows, evaluation, total).items():
        place.write(name, text)
    compared = {n: beside_base(m, before.measures.get(n)) for n, m in after.measures.items()}
    whole = keep and leave_model(trained.update, ready.view, ready.renderer.tokenizer, place.path)
    _note_spent(
        ready, place, before, trained, peak, evaluation_seconds=evaluation, kept=keep, after=after.brief(), compared=compared,
        reload_difference=worst, update_digest=digest, gates=[{**g._asdict(), "change": g.change._asdict()} for g in gates],
    )  # fmt: skip
    if keep:
        remember(place.path, None, compared)
        relation = "finetune" if whole else "adapter"
        place.write("README.md", card(place.path, place.state(), ready.recipe, ready.view.name, relation))
    expected = place.state().get("forecast")
    if expected and not progress.resumed:
        off = miss(expected, peak, progress.seconds)
        place.note(forecast_miss=off)
        say(f"forecast off by {off['memory']:+.0%} in memory and {off['seconds']:+.0%} in time")
    write_report(place.path)


def _note_spent(ready: Ready, place: RunFolder, before: Results, trained: Trained, peak: int, **more: Any) -> None:
    """Note what a run cost. This marks the run as finished."""
    p = trained.progress
    place.note(
        state="done", steps=p.step, skipped_steps=p.skipped, tokens=p.tokens, train_seconds=p.seconds,
        row_tokens=p.row_tokens, spent=_spent(ready, p), trained_weights=trained.weights, before=before.brief(),
        peak_memory_bytes=peak, update_bytes=trained.update.num_bytes, seconds=place.seconds(),
        finished=time.strftime("%Y-%m-%d %H:%M"),
        **more,
    )  # fmt: skip


def _spent(ready: Ready, progress: Progress) -> dict[str, Any]:
    """The costs: FLOPs by stage (None if torch.compile hides them), tokens, seconds of curation and training."""
    compiled = ready.recipe.torch_compile
    evaluated = ready.view.meter.flops.get("evaluate", 0.0)
    beside = ready.ledger.flops
    flops = None if compiled else {**progress.flops, **beside, "curate": ready.data.curation.flops}
    return {
        "flops": flops, "evaluation_flops": evaluated, "tokens": progress.tokens, "seconds": progress.seconds,
        "select_seconds": progress.select_seconds, "curation_seconds": ready.data.curation.seconds,
    }  # fmt: skip


def _samples(before: Results, after: Results) -> str:
    """Answers of the base model and the tuned model, side by side."""
    first = {x.key: x for x in before.samples}
    lines = [
        {
            "key": x.key, "prompt": x.prompt, "wanted": x.wanted, "before": first[x.key].answer, "after": x.answer,
            "before_right": first[x.key].right, "after_right": x.right,
        }
        for x in after.samples
    ]  # fmt: skip
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
