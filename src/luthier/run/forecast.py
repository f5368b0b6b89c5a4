"""The forecast of a run's memory and time: a few steps of the same recipe on a model with few layers and random weights.

Time, activations and state grow by the same amount with each layer, so two small depths are enough to extrapolate. The parts that
do not grow with depth (libraries, embeddings, the head's chunk, buffers) are measured as they are.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from luthier.data.prepare import Prepared
from luthier.data.rendering import Renderer
from luthier.inference.services import lab_with
from luthier.model.view import ModelView
from luthier.pipelines.base import Apply, applied, started, trained
from luthier.recipe import Recipe
from luthier.run.rows import tokens_a_step
from luthier.step.outcome import Outcome
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.support.units import in_bytes
from luthier.training.loop import Loop
from luthier.tuners.base import Trainable, with_head

TIMED = 3  # steps that are timed at each depth
PATIENCE = 20.0  # seconds after which one depth stops measuring


@dataclass(frozen=True)
class Forecast:
    """The forecast for one run.

    memory_bytes     peak memory of the process, or of the GPU
    seconds          of training, without evaluation
    weights          bytes of the model's weights
    trained_state    bytes of trained weights, masters, optimiser state and gradients
    activations      bytes that are kept for the backward pass
    update           bytes of the update
    trained_weights  number of trained weights
    """

    memory_bytes: int
    seconds: float
    weights: int
    trained_state: int
    activations: int
    update: int
    trained_weights: int


@dataclass(frozen=True)
class Measured:
    """What one stage costs in a miniature, and how much work the stage of the whole run is.

    layers           of the miniature
    peak             peak memory in bytes; the next four are bytes too
    trained          number of trained weights
    attach_seconds   for one choice of the weights that train
    tokens, choices  of the whole stage: tokens of its rows, and how often it chooses the weights that train
    """

    layers: int
    peak: int
    weights: int
    state: int
    activations: int
    update: int
    trained: int
    seconds_per_token: float
    attach_seconds: float
    tokens: float
    choices: int


def forecast(recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, sets: Mapping[str, Prepared]) -> Forecast:
    """Measure two miniatures and extrapolate. This takes seconds, and the memory of a few layers.

    sets  rendered rows by name; "train" is required
    """
    depth = config.get_text_config().num_hidden_layers
    first, second = depths(config)
    low = measure(recipe, config, tokenizer, sets, first)
    high = low if first == second else measure(recipe, config, tokenizer, sets, second)
    stages = [grown(a, b, depth) for a, b in zip(low, high, strict=True)]
    return Forecast(
        max(s.memory_bytes for s in stages),
        sum(s.seconds for s in stages),
        max(s.weights for s in stages),
        sum(s.trained_state for s in stages),  # each stage has checkpoints of its own
        max(s.activations for s in stages),
        max(s.update for s in stages),
        max(s.trained_weights for s in stages),
    )


def grown(low: Measured, high: Measured, depth: int) -> Forecast:
    """The forecast for one stage of a model with this number of layers, extrapolated from two miniatures."""

    def at_depth(name: str) -> float:
        a: float = getattr(low, name)
        b: float = getattr(high, name)
        if low.layers == high.layers:
            return b
        return b + (b - a) * (depth - high.layers) / (high.layers - low.layers)

    whole = {n: int(at_depth(n)) for n in ("weights", "state", "activations", "update", "trained")}
    more = sum(whole[n] - getattr(high, n) for n in ("weights", "state", "activations"))
    # At the end the update is in memory twice, trained and read back from its files, but there are no activations.
    end = 2 * whole["update"] - whole["activations"]
    stepping = max(at_depth("seconds_per_token"), high.seconds_per_token) * high.tokens
    choosing = at_depth("attach_seconds") * high.choices
    return Forecast(
        high.peak + more + max(0, end), stepping + choosing,
        whole["weights"], whole["state"], whole["activations"], whole["update"], whole["trained"],
    )  # fmt: skip


class NoForecast(NamedTuple):
    """The reason why there is no forecast."""

    reason: str


def resolved(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, sets: Mapping[str, Prepared]
) -> tuple[Recipe, Forecast | NoForecast]:
    """The recipe with gradient_checkpointing decided, and its forecast. Checkpointing is on only if memory would not be enough.

    If the recipe does not work on the small models, it may still run: some models cannot be cut, and few layers may have too
    few weights for a setting. Then there is no forecast, the reason is given, and "auto" means off. Raises RecipeError if
    the tuner refuses the model whatever its number of layers.
    """
    left_open = recipe.gradient_checkpointing == "auto"
    if recipe.quantize is not None:
        off = {"gradient_checkpointing": False} if left_open else {}
        return recipe.model_copy(update=off), NoForecast("random weights cannot be quantised like the model's")
    plain = recipe.model_copy(update={"gradient_checkpointing": False}) if left_open else recipe
    try:
        expected = forecast(plain, config, tokenizer, sets)
        if left_open and expected.memory_bytes > available_memory():
            saving = recipe.model_copy(update={"gradient_checkpointing": True})
            return saving, forecast(saving, config, tokenizer, sets)
    except Refused as refused:
        raise refused.error from None
    except (LuthierError, ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        return plain, NoForecast(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return plain, expected


def available_memory() -> int:
    """Bytes that a run may use: of the GPU, or of the machine, including what this process already holds."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    return free + _resident()


