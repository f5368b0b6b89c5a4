"""Use a finished run, or a collaboration's result: load it, generate, score, export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from luthier.data.rendering import Renderer
from luthier.decoding.base import writing_with
from luthier.federation.outcome import given_in
from luthier.inference.services import lab_with
from luthier.model.view import ModelView
from luthier.recipe import Recipe, load_file
from luthier.run.evaluations import remember
from luthier.run.ready import make_ready, tokens_and_config
from luthier.support.errors import LuthierError
from luthier.update import Update
from luthier.update.files import load


@dataclass(frozen=True)
class Tuned:
    """A recipe, its base model and its update. The recipe of a collaboration's result has no rows."""

    recipe: Recipe
    folder: Path
    view: ModelView
    renderer: Renderer
    update: Update


def state_of(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises LuthierError for another folder."""
    file = folder / "run.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not file.exists() and (folder / "update.json").exists():
            raise LuthierError(
                f"{folder}: holds an update without a recipe; open it with luthier.load, or peft"
            ) from error
        raise LuthierError(
            f"{folder}: is not a finished run ({file.name} cannot be read); give the folder of one"
        ) from error
    if state.get("state") != "done":
        raise LuthierError(f"{folder}: this run is {state.get('state')}, not done; finish it with luthier run")
    if not state.get("kept", True):
        raise LuthierError(
            f"{folder}: this run kept scores and no weights, as a comparison's arms do; run its recipe.yaml"
        )
    return state


def recipe_of(folder: Path, allow_code: bool, rows: str | None = None) -> tuple[Recipe, Path, tuple[str, ...]]:
    """(the recipe, the folder that its paths are relative to, names of its classes).

    rows  rows to score, instead of the recipe's data.eval
    """
    given = given_in(folder)
    if given is not None:
        return given.recipe(rows), Path(), ()
    state = state_of(folder)
    base = Path(state["recipe_folder"])
    recipe = load_file(folder / "recipe.yaml", code=base if allow_code else None)
    if rows is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": rows})})
    return recipe, base, tuple(state.get("classes", ()))


def open_run(folder: Path, allow_code: bool = False, quantize: bool = True) -> Tuned:
    """Load a finished run, or a collaboration's result: its base model and its update.

    quantize  False: use the original weights even if the run held them in 4 bits
    Raises LuthierError for another folder.
    """
    from luthier.model.loading import load_model

    recipe, base, classes = recipe_of(folder, allow_code)
    located, renderer, config = tokens_and_config(recipe, base)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    view = load_model(
        located, recipe.task.auto(config), dtype, tokenizer=renderer.tokenizer, labels=classes, seed=recipe.seed,
        quantize=recipe.quantize if quantize else None,
    )  # fmt: skip
    if recipe.compute is not None:
        view.phases.append(partial(recipe.compute.patch, view))
    return Tuned(recipe, folder, view, renderer, load(folder))


def answers(
    folder: Path, prompts: list[str], max_new_tokens: int, base_too: bool = False, allow_code: bool = False
) -> list[dict[str, Any]]:
    """The tuned model's answer to each prompt, or the class of a text; with `base_too` also the answer of the base
    model.
    """
    run = open_run(folder, allow_code)
    task = run.recipe.task
    lab = writing_with(
        lab_with(run.renderer, {"base": lambda: run.view}, task=task, seed=run.recipe.seed), run.recipe.decode
    )
    if base_too and not task.untuned_answers:
        raise LuthierError("--base: the base model has no trained head, so it has no answer")
    rows = [{"prompt": p} for p in prompts]
    codec, words = run.recipe.codec, [str(run.recipe.codec.encode(values)["prompt"]) for values in rows]
    before = task.replies(run.view, lab, words, max_new_tokens) if base_too else []
    with run.update.bind(run.view):
        after = task.replies(run.view, lab, words, max_new_tokens)
    out = [{**v, **reply, "answer": codec.decode(v, reply["answer"])} for v, reply in zip(rows, after, strict=True)]
    if not base_too:
        return out
    return [{**entry, "base": codec.decode(v, b["answer"])} for entry, v, b in zip(out, rows, before, strict=True)]


def scores(folder: Path, data: str | None, split_base: Path, allow_code: bool = False) -> dict[str, Any]:
    """Scores of the tuned model on rows: those of the recipe's data.eval, or `data`."""
    rows = data if data is None or data.startswith("builtin:") else str((split_base / data).resolve())
    recipe, base, _ = recipe_of(folder, allow_code, rows)
    if recipe.data.eval is None:
        raise LuthierError(f"{folder}: the recipe names no held-out rows (data.eval); name rows with --data")
    ready = make_ready(recipe, folder, base)
    update = load(folder)
    with update.bind(ready.view):
        results = ready.results(update.digest())
    values = {name: m.value for name, m in results.measures.items()}
    remember(folder, data, values)
    return values
