"""Everything that a run needs, loaded and checked: rows, tokenizer, model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from luthier.data.prepare import Prepared
from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.decoding.base import writing_with
from luthier.evaluation.base import Exam, Results
from luthier.inference.scoring import mean_loss
from luthier.inference.services import lab_with
from luthier.integrations import tracking
from luthier.model.adapter_folder import CONFIG, config_in, is_plain, merged
from luthier.model.anatomy import Anatomy
from luthier.model.loading import (
    Located,
    adapter_on_hub,
    hub_id,
    load_config,
    load_ends,
    load_model,
    load_tokenizer,
    locate,
    named_classes,
    refuse_merging,
)
from luthier.model.quantised import is_packed_file, refuse_method
from luthier.model.refusals import refuse_architecture
from luthier.model.view import ModelView
from luthier.model.weights import refuse_damaged
from luthier.recipe import Recipe
from luthier.run import score_cache
from luthier.run.forecast import Forecast, NoForecast, resolved
from luthier.run.rows import Data, prepare_rows
from luthier.step.lab import Lab, Ledger, Runs
from luthier.support.cache import key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import beside
from luthier.tasks.base import Draw
from luthier.training.loop import Loop
from luthier.update import Dense, Replace, Update
from luthier.update.base import Part
from luthier.update.files import load, load_adapter


@dataclass
class Ready:
    """Everything that is loaded for a run."""

    recipe: Recipe
    folder: Path
    view: ModelView
    renderer: Renderer
    data: Data
    accelerator: Accelerator
    start: Update | None = None
    tick: Tick = no_tick
    nested: Runs | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def train(self) -> Prepared:
        return self.data.train

    @property
    def draw(self) -> Draw | None:
        """The function that makes an epoch's version of a row; None if rows are the same in all epochs."""
        return self.recipe.task.draw(self.renderer.tokenizer, self.recipe.seed)

    def first_rows(self, count: int) -> list[Any]:
        """The first training rows, to show: as they would be scored."""
        draw = self.draw
        return [row if draw is None else draw(row, None) for row in self.train.rows[:count]]

    def held_out_loss(self) -> float:
        assert self.data.held is not None
        return mean_loss(self.lab().scorer.losses(self.view, self.data.held.rows))

    def lab(self) -> Lab:
        """The services that methods of this run may use."""
        recipe, sets = self.recipe, {name: rows.rows for name, rows in self.data.sets().items()}
        lab = lab_with(
            self.renderer, {"base": lambda: self.view}, task=recipe.task, seed=recipe.seed, sets=sets, tick=self.tick,
            tokens_per_forward=2 * recipe.tokens_per_forward,
        )  # fmt: skip
        return writing_with(replace(lab, nested=self.nested, ledger=self.ledger), recipe.decode)

    def results(self, update: str = "none", view: ModelView | None = None) -> Results:
        """The results of a model on the held-out rows. They are read from the cache if they were measured before.

        update  the digest of the update that is on the model
        view    another model than the run's own, without an update
        """
        held, recipe, view = self.data.held, self.recipe, view or self.view
        rows_held = () if held is None else held.rows
        exam = Exam(view, self.lab(), recipe.task, rows_held, self.data.held_rows or (), recipe.codec)
        head = str(recipe.seed) if view.anatomy.task_head else ""  # the head is drawn at random before it is trained
        base = view.base
        model = key_of(base.weights, base.tokenizer, recipe.quantize, recipe.compute, recipe.decode, head, update)
        rows = "none" if held is None or self.data.held_rows is None else held.digest + self.data.held_rows.digest
        evaluators, meter = recipe.evaluators(), view.meter
        with meter.watching(view.module), meter.stage("evaluate"):
            return score_cache.kept(score_cache.exam_key(exam, evaluators, model, rows), exam, evaluators)


def located_model(recipe: Recipe, base: Path) -> Located:
    """Where the recipe's model is."""
    located = locate(recipe.model if ":" in recipe.model else beside(base, recipe.model), recipe.revision)
    return located._replace(trust_code=recipe.trust_remote_code)


def start_folder(recipe: Recipe, base: Path) -> Path | None:
    """The folder of the adapter that the recipe starts from; one on the Hub is downloaded into its cache.

    Raises RecipeError for one that cannot be taken up.
    """
    if recipe.start is None:
        return None
    folder, on_hub = Path(beside(base, recipe.start)), hub_id(recipe.start)
    if not folder.exists() and on_hub is not None:
        folder = adapter_on_hub(*on_hub, recipe.start, key="start")
    if not (folder / CONFIG).is_file():
        what = f"{recipe.start}: holds no adapter ({CONFIG})"
        raise RecipeError("start", what, "give a folder of peft's, or of a finished run with lora, or an id on the Hub")
    config_in(folder, "start")
    return folder