def disk_needed(recipe: Recipe, expected: Forecast) -> int:
    """Bytes that a run may write: its checkpoints, the best one, a half-written one, and the update with a merged model."""
    return (recipe.save_limit + 2) * expected.trained_state + 2 * expected.update + expected.weights


def refuse_full_disk(recipe: Recipe, expected: Forecast, folder: Path) -> None:
    """Raises LuthierError if the disk of this folder has too little room for the run."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    need, free = disk_needed(recipe, expected), shutil.disk_usage(there).free
    if need > free:
        raise LuthierError(
            f"output_dir: {folder} needs about {in_bytes(need)}, {in_bytes(free)} are free; "
            "choose a folder on another disk, or lower save_limit"
        )


def miss(expected: dict[str, Any], memory_bytes: int, seconds: float) -> dict[str, float]:
    """The relative error of a forecast: measured / forecast - 1."""
    return {
        "memory": memory_bytes / expected["memory_bytes"] - 1,
        "seconds": seconds / max(expected["seconds"], 1e-9) - 1,
    }


def depths(config: PreTrainedConfig) -> tuple[int, int]:
    """Two numbers of layers to measure: whole periods if layers alternate, and all layers of a shallow model."""
    text = config.get_text_config()
    depth, kinds = text.num_hidden_layers, list(getattr(text, "layer_types", None) or [])
    period = next((p for p in range(1, depth) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds)))), 1)
    second = period * max(2, 4 // period)
    return (period, second) if second < depth else (depth, depth)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers. Lists with one entry for each layer are shortened."""
    out = copy.deepcopy(config)
    text = out.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth and depth > 1:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return out


def measure(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, sets: Mapping[str, Prepared], layers: int
) -> list[Measured]:
    """Train a miniature for a few steps. Returns what each stage cost: one stage if the recipe has no pipeline."""
    reset_peak_memory()
    view = _miniature(recipe, with_layers(config, layers), tokenizer)
    if recipe.pipeline is not None:
        with _unheard():
            return _measured_stages(recipe, view, sets, layers)
    data = sets["train"]
    total, rows = Loop.length(data.rows, recipe), _few(data, recipe.batch_size, recipe.seed)
    weights = _bytes(view.module.parameters())
    trainable = with_head(_attached(recipe, view, total), view.anatomy.task_head)
    draw = recipe.task.draw(tokenizer, recipe.seed)
    loop = Loop(view, rows, trainable, recipe.objective, _quick(recipe, rows), compute=recipe.compute, draw=draw)
    found = _stepped(loop, layers, weights)
    return [replace(found, tokens=tokens_a_step(data, recipe) * total, choices=recipe.tuner.selections(total))]


class Refused(Exception):
    """The tuner refuses the miniature for a reason that holds for the model too."""

    def __init__(self, error: RecipeError) -> None:
        super().__init__(str(error))
        self.error = error


def _attached(recipe: Recipe, view: ModelView, total: int) -> Trainable:
    """The tuner on the miniature. Raises Refused unless the miniature is only too small for it."""
    try:
        return recipe.tuner.attach(view, None, total)
    except RecipeError as error:
        if recipe.tuner.check(recipe.facts(model_config=view.module.config, anatomy=view.anatomy, total_steps=total)):
            raise
        raise Refused(error) from error


