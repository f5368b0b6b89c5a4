"""Arms of other trainers: a command trains on the comparison's rows, and its model is scored by the same code as every arm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.model.loading import Located, load_model
from luthier.model.view import ModelView
from luthier.recipe import Recipe
from luthier.run.folder import RunFolder
from luthier.run.ready import gather, make_ready
from luthier.support.errors import LuthierError
from luthier.support.files import whole

# Switches off what libraries would send.
OPT_OUT = {
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "FLWR_TELEMETRY_ENABLED": "0", "WANDB_MODE": "disabled",
}  # fmt: skip
WORDS = ("model", "train", "output", "seed", "learning_rate", "steps", "batch_size", "seconds")


def filled(command: str, values: Mapping[str, Any]) -> list[str]:
    """The command's words with {names} filled in. Raises LuthierError for an unknown name."""
    out = []
    for word in shlex.split(command):
        try:
            out.append(word.format(**values))
        except (KeyError, IndexError, ValueError) as error:
            raise LuthierError(f"command: {word!r} asks for {error}; known are {', '.join(WORDS)}") from error
    return out


def run_foreign(recipe: Recipe, folder: Path, request: Mapping[str, Any]) -> None:
    """Train with the command, then load and score the model that it left. Afterwards the folder looks like that of a run.

    request  under "foreign": command, cwd, steps, seconds, flops_a_step
    Raises LuthierError if the command fails or leaves no model.
    """
    place, asked = RunFolder(folder), request["foreign"]
    with place.locked():
        if place.state().get("state") == "done":
            return
        output = folder / "output"
        base = _base_folder(recipe, folder.parents[2] / "model")
        values = {
            "model": base, "train": recipe.data.train, "output": output, "seed": recipe.seed, "steps": asked["steps"],
            "learning_rate": recipe.learning_rate, "batch_size": recipe.batch_size, "seconds": asked["seconds"],
        }  # fmt: skip
        command, trained = filled(asked["command"], values), folder / "trained"
        place.note(state="running", command=command)
        if not trained.exists():
            trained.write_text(str(_train(command, Path(asked["cwd"]), folder)), encoding="utf-8")
        _score(recipe, folder, output, place, float(trained.read_text(encoding="utf-8")), asked)


def _base_folder(recipe: Recipe, target: Path) -> Path:
    """The base model as a plain folder, written once."""
    if not (target / "config.json").exists():
        ready = make_ready(recipe, target, Path("."), gather(recipe, Path(".")))
        with whole(target) as temporary:
            ready.view.module.save_pretrained(temporary)
            ready.renderer.tokenizer.save_pretrained(temporary)
    return target.resolve()


def _train(command: list[str], cwd: Path, folder: Path) -> float:
    """Run the command. Returns its seconds. What it prints goes to command.log."""
    started = time.perf_counter()
    with (folder / "command.log").open("w") as log:
        try:
            done = subprocess.run(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, env={**OPT_OUT, **os.environ})
        except OSError as error:
            raise LuthierError(f"command: {command[0]} cannot be started ({error.strerror})") from error
    if done.returncode:
        last = (folder / "command.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise LuthierError(
            f"command: ended with code {done.returncode}: {''.join(last)} (see {folder / 'command.log'})"
        )
    return time.perf_counter() - started


def _score(
    recipe: Recipe, folder: Path, output: Path, place: RunFolder, seconds: float, asked: Mapping[str, Any]
) -> None:
    ready = make_ready(recipe, folder, Path("."))
    before = ready.results()
    view = _left(ready.view, output, recipe)
    started = time.perf_counter()
    after = ready.results(view=view)
    place.write("after.json", json.dumps(after.as_dict(), ensure_ascii=False))
    place.write("before.json", json.dumps(before.as_dict(), ensure_ascii=False))
    flops = None if asked["flops_a_step"] is None else {"train": asked["flops_a_step"] * asked["steps"]}
    size = sum(f.stat().st_size for f in output.rglob("*.safetensors"))
    place.note(
        state="done", steps=asked["steps"] or 0, after=after.brief(), update_bytes=size, train_seconds=seconds,
        evaluation_seconds=time.perf_counter() - started, row_tokens=0, peak_memory_bytes=0,
        spent={"flops": flops, "seconds": seconds, "curation_seconds": 0.0},
    )  # fmt: skip


def _left(base: ModelView, output: Path, recipe: Recipe) -> ModelView:
    """The model in the command's output: a peft adapter over the base, or a whole model. Raises LuthierError for neither."""
    if (output / "adapter_config.json").exists():
        from peft import PeftModel

        dtype = base.dtype
        base.widen()  # in low precision, merging would lose the adapter to rounding
        merged = PeftModel.from_pretrained(base.module, str(output)).merge_and_unload().to(dtype)
        view = ModelView(merged, base.tokenizer, base.layout, base.name)
        view.singly = base.singly
        view.module.eval()
        return view
    if (output / "config.json").exists():
        return load_model(
            Located(str(output.resolve()), None, output.name),
            recipe.task.auto(base.module.config),
            tokenizer=base.tokenizer,
        )
    raise LuthierError(f"command: left no model in {output}; it should save one there, or a peft adapter")