def _refuse_packed_start(recipe: Recipe, folder: Path | None, packed: bool) -> None:
    """Raises RecipeError for an adapter that changes weights as a whole, where these are packed."""
    if folder is not None and packed and not is_plain(config_in(folder, "start")):
        what = f"{recipe.start}: is no plain LoRA, so it would have to be added to weights, and these are packed"
        raise RecipeError("start", what, "remove quantize, or take a model with plain weights")


def started_from(recipe: Recipe, base: Path, view: ModelView) -> Update | None:
    """The update that the recipe starts from. Raises RecipeError if it belongs to another model.

    A plain LoRA stays what it is. Other adapters become differences of the weights that they change.
    """
    folder = start_folder(recipe, base)
    if folder is None:
        return None
    ours = (folder / "update.json").is_file()
    try:
        found = load(folder) if ours else load_adapter(folder, view.base)
        if ours and not found.base.same_base(view.base):
            found.refuse_misfit(view)
        if any(part.renames for part in found.parts) or not (ours or _has_its_layers(found, view)):
            return _as_difference(recipe, base, view, folder)
        found.refuse_misfit(view)
    except RecipeError:
        raise
    except LuthierError as error:
        raise RecipeError("start", f"{recipe.start}: {error}", "name the model that it was trained on") from error
    return Update(found.base, found.parts)  # its chart says where its own training began


def _has_its_layers(found: Update, view: ModelView) -> bool:
    """Whether low-rank parts of another's adapter belong to linear layers of the model; embeddings and experts are none."""
    layers = {x.module for x in view.anatomy.linears}
    return all(layers.issuperset(part.layers(view.anatomy)) for part in found.parts)


def _as_difference(recipe: Recipe, base: Path, view: ModelView, folder: Path) -> Update:
    """What an adapter makes of the weights, by peft's own code, as an update: differences, and a trained head as a whole."""
    located, auto = located_model(recipe, base), recipe.task.auto(view.module.config)
    how: dict[str, Any] = {
        "labels": view.classes if view.anatomy.task_head else (), "tokenizer": view.tokenizer, "seed": recipe.seed,
        "device": "cpu",
    }  # fmt: skip
    before = view if view.dtype == torch.float32 else load_model(located, auto, torch.float32, **how)
    after = merged(load_model(located, auto, torch.float32, **how).module, folder, "start")
    weights, head = dict(after.named_parameters()), set(view.anatomy.task_head)
    if weights.keys() != view.anatomy.parameters.keys():
        what = f"{recipe.start}: changes only one of the model's embedding and head, which are one weight"
        raise RecipeError("start", what, "set model to this adapter: it is merged then, and they become two")
    changes = {n: w.detach() - before.weight(n).detach().cpu() for n, w in weights.items() if n not in head}
    changed = Dense({n: delta for n, delta in changes.items() if bool(delta.any())})
    parts: list[Part] = [changed] if changed.changes else []
    return Update(view.base, (*parts, Replace({n: weights[n].detach() for n in head})) if head else tuple(parts))


def tokens_and_config(recipe: Recipe, base: Path) -> tuple[Any, Renderer, Any]:
    """(where the model is, renderer, configuration)."""
    located = located_model(recipe, base)
    tokenizer = load_tokenizer(located)
    config = load_config(located)
    size = getattr(config.get_text_config(), "vocab_size", None) or math.inf
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:  # the model has no embedding for it
        tokenizer.pad_token_id = tokenizer.eos_token_id
    refuse_architecture(recipe.task.auto(config), config)
    refuse_method(config, located.shown, recipe.quantize, located.path)
    refuse_merging(located, config, recipe.quantize)
    _refuse_packed_start(recipe, start_folder(recipe, base), recipe.quantize is not None or is_packed_file(config))
    if Path(located.path).is_dir():
        refuse_damaged(Path(located.path))
    plain = {"auto": None, "chat": False, "plain": True}[recipe.data.template]
    if plain is False and tokenizer.chat_template is None:
        raise RecipeError("data.template", "this model has no chat template", "set data.template: plain")
    ends, options = load_ends(located, config), recipe.data.template_options
    if unread := [name for name in options if plain or name not in str(tokenizer.chat_template)]:
        raise RecipeError(
            f"data.template_options.{unread[0]}",
            "the chat template reads no such variable",
            "look at the model's template",
        )
    return located, Renderer(tokenizer, recipe.data.system, plain, ends.ids, ends.texts, options), config


