"""The folder of a run: its lock, log and state, and the choice of the folder for a recipe."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from luthier.recipe import Recipe
from luthier.recipe.text import parse
from luthier.support.errors import LuthierError
from luthier.support.files import write_text

# Keys that change how a run works, but not its result.
HOW = frozenset(
    {"tokens_per_forward", "gradient_checkpointing", "torch_compile", "save_steps", "save_limit", "logging_steps",
     "report_to", "output_dir"}
)  # fmt: skip


class FolderInUse(LuthierError):
    """Another process is working in the folder of a run."""


class RunFolder:
    """The folder of one run, with lock, log and state. If several processes work on one run, only the first one `writes`."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes, self._opened = path, writes, time.monotonic()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make sure that only one process works in the folder. Raises FolderInUse if another process does."""
        if not self.writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FolderInUse(
                    f"{self.path}: another process is working in this folder; wait for it, or use --fresh"
                ) from error
            yield

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        if not self.writes:
            return
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def state(self) -> dict[str, Any]:
        """The contents of run.json; empty for a new folder."""
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise LuthierError(f"{file}: is damaged ({error}); use --fresh to start in a new folder") from error

    def seconds(self) -> float:
        """Seconds of work in this folder: those noted by processes before this one, and its own."""
        return float(self.state().get("seconds", 0.0)) + time.monotonic() - self._opened

    def note(self, **more: Any) -> None:
        """Merge values into run.json in one atomic write."""
        self.write("run.json", json.dumps({**self.state(), **more}, indent=1))

    def write(self, name: str, text: str) -> None:
        """Replace a file in one atomic write."""
        if self.writes:
            write_text(self.path / name, text)


def recipe_hash(recipe: Recipe) -> str:
    """A hash that is equal for recipes with equal results. The keys of HOW may change when a run continues."""
    asked = {k: v for k, v in recipe.as_dict().items() if k not in HOW}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def differences(folder: Path, recipe: Recipe) -> list[str]:
    """Each key whose value differs from that in the recipe of the run in this folder."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        return []
    there = _flat(parse(file.read_text(encoding="utf-8"), str(file))[0])
    here = _flat(json.loads(json.dumps(recipe.as_dict())))
    return [
        f"{key} is {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key.partition(".")[0] not in HOW
    ]


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys as "a.b". Lists stay whole."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return out


def choose_folder(recipe: Recipe, name: str, fresh: bool, base: Path) -> Path:
    """Choose the folder: output_dir, or the newest unfinished run of the same recipe, or a new folder.

    name   the recipe's file name, which begins the names of new folders
    fresh  True: always a new folder
    base   the folder that output_dir is relative to
    Raises LuthierError if output_dir holds the run of another recipe, and that run made at least a step or was scored.
    """
    mine = recipe_hash(recipe)
    if recipe.output_dir is not None:
        path = base / recipe.output_dir
        there = RunFolder(path).state()
        if there and there.get("recipe_hash") != mine and not fresh and has_work(path):
            told = "; ".join(differences(path, recipe))
            raise LuthierError(
                f"output_dir: {path} holds the run of another recipe{f' ({told})' if told else ''}; "
                "choose another folder, or use --fresh"
            )
        return _unused(path) if fresh and there else path
    runs = Path("runs")
    if not fresh:
        for path in sorted(runs.glob(f"{escape(name)}-*"), reverse=True):
            state = RunFolder(path).state()
            if state.get("recipe_hash") == mine and state.get("state") != "done":
                return path
    return _unused(runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def has_work(folder: Path) -> bool:
    """True if a run did something in its folder that would be lost: it was scored, made a step, or saved anything."""
    return any((folder / name).exists() for name in ("log.jsonl", "before.json", "update.json")) or any(
        folder.glob("*/")
    )


def shared_folder(choose: Callable[[], Path]) -> Path:
    """The folder that the first of several processes chooses, for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose()
    state = PartialState(cpu=not torch.cuda.is_available())
    chosen: list[Any] = [str(choose()) if state.is_main_process else None]
    broadcast_object_list(chosen)
    return Path(chosen[0])


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