def _measured_stages(recipe: Recipe, view: ModelView, sets: Mapping[str, Prepared], layers: int) -> list[Measured]:
    """Carry out the whole pipeline with few rows and few steps. Each stage gets what the stage before it left."""
    assert recipe.pipeline is not None
    draw, done, out = recipe.task.draw(view.tokenizer, recipe.seed), dict[str, Outcome](), []
    came: dict[str, Prepared] = dict(sets)
    few = {name: _few(data, recipe.batch_size, recipe.seed) for name, data in sets.items()}
    lab = lab_with(Renderer(view.tokenizer), {"base": lambda: view}, task=recipe.task, seed=recipe.seed, sets=few)
    while (stage := recipe.pipeline.next(done)) is not None:
        reset_peak_memory()
        inside, weights = replace(lab, done=done), _bytes(view.module.parameters())
        if isinstance(stage, Apply):
            came[stage.name] = sets[stage.like]
            done[stage.name] = applied(recipe.pipeline, stage, view, inside, done)
            seconds = done[stage.name].progress.seconds / max(sum(len(r["ids"]) for r in few[stage.like]), 1)
            tokens = float(sets[stage.like].epoch_tokens)
            out.append(Measured(layers, peak_memory(), weights, 0, 0, 0, 0, seconds, 0.0, tokens, 0))
            continue
        data = came[stage.data]
        whole = recipe.pace.of(stage, data.rows, recipe.gradient_checkpointing is True)
        total = Loop.length(data.rows, whole.settings)
        rows = done[stage.data].rows if stage.data in done else _few(data, whole.settings.batch_size, recipe.seed)
        assert rows is not None
        carried = done[stage.carry].beside if stage.carry else None
        with started(view, whole, inside, done, total) as (trainable, under):
            quick = _quick(whole.settings, rows)
            loop = Loop(view, rows, trainable, stage.objective, quick, lab=inside, carried=carried, draw=draw)
            found = _stepped(loop, layers, weights)
            done[stage.name] = trained(stage, trainable, under, loop)
        tokens, choices = tokens_a_step(data, whole.settings) * total, stage.tuner.selections(total)
        out.append(replace(found, tokens=tokens, choices=choices))
    return out


@contextmanager
def _unheard() -> Iterator[None]:
    """Switch off luthier's warnings: every miniature has few rows and a poor model."""
    logger = logging.getLogger("luthier")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stepped(loop: Loop, layers: int, weights: int) -> Measured:
    """Take the steps: the first one measures memory, the others time."""
    trainable, rows = loop.trainable, loop.rows
    started, seconds, tokens = time.perf_counter(), 0.0, 0
    with activations_of(loop.wrapped) as saved:
        loop.step()
    state = live_bytes() - weights + _gradients(trainable)
    for step in range(1, loop.total_steps):
        at = time.perf_counter()
        loop.step()
        seconds += time.perf_counter() - at
        tokens += sum(len(rows[i]["ids"]) for i in loop.order.rows(step))  # all tokens of the rows, pruned or not
        if time.perf_counter() - started > PATIENCE:
            break
    update = sum(_bytes(part.tensors().values()) for part in trainable.update().parts)
    a_token, attached = seconds / max(tokens, 1), trainable.attach_seconds
    weights_trained = sum(p.numel() for p in trainable.parameters())
    peak = peak_memory()
    return Measured(layers, peak, weights, state, max(saved), update, weights_trained, a_token, attached, 0.0, 0)


def _quick(settings: TrainSettings, rows: Sequence[Any]) -> TrainSettings:
    """The settings for a few steps, without evaluations and checkpoints."""
    changed = {
        "shuffle": False, "max_steps": max(2, min(TIMED + 1, -(-len(rows) // settings.batch_size))), "eval_steps": None,
        "save_steps": None, "early_stopping_patience": None,
    }  # fmt: skip
    return settings.model_copy(update=changed)


def _miniature(recipe: Recipe, config: PreTrainedConfig, tokenizer: Any) -> ModelView:
    dtype = config.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        model = recipe.task.auto(config).from_config(config, dtype=dtype or torch.float32)
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    return ModelView.probed(model, tokenizer)


def _few(data: Prepared, batch: int, seed: int) -> list[dict[str, Any]]:
    """The longest rows for one step, then rows drawn at random for the other steps."""
    size, lengths = min(batch, len(data.rows)), data.rows.lengths
    longest = np.argsort(-lengths, kind="stable")[:size]
    drawn = Streams(seed).at("forecast").choice(len(data.rows), TIMED * size)
    return [data.rows[int(i)] for i in (*longest, *drawn)]


# --- bytes ---


@contextmanager
def activations_of(module: nn.Module) -> Iterator[list[int]]:
    """Record the bytes kept for the backward pass in every call of the module, without weights."""
    out: list[int] = [0]
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: set[int] = set()

    def start(*_: Any) -> None:
        seen.clear()
        out.append(0)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            out[-1] += storage.nbytes()
        return tensor

    handle = module.register_forward_pre_hook(start)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield out
    finally:
        handle.remove()


def live_bytes() -> int:
    """Bytes of all tensors that are alive. Each storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _bytes(tensors: Any) -> int:
    unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(unique.values())


def _gradients(trainable: Trainable) -> int:
    """Bytes of the gradients of trained weights, and of the weights that they are written into."""
    trained = {id(p): p for p in (*trainable.parameters(), *trainable.view.module.parameters()) if p.requires_grad}
    return sum(p.nbytes for p in trained.values())


def reset_peak_memory() -> None:
    """Release free memory and start a new record of peak memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no glibc, or no permission: the peak is then that of the whole process so far
        return


def peak_memory() -> int:
    """The peak memory in bytes: allocated on the GPU if there is one, else of this process as the kernel reports it."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