class Admitted(NamedTuple):
    """What is known of a recipe that may run: everything except the weights, and the forecast.

    recipe   with `gradient_checkpointing` decided
    anatomy  of the model, from its configuration
    """

    recipe: Recipe
    gathered: Gathered
    anatomy: Anatomy
    forecast: Forecast | NoForecast


def admit(
    recipe: Recipe,
    base: Path,
    tick: Tick = no_tick,
    processes: int = 1,
    nested: Runs | None = None,
    measure: bool = True,
) -> Admitted:
    """Decide whether a recipe may run, before its weights are loaded. `luthier check` and every run ask this function.

    nested   carries out runs within this one, for curators that learn by training
    measure  forecast memory and time with a small copy of the model
    Raises RecipeError with the first reason against it.
    """
    tracking.check(recipe.report_to)
    gathered = gather(recipe, base, tick, processes, nested)
    with torch.device("meta"):
        anatomy = Anatomy(recipe.task.auto(gathered.config).from_config(gathered.config))
    refuse_unfit(recipe, gathered.config, gathered.data.train.rows, None, processes, anatomy)
    if not measure or processes > 1:  # a miniature in one process does not have the steps of several
        left_open = recipe.gradient_checkpointing == "auto"
        recipe = recipe.model_copy(update={"gradient_checkpointing": False}) if left_open else recipe
        return Admitted(
            recipe, gathered, anatomy, NoForecast("not asked for" if processes == 1 else "several processes")
        )
    recipe, expected = resolved(recipe, gathered.config, gathered.renderer.tokenizer, gathered.data.sets())
    return Admitted(recipe, gathered, anatomy, expected)


def refuse_unfit(
    recipe: Recipe,
    config: Any,
    rows: Sized,
    layout: str | None = None,
    processes: int = 1,
    anatomy: Anatomy | None = None,
) -> None:
    """Check the methods against what is known so far. Raises RecipeError for the first combination that cannot work."""
    total = Loop.length(rows, recipe) if rows else None
    known: dict[str, Any] = {
        "model_config": config, "total_steps": total, "num_rows": len(rows), "anatomy": anatomy,
        "quantized": recipe.quantize is not None or is_packed_file(config),
    }  # fmt: skip
    recipe.check_methods(recipe.facts(**known, layout=layout, num_processes=processes))


class Gathered(NamedTuple):
    """Everything except the weights."""

    located: Located
    renderer: Renderer
    config: Any
    data: Data


def gather(
    recipe: Recipe, base: Path, tick: Tick = no_tick, processes: int = 1, nested: Runs | None = None
) -> Gathered:
    """Rows and configuration, checked against each other.

    nested  carries out runs within this one, for curators that learn by training
    """
    located, renderer, config = tokens_and_config(recipe, base)
    view = untouched(recipe, located, renderer, config)
    data = prepare_rows(recipe, renderer, config, base, view, tick, nested)
    if data.labels:
        config.update(named_classes(data.classes))
    refuse_unfit(recipe, config, data.train.rows, None, processes)
    return Gathered(located, renderer, config, data)


def untouched(recipe: Recipe, located: Located, renderer: Renderer, config: Any) -> Callable[[], ModelView]:
    """A function that returns the base model, for curators. The model is loaded at the first call."""
    loaded: list[ModelView] = []

    def view() -> ModelView:
        if not loaded:
            auto, dtype = recipe.task.auto(config), dtype_of(recipe)
            loaded.append(load_model(located, auto, dtype, tokenizer=renderer.tokenizer, seed=recipe.seed))
        return loaded[0]

    return view


def dtype_of(recipe: Recipe) -> torch.dtype | None:
    return None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def make_ready(
    recipe: Recipe, folder: Path, base: Path, gathered: Gathered | None = None, accelerator: Accelerator | None = None
) -> Ready:
    """Load and check everything. The first fault is raised as a RecipeError, before any training."""
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    located, renderer, config, data = gathered or gather(recipe, base)
    view = load_model(
        located, recipe.task.auto(config), dtype_of(recipe), labels=data.classes, tokenizer=renderer.tokenizer,
        seed=recipe.seed, quantize=recipe.quantize,
    )  # fmt: skip
    recipe.task.check_view(view)
    start = started_from(recipe, base, view)
    refuse_unfit(recipe, config, data.train.rows, view.layout, accelerator.num_processes, view.anatomy)
    if recipe.compute is not None:
        view.phases.append(partial(recipe.compute.patch, view))
    return Ready(recipe, folder, view, renderer, data, accelerator, start)
