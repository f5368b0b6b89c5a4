"""Runs within a run, for methods that learn by training. Each is carried out once, by the queue that comparisons use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier import recipe as recipes
from luthier.data.batch import WEIGHT
from luthier.data.columns import Carried
from luthier.data.reading import on_hub
from luthier.data.store import Rows
from luthier.evaluation.measures import Measure
from luthier.method.registry import modules_of
from luthier.recipe import Recipe
from luthier.run.folder import RunFolder
from luthier.run.queue import Workers, side_by_side, workers
from luthier.run.ready import located_model, start_folder
from luthier.run.rows import given_rows, write_rows
from luthier.step.lab import Nested
from luthier.step.outcome import Outcome
from luthier.step.progress import Progress
from luthier.support.cache import cache_folder, content_of, key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.sources import code_key
from luthier.training.loop import Interrupted
from luthier.update.files import load

# Keys of the outer recipe that a nested run does not have.
LEFT_OUT: dict[str, Any] = {
    "pipeline": None, "pace": {}, "curate": [], "collaborate": None, "report_to": [], "output_dir": None, "save_steps": None,
}  # fmt: skip
# Settings of `data` that were used when the given rows were read, and must not be used again.
READ: dict[str, Any] = {"limit": None, "train_split": "train", "temperature": 1.0}


class NestedRuns:
    """Carries out nested runs of one recipe. The results of runs that are in the cache are read.

    base       the folder that paths in the recipe are relative to
    stop       called while workers are busy; if it returns True, they save their state and Interrupted is raised
    processes  runs at the same time; 0: in this process; None: as cores and memory allow
    """

    def __init__(
        self, recipe: Recipe, base: Path, stop: Callable[[], bool] = lambda: False, processes: int | None = None
    ) -> None:
        self.recipe, self.base, self.stop, self.processes = recipe, base.resolve(), stop, processes

    def __call__(self, runs: Sequence[Nested]) -> list[Outcome]:
        """The outcome of each run, in order. Raises RecipeError for a faulty recipe, LuthierError if a run fails."""
        places = [self._place(run) for run in runs]
        # Equal runs have the same folder, so each is carried out once.
        waiting = {place: run for place, run in zip(places, runs, strict=True) if not _finished(place)}
        if waiting:
            self._carry_out(waiting)
        return [_outcome(place, run.keep) for place, run in zip(places, runs, strict=True)]

    def asked(self, run: Nested, train: Path | None = None) -> Recipe:
        """The recipe of a nested run; `train` is the file of its rows. Raises RecipeError."""
        values = {**self.recipe.as_dict(), **LEFT_OUT, **run.changes}
        data = {**self.recipe.as_dict()["data"], **run.changes.get("data", {})}
        if values["pipeline"] is None:
            data["pool"] = None
        if run.rows is not None:
            weighed = run.rows.weights is not None and WEIGHT not in data["keep"]
            keep = [*data["keep"], WEIGHT] if weighed else data["keep"]
            data |= {**READ, "train": [{"path": str(train), "columns": {}}], "keep": keep}
            if self._share is not None and "eval" not in run.changes.get(
                "data", {}
            ):  # of the recipe's rows, not of these
                data |= {"eval": self._held, "eval_by": None, "columns": {}}
        code = self.base if self._brings_code else None
        asked = recipes.load(json.dumps({**values, "data": data}), "nested run", code=code)
        if run.rows is None and self._share is not None:
            self._refuse_other_share(asked)
        return asked

    def _refuse_other_share(self, asked: Recipe) -> None:
        """Raises RecipeError if a nested run would set other rows apart: it could train on rows that this recipe holds out."""
        if asked.data == self.recipe.data:
            return
        held = given_rows(asked.data, self.base, asked.task.shapes).held
        if held is None or _keys(held) != _keys(self._held_rows):
            before = self.recipe.data.model_dump()
            changed = ", ".join(sorted(k for k, v in asked.data.model_dump().items() if v != before[k]))
            raise RecipeError(
                "nested run: data",
                f"with a change of {changed} it would hold out other rows than this run does (data.eval: {self._share:g})",
                "give the nested run its rows, or name a file in data.eval",
            )

    @property
    def _brings_code(self) -> bool:
        return any(not m.startswith("luthier.") for m in modules_of(self.recipe))

    @property
    def _share(self) -> float | None:
        """The share of its training rows that the recipe holds out."""
        return self.recipe.data.eval if isinstance(self.recipe.data.eval, float) else None

    @cached_property
    def _held_rows(self) -> Rows:
        """The rows that the recipe sets apart."""
        held = given_rows(self.recipe.data, self.base, self.recipe.task.shapes).held
        assert held is not None
        return held

    @property
    def _held(self) -> str:
        """The file of the rows that the recipe sets apart."""
        held = self._held_rows
        return str(write_rows(cache_folder() / "nested" / f"held-{held.digest}.jsonl", held, Carried()))

    @cached_property
    def _model(self) -> str:
        """Hash of the model's files, or of its id and revision if it comes from the Hub."""
        located = located_model(self.recipe, self.base)
        start = start_folder(self.recipe, self.base)
        places = [Path(p) for p in (located.path, located.adapter, start) if p is not None and Path(p).exists()]
        key = "" if Path(located.path).exists() else key_of(located.path, located.revision)
        files = [f for p in places for f in ([p] if p.is_file() else sorted(f for f in p.iterdir() if f.is_file()))]
        return key_of(key, [(f.name, content_of(f)) for f in files])

    def _place(self, run: Nested) -> Path:
        """The folder of a run in the cache. Other keys, rows, files, weights or code have another folder."""
        rows = None
        if run.rows is not None:
            rows = (run.rows.digest, None if run.rows.weights is None else run.rows.weights.tolist())
        recipe = self.asked(run, Path("rows"))
        named = [s.path for s in recipe.data.sources if run.rows is None] + [recipe.data.eval, recipe.data.pool]
        files = [self._content(n) for n in named if isinstance(n, str)]
        code = code_key("luthier.run.execute", *modules_of(recipe))
        key = key_of(recipe.as_dict(), rows, files, self._model, run.keep, code)
        return cache_folder() / "nested" / key

    def _content(self, source: str) -> str:
        path = self.base / source
        return source if on_hub(source) or not path.is_file() else content_of(path)

    def _carry_out(self, waiting: Mapping[Path, Nested]) -> None:
        """Carry out the first run alone: its memory decides how many fit in parallel."""
        first, *others = waiting.items()
        try:
            most = (os.cpu_count() or 1) if self.processes is None else self.processes
            with workers(min(len(waiting), most)) as pool:
                self._submit(pool, *first, 1)
                self._collect(pool, waiting)
                peak = RunFolder(first[0] / "run").state().get("peak_memory_bytes", 0)
                count = side_by_side([peak] if peak else [], min(len(others), most))
                while others or pool.busy:
                    while others and pool.busy < count:
                        self._submit(pool, *others.pop(0), count)
                    self._collect(pool, waiting)
        except KeyboardInterrupt:
            if not self.stop():
                raise
            raise Interrupted("stopped in a nested run") from None

    def _submit(self, pool: Workers, place: Path, run: Nested, count: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        train = place / "rows.jsonl"
        if run.rows is not None:
            write_rows(train, run.rows, self.recipe.data.carried)
        request = {
            "recipe": self.asked(run, train).as_dict(), "name": "nested run", "folder": str(place / "run"),
            "base": str(self.base), "code": str(self.base) if self._brings_code else None,
            "keep": run.keep, "judge": True, "nested": False, "threads": max(1, (os.cpu_count() or 1) // count),
        }  # fmt: skip
        pool.submit(place, request)

    def _collect(self, pool: Workers, waiting: Mapping[Path, Nested]) -> None:
        for place, answer in pool.next(self.stop):
            if answer["state"] == "stopped":
                raise KeyboardInterrupt
            if answer["state"] == "failed":
                raise LuthierError(f"nested run with {dict(waiting[place].changes)}: {answer['error']}")


def _keys(rows: Rows) -> list[str]:
    return [rows.key(i) for i in range(len(rows))]


def _finished(place: Path) -> bool:
    return RunFolder(place / "run").state().get("state") == "done"


def _outcome(place: Path, keep: bool) -> Outcome:
    """The outcome of a finished run, read from its folder."""
    folder = place / "run"
    state = RunFolder(folder).state()
    stored = json.loads((folder / "after.json").read_text(encoding="utf-8"))
    measures = [Measure.from_dict(m) for m in stored["measures"]]
    spent = state["spent"]
    took = Progress(
        step=state["steps"], tokens=state["tokens"], row_tokens=state["row_tokens"], flops=dict(spent["flops"] or {}),
        seconds=spent["seconds"] + spent["curation_seconds"],
    )  # fmt: skip
    return Outcome(
        place.name, update=load(folder) if keep else None, metrics={m.name: m.value for m in measures}, progress=took
    )
