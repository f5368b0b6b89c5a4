"""Use a finished run, a merge or the result of a collaboration: load it, ask it, score it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from luthier.data.rendering import Renderer
from luthier.decoding.base import writing_with
from luthier.evaluation.measures import beside_base
from luthier.federation.outcome import read_given
from luthier.inference.services import lab_with
from luthier.model.loading import load_model
from luthier.model.view import ModelView
from luthier.recipe import Recipe, load_file
from luthier.run.evaluations import BUILTIN, remember
from luthier.run.ready import dtype_of, make_ready, tokens_and_config
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.tuned.merged import merged_in
from luthier.update import Update
from luthier.update.files import load


class Use(NamedTuple):
    """How a model is loaded and asked: a recipe, the folder that its paths are relative to, names of the classes."""

    recipe: Recipe
    base: Path
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuned:
    """A recipe, its base model and the update. The recipe of a collaboration's result has no rows.

    view  the base model
    lab   the services around it
    """

    recipe: Recipe
    folder: Path
    view: ModelView
    renderer: Renderer
    update: Update
    lab: Lab


def state_of(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises LuthierError for another folder."""
    file = folder / "run.json"
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
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


def use_of(folder: Path, allow_code: bool, rows: str | None = None) -> Use:
    """How the model in a folder is loaded and asked. Raises LuthierError for a folder that does not say it.

    rows  rows to score, instead of the recipe's data.eval
    """
    given = read_given(folder)
    if given is not None:
        return Use(given.recipe(rows), Path())
    merged = merged_in(folder)
    if merged is not None:
        return Use(_scoring(merged.asked(folder, allow_code), rows), Path(merged.recipe_folder), merged.classes)
    state = state_of(folder)
    base = Path(state["recipe_folder"])
    recipe = load_file(folder / "recipe.yaml", code=base if allow_code else None)
    return Use(_scoring(recipe, rows), base, tuple(state.get("classes", ())))


def _scoring(recipe: Recipe, rows: str | None) -> Recipe:
    """The recipe with these held-out rows; None: with its own. A recipe without rows of its own reads them twice."""
    if rows is None:
        return recipe
    changed = {"eval": rows} | ({} if recipe.data.train else {"train": rows})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})


def lab_of(use: Use, quantize: bool = True) -> Lab:
    """The services around a base model. "base" is loaded when it is first asked for.

    quantize  False: use the original weights even if the recipe holds them in 4 bits
    """
    recipe = use.recipe
    located, renderer, config = tokens_and_config(recipe, use.base)

    def view() -> ModelView:
        found = load_model(
            located, recipe.task.auto(config), dtype_of(recipe), tokenizer=renderer.tokenizer, labels=use.classes,
            seed=recipe.seed, quantize=recipe.quantize if quantize else None,
        )  # fmt: skip
        if recipe.compute is not None:
            found.phases.append(partial(recipe.compute.patch, found))
        return found

    lab = lab_with(
        renderer, {"base": view}, task=recipe.task, seed=recipe.seed, tokens_per_forward=2 * recipe.tokens_per_forward
    )
    return writing_with(lab, recipe.decode)


def open_run(folder: Path, allow_code: bool = False, quantize: bool = True, **changes: Any) -> Tuned:
    """Load the base model and the update of a finished run, a merge, or the result of a collaboration.

    quantize  False: use the original weights even if the run held them in 4 bits
    changes   keys of the recipe that differ in this use: decode, seed
    Raises LuthierError for a folder that is none of these.
    """
    use = use_of(folder, allow_code)
    use = use._replace(recipe=use.recipe.model_copy(update=changes))
    lab = lab_of(use, quantize)
    return Tuned(use.recipe, folder, lab.view(), lab.renderer, load(folder), lab)


def answers(
    folder: Path,
    prompts: list[str],
    max_new_tokens: int,
    base_too: bool = False,
    allow_code: bool = False,
    **changes: Any,
) -> list[dict[str, Any]]:
    """The tuned model's answer to each prompt, or the class of each text.

    base_too  add the answers of the base model
    changes   keys of the recipe that differ in this use: decode, seed
    """
    run = open_run(folder, allow_code, **changes)
    task, lab = run.recipe.task, run.lab
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


class Conversation:
    """A conversation with a tuned model, which sees all turns so far."""

    def __init__(self, run: Tuned, max_new_tokens: int) -> None:
        if "messages" not in run.recipe.task.shapes:
            raise LuthierError(
                f"{run.folder}: task {run.recipe.task.key()} has no conversations; name the texts to ask about"
            )
        self.run, self.max_new_tokens = run, max_new_tokens
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> str:
        """The model's answer to the next turn. It becomes a part of the conversation."""
        run, asked = self.run, {"messages": [*self.turns, {"role": "user", "content": text}]}
        ids = run.lab.renderer.prompt_ids(run.recipe.codec.encode(asked))
        with run.update.bind(run.view):
            (done,) = run.lab.generator(run.view, [ids], self.max_new_tokens)
        answer = run.recipe.codec.decode(asked, done.text)
        self.turns = [*asked["messages"], {"role": "assistant", "content": answer}]
        return answer


def scores(
    folder: Path, data: str | None, split_base: Path, allow_code: bool = False, base_too: bool = True
) -> dict[str, dict[str, Any]]:
    """Scores of the tuned model on rows, as `measures.beside_base` gives them: rows of the recipe's data.eval, or `data`.

    base_too  score the base model on them too, unless it was scored before
    """
    rows = data if data is None or data.startswith(BUILTIN) else str((split_base / data).resolve())
    recipe, base, _ = use_of(folder, allow_code, rows)
    if recipe.data.eval is None:
        raise LuthierError(f"{folder}: the recipe names no held-out rows (data.eval); name rows with --data")
    ready = make_ready(recipe, folder, base)
    update = load(folder)
    before = ready.results().measures if base_too else {}
    with update.bind(ready.view):
        after = ready.results(update.digest()).measures
    found = {name: beside_base(m, before.get(name)) for name, m in after.items()}
    remember(folder, data, found, base_too)
    return found
