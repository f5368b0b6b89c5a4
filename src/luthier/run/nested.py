"""Runs within a run: what a method learns by training, each carried out once, by the same queue as a comparison's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier import recipe as recipes
from luthier.data.batch import WEIGHT
from luthier.data.reading import on_hub
from luthier.data.store import Rows
from luthier.evaluation.measures import Measure
from luthier.method.registry import modules_of
from luthier.recipe import Recipe
from luthier.run.folder import RunFolder
from luthier.run.queue import Workers, side_by_side, workers
from luthier.run.ready import located_model
from luthier.run.rows import as_lines
from luthier.step.lab import Nested
from luthier.step.outcome import Outcome
from luthier.step.progress import Progress
from luthier.support.cache import cache_folder, content_of, key_of
from luthier.support.errors import LuthierError
from luthier.support.files import replaced
from luthier.support.sources import code_key
from luthier.training.loop import Interrupted
from luthier.update.files import load

# Keys of the outer recipe that a nested run does not have.
LEFT_OUT: dict[str, Any] = {
    "pipeline": None, "pace": {}, "curate": [], "collaborate": None, "report_to": [], "output_dir": None, "save_steps": None,
}  # fmt: skip
# Of its data, where rows are given: what was done when they were read.
READ: dict[str, Any] = {"limit": None, "train_split": "train", "temperature": 1.0}


class NestedRuns:
    """Carries out nested runs of one recipe; those that were carried out before, by whichever run, are read.

    base       the folder that paths in the recipe are relative to
    processes  runs side by side; 0: in this process; None: as cores and memory allow
    stop  asked between two looks at the queue; where it says so, workers save and Interrupted is raised
    """

    def __init__(
        self, recipe: Recipe, base: Path, stop: Callable[[], bool] = lambda: False, processes: int | None = None
    ) -> None:
        self.recipe, self.base, self.stop, self.processes = recipe, base.resolve(), stop, processes

    def __call__(self, runs: Sequence[Nested]) -> list[Outcome]:
        """What each run left, in order. Raises RecipeError for one that cannot be, LuthierError where one fails."""
        places = [self._place(run) for run in runs]
        # One of several equal runs is enough.
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
            keep = (
                [*data["keep"], WEIGHT] if run.rows.weights is not None and WEIGHT not in data["keep"] else data["keep"]
            )
            data |= {**READ, "train": [{"path": str(train), "columns": {}}], "keep": keep}
        code = self.base if self._brings_code else None
        return recipes.load(json.dumps({**values, "data": data}), "nested run", code=code)

    @property
    def _brings_code(self) -> bool:
        return any(not m.startswith("luthier.") for m in modules_of(self.recipe))

    @cached_property
    def _model(self) -> str:
        """Hash of the model's files; its id and revision where it comes from the Hub."""
        located = located_model(self.recipe, self.base)
        path = Path(located.path)
        if not path.exists():
            return key_of(located.path, located.revision)
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
        return key_of([(f.name, content_of(f)) for f in files])

    def _place(self, run: Nested) -> Path:
        """Its folder in the cache, with its rows in it: other keys, rows, files, weights or code are another folder."""
        rows = None if run.rows is None else (run.rows.digest, _weights(run.rows))
        recipe = self.asked(run, Path("rows"))
        named = [s.path for s in recipe.data.sources if run.rows is None] + [recipe.data.eval, recipe.data.pool]
        files = [self._content(n) for n in named if n is not None]
        code = code_key("luthier.run.execute", *modules_of(recipe))
        key = key_of(recipe.as_dict(), rows, files, self._model, run.keep, code)
        return cache_folder() / "nested" / key

    def _content(self, source: str) -> str:
        path = self.base / source
        return source if on_hub(source) or not path.is_file() else content_of(path)

    def _carry_out(self, waiting: Mapping[Path, Nested]) -> None:
        """Carry out the first run alone: its memory decides how many fit in parallel."""
        (first, *others), done = waiting.items(), 0
        try:
            most = (os.cpu_count() or 1) if self.processes is None else self.processes
            with workers(min(len(waiting), most)) as pool:
                self._submit(pool, *first, 1)
                self._collect(pool, waiting)
                peak = RunFolder(first[0] / "run").state().get("peak_memory_bytes", 0)
                count = side_by_side([peak] if peak else [], min(len(others), most))
                while done < len(others) or pool.busy:
                    while done < len(others) and pool.busy < count:
                        self._submit(pool, *others[done], count)
                        done += 1
                    self._collect(pool, waiting)
        except KeyboardInterrupt:
            if not self.stop():
                raise
            raise Interrupted("stopped in a nested run") from None

    def _submit(self, pool: Workers, place: Path, run: Nested, count: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        train = place / "rows.jsonl"
        if run.rows is not None and not train.exists():
            with replaced(train) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(as_lines(run.rows, self.recipe.data.carried))
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


def _weights(rows: Rows) -> list[float] | None:
    return None if rows.weights is None else rows.weights.tolist()


def _finished(place: Path) -> bool:
    return RunFolder(place / "run").state().get("state") == "done"


def _outcome(place: Path, keep: bool) -> Outcome:
    """What a finished run's folder says."""
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
