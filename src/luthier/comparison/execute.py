"""Carry out a comparison: its folder, its queue, and how it continues after a kill without repeating work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.comparison.judge import Standing, judged, measures_of
from luthier.comparison.plan import Comparison, Foreign, recipe_of, slug, with_seed
from luthier.comparison.rows import Files, written
from luthier.comparison.steps import Arm, Done, Job, StageCost, StagePlan, budget_of, forecast, next_jobs, total_runs
from luthier.evaluation.base import Evaluator
from luthier.evaluation.forgetting import NONE, Forgetting
from luthier.method.registry import modules_of
from luthier.pipelines.base import Pace, planned
from luthier.recipe import Recipe
from luthier.run.folder import RunFolder
from luthier.run.queue import Workers, side_by_side, workers
from luthier.run.ready import admit
from luthier.run.rows import Data, tokens_a_step
from luthier.support.cache import key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import write_text
from luthier.support.progress import Say
from luthier.support.signals import handled
from luthier.support.sources import code_key
from luthier.support.units import in_bytes, in_flops, in_time
from luthier.training.loop import Interrupted, Loop


@dataclass
class Bench:
    """A comparison that is ready to run.

    base     the folder that paths in recipes are relative to
    code     the folder whose Python modules recipes may name; None refuses all code
    recipes  arm -> recipe
    files    arm -> files of rows that all arms share
    keep     keep the weights of every run
    done     job name -> result of a finished run
    """

    plan: Comparison
    folder: Path
    base: Path
    code: Path | None
    recipes: dict[str, Recipe]
    files: dict[str, Files]
    arms: dict[str, Arm]
    say: Say = lambda _: None
    keep: bool = False
    done: dict[str, Done] = field(default_factory=dict)

    def results(self) -> dict[str, dict[int, Path]]:
        """arm -> seed -> folder of the finished run."""
        out: dict[str, dict[int, Path]] = {}
        for d in self.done.values():
            if d.job.purpose.startswith("seed-") and d.error is None:
                out.setdefault(d.job.arm, {})[d.job.seed] = self.place(d.job)
        return out

    # --- one run ---

    def recipe(self, job: Job) -> Recipe:
        """The recipe of a run."""
        recipe, files = with_seed(self.recipes[job.arm], job.seed), self.files[job.arm]
        trial = job.purpose.startswith("trial-")
        held_out = files.valid if trial and files.valid is not None else files.eval
        more: dict[str, Any] = {
            "learning_rate": job.learning_rate, "output_dir": None, "report_to": (), "save_steps": None,
        }  # fmt: skip
        if recipe.pipeline is not None:
            more |= {"learning_rate": recipe.learning_rate, "pace": self._pace(job, recipe)}
        elif job.steps is not None:
            more |= {"max_steps": job.steps, "epochs": 1.0}
        if job.purpose == "measure":
            more |= {"eval_steps": None, "early_stopping_patience": None, "load_best": True}
        if trial:
            more["evaluate"] = self._choosing(recipe)
        return files.put_into(recipe.model_copy(update=more), held_out)

    def _pace(self, job: Job, recipe: Recipe) -> Pace:
        """How a pipeline trains in this run: its first stage at the job's rate, all stages in proportion."""
        arm, own = self.arms[job.arm], recipe.pace
        rate = own.learning_rate * job.learning_rate / arm.learning_rate
        if job.purpose == "measure":
            return Pace(learning_rate=rate, length=own.length, max_steps=job.steps)
        length = own.length * (1.0 if job.steps is None else job.steps / arm.own_steps)
        return Pace(learning_rate=rate, length=length)

    def _choosing(self, recipe: Recipe) -> list[Evaluator]:
        """Only the evaluators of the measure that chooses the learning rate. Forgetting always measures, so it is given nothing
        to measure."""
        wanted = [e for e in recipe.evaluators() if self.measure in e.names()]
        if "forgetting" in recipe.task.always and not any(isinstance(e, Forgetting) for e in wanted):
            return [*wanted, Forgetting(general=NONE, canaries=False)]
        return wanted

    @property
    def measure(self) -> str:
        """The measure that chooses learning rates."""
        search = self.plan.search
        return (search.measure if search is not None else None) or self.plan.primary

    def place(self, job: Job) -> Path:
        """The folder of a run. Another recipe, other rows or another command have another folder."""
        keys = self.plan.arms[job.arm]
        command = keys.model_dump_json() if isinstance(keys, Foreign) else ""
        recipe = self.recipe(job)
        what = key_of(recipe.as_dict(), command, job.steps, code_key("luthier.run.execute", *modules_of(recipe)))
        return self.folder / "arms" / slug(job.arm) / f"{job.purpose}-{what[:8]}"

    def request(self, job: Job, at_a_time: int) -> dict[str, Any]:
        """The request for a worker; `at_a_time` workers share the cores."""
        keys = self.plan.arms[job.arm]
        more: dict[str, Any] = {"keep": self.keep, "judge": job.purpose != "measure", "nested": True}
        if isinstance(keys, Foreign):
            more = {"call": "luthier.comparison.foreign:run_foreign"}
            more["foreign"] = {
                "command": keys.command, "cwd": str(self.base.resolve()), "steps": job.steps, "seconds": self._seconds(job),
                "flops_a_step": self._flops_a_step(keys),
            }  # fmt: skip
        return {
            "recipe": self.recipe(job).as_dict(), "name": f"arm {job.arm}", "folder": str(self.place(job)),
            "base": str(self.base.resolve()), "code": None if self.code is None else str(self.code),
            "threads": max(1, (os.cpu_count() or 1) // at_a_time), **more,
        }  # fmt: skip

    def _seconds(self, job: Job) -> float | None:
        budget = self.plan.budget
        if budget is None or budget.seconds is None:
            return None
        share = self.plan.search.share if self.plan.search is not None and job.purpose.startswith("trial-") else 1.0
        return budget.seconds * share

    def _flops_a_step(self, keys: Foreign) -> float | None:
        leader = None if keys.like is None else self.done.get(f"{keys.like}/measure")
        return None if leader is None or leader.error else leader.flops / max(leader.steps, 1)

    # --- what is done ---

    def pending(self) -> list[Job]:
        """Runs that can start now."""
        return next_jobs(self.plan, self.arms, self.done)

    def look(self) -> None:
        """Find the runs that are finished already."""
        found = True
        while found:
            found = False
            for job in self.pending():
                outcome = self.outcome(job)
                if outcome is not None:
                    self.done[job.name], found = outcome, True

    def outcome(self, job: Job) -> Done | None:
        """The result of a job; None if it is not carried out yet."""
        place = self.place(job)
        failed = place / "failed.json"
        if failed.exists():
            return Done(job, 0.0, 0.0, 0, 0.0, error=json.loads(failed.read_text(encoding="utf-8"))["error"])
        state = RunFolder(place).state()
        return None if state.get("state") != "done" else self._read(job, place, state)

    def _read(self, job: Job, place: Path, state: dict[str, Any]) -> Done:
        spent = state["spent"]
        flops = dict(spent["flops"] or {})
        once = flops.pop("curate", 0.0)
        measure = measures_of(place).get(self.measure) if job.purpose != "measure" else None
        value = None if measure is None else measure.value * (1 if measure.higher else -1)
        return Done(
            job, sum(flops.values()), spent["seconds"], state["steps"], state["row_tokens"], once, spent["curation_seconds"],
            state["update_bytes"], state["peak_memory_bytes"], state["evaluation_seconds"], value,
            select_flops=flops.get("select", 0.0), select_seconds=spent.get("select_seconds", 0.0),
            stages={
                s["name"]: StageCost(sum(s["flops"].values()), s["seconds"], s["row_tokens"])
                for s in state.get("stages", ())
            },
        )  # fmt: skip

    def finish(self, job: Job, answer: dict[str, Any]) -> None:
        """Store a worker's answer."""
        if answer["state"] == "failed":
            place = self.place(job)
            place.mkdir(parents=True, exist_ok=True)
            write_text(place / "failed.json", json.dumps({"error": answer["error"], "job": job._asdict()}))
            self.say(f"failed  {job.name}: {answer['error']}")
        outcome = self.outcome(job)
        assert outcome is not None, job
        self.done[job.name] = outcome

    def forget_failures(self) -> None:
        """Forget failed runs, so that they are tried again."""
        for file in self.folder.glob("arms/*/*/failed.json"):
            file.unlink()


def ready(
    plan: Comparison, folder: Path, base: Path, code: Path | None = None, say: Say = lambda _: None, keep: bool = False
) -> Bench:
    """Check every arm and write the shared rows. Raises RecipeError with the arm's name before any training."""
    recipes = {arm: recipe_of(plan, arm, code, base) for arm in plan.arms}
    first = next(iter(recipes.values()))
    for arm, recipe in recipes.items():
        _comparable(arm, recipe, first, plan)
    folder.mkdir(parents=True, exist_ok=True)
    files = written(plan, recipes, base, folder)
    arms = {arm: _arm(plan, arm, recipes[arm], files[arm], base) for arm in plan.arms}
    return Bench(plan, folder, base, code, recipes, files, arms, say, keep)


def _comparable(arm: str, recipe: Recipe, first: Recipe, plan: Comparison) -> None:
    """Raises RecipeError if an arm cannot be compared with the first one."""
    one, other = recipe.task.key(), first.task.key()
    if one != other:
        raise RecipeError(f"arm {arm}: task", f"is {one}, another arm's is {other}", "compare one task")
    unit = "flops" if plan.budget is None else plan.budget.unit
    if unit == "flops" and recipe.torch_compile:
        raise RecipeError(
            f"arm {arm}: torch_compile", "hides the FLOPs from the ledger", "give the budget in seconds or tokens"
        )
    if recipe.pace.max_steps is not None:
        what = "caps the stages, so that they could not take their shares of the budget"
        raise RecipeError(f"arm {arm}: pace.max_steps", what, "use pace.length")
    if [(e.key(), e.content()) for e in recipe.evaluators()] != [(e.key(), e.content()) for e in first.evaluators()]:
        raise RecipeError(f"arm {arm}: evaluate", "differs from another arm's", "judge all arms by the same evaluators")
    names = {n for e in recipe.evaluators() for n in e.names()}
    for key, name in (("primary", plan.primary), ("search.measure", plan.search.measure if plan.search else None)):
        if name is not None and name not in names:
            raise RecipeError(key, f"nothing in arm {arm} measures {name}", f"measured are {', '.join(sorted(names))}")


def _arm(plan: Comparison, arm: str, recipe: Recipe, files: Files, base: Path) -> Arm:
    """What planning needs to know about an arm, from its recipe and rows."""
    keys = plan.arms[arm]
    data = admit(files.put_into(recipe, files.eval), base, measure=False).gathered.data
    if recipe.pipeline is not None and not isinstance(keys, Foreign):
        return _in_stages(arm, recipe, data)
    own, a_step = Loop.length(data.train.rows, recipe), tokens_a_step(data.train, recipe)
    if isinstance(keys, Foreign):
        return Arm(arm, keys.learning_rate, a_step, own, keys)
    return Arm(arm, recipe.learning_rate, a_step, own, None, recipe.tuner.selections)


def _in_stages(name: str, recipe: Recipe, data: Data) -> Arm:
    """An arm that trains by a pipeline."""
    assert recipe.pipeline is not None
    sets = data.sets()
    found = planned(recipe.pipeline, {n: s.rows for n, s in sets.items()})
    plans = []
    for stage, rows in found:
        steps = recipe.pace.steps(Loop.length(sets[rows].rows, stage.settings))
        plans.append(StagePlan(stage.name, steps, tokens_a_step(sets[rows], stage.settings)))
    if not plans:
        raise RecipeError(f"arm {name}: pipeline", "trains nothing", "compare pipelines that train")
    own = sum(p.steps for p in plans)
    tokens = sum(p.tokens_a_step * p.steps for p in plans) / own
    rate = found[0][0].settings.learning_rate * recipe.pace.learning_rate
    return Arm(name, rate, tokens, own, stages=tuple(plans))


def compare(bench: Bench, processes: int | None = None, dry: bool = False) -> list[Standing]:
    """Carry out every run that is not done yet. Returns the standings.

    processes  runs at the same time; 0: in this process; None: as cores and memory allow, or one if the budget is in seconds
    dry        only measure what an arm's step costs, and forecast the whole comparison
    Raises Interrupted after Ctrl-C. Everything is saved first.
    """
    place = RunFolder(bench.folder)
    with place.locked():
        write_text(bench.folder / "comparison.json", bench.plan.model_dump_json(indent=1))
        _refuse_sharing(bench, processes)
        bench.look()
        left = total_runs(bench.plan) - len(bench.done)
        bench.say(f"runs    {total_runs(bench.plan)} of {len(bench.plan.arms)} arms, {len(bench.done)} done before")
        if left:
            with workers((os.cpu_count() or 1) if processes is None else processes) as pool:
                # The first, short runs go one at a time: the plan depends on what they cost.
                _carry_out(bench, pool, 1, ("measure",))
                _say_forecast(bench)
                if not dry:
                    _carry_out(bench, pool, _runs_at_a_time(bench, processes))
    return judged(bench.plan, bench.results(), bench.done)


def so_far(bench: Bench) -> list[Standing]:
    """Standings of the finished runs. Nothing is trained, and another process may be working at the same time."""
    bench.look()
    return judged(bench.plan, bench.results(), bench.done)


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into KeyboardInterrupt. The list then holds the signal."""
    seen: list[int] = []

    def stop(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    with handled(stop):
        yield seen


def _take(bench: Bench, pool: Workers) -> list[str]:
    """Store the answers of runs that ended, and return their names."""
    ended = []
    for job, answer in pool.next():
        if answer["state"] == "stopped":
            raise Interrupted("stopped")
        bench.finish(job, answer)
        ended.append(job.name)
        outcome = bench.done[job.name]
        if outcome.error is None:
            value = "" if outcome.value is None else f"  {bench.measure} {abs(outcome.value):.4g}"
            left = total_runs(bench.plan) - len(bench.done)
            bench.say(
                f"done    {job.name}  rate {job.learning_rate:.2g}, {outcome.steps} steps{value}  ({left} runs left)"
            )
    return ended


def _carry_out(bench: Bench, pool: Workers, count: int, purposes: tuple[str, ...] = ()) -> None:
    """Carry out every run that can start (with these purposes), `count` at a time. The list is made again after each run."""
    running: set[str] = set()
    while True:
        for job in bench.pending():
            wanted = not purposes or job.purpose in purposes
            if wanted and job.name not in running and pool.busy < count:
                running.add(job.name)
                pool.submit(job, bench.request(job, count))
        if not pool.busy:
            return
        running -= set(_take(bench, pool))


def _say_forecast(bench: Bench) -> None:
    """Say what a run may cost, and what is left to do."""
    budget, expected = budget_of(bench.plan, bench.arms, bench.done), forecast(bench.plan, bench.arms, bench.done)
    if budget is not None:
        shown = in_flops(budget[1]) if budget[0] == "flops" else f"{budget[1]:,.0f} {budget[0]}"
        bench.say(f"budget  {shown} a run")
    if expected is not None:
        bench.say(
            f"expect  {expected['runs']} runs, {in_flops(expected['flops'])}, "
            f"{in_time(expected['seconds'])} of one process's work, evaluation included"
        )


def _refuse_sharing(bench: Bench, asked: int | None) -> None:
    budget = bench.plan.budget
    if budget is not None and budget.seconds is not None and asked is not None and asked > 1:
        raise LuthierError(
            "--processes: a budget in seconds is only fair where runs do not share the machine; leave it out"
        )


def _runs_at_a_time(bench: Bench, asked: int | None) -> int:
    """The number of runs at the same time: one if the budget is in seconds, else as asked, or as cores and memory allow."""
    if bench.plan.budget is not None and bench.plan.budget.seconds is not None:
        return 1
    if asked is not None:
        return max(1, asked)
    peaks = [d.peak_bytes for d in bench.done.values() if d.peak_bytes]
    count = side_by_side(peaks, len(bench.plan.arms) * len(bench.plan.seeds))
    if peaks:
        bench.say(f"queue   {count} runs at a time (each at most {in_bytes(max(peaks))})")
    return count
