"""HFT: half fine-tuning. A random half of the tensors trains, evenly in each category; the other half is frozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.method import Source, Traits
from luthier.model.anatomy import Anatomy
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.window import Window
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import DenseTrainable, ParamGroup, Trainable, Tuner, as_view
from luthier.update import Dense, Replace, Update

log = logging.getLogger(__name__)
ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
PAIRS = (("q", "k"), ("q", "v"), ("o", "k"), ("o", "v"))  # with grouped queries each of them is half of the weights

# --- the plan ---

Blocks = list[dict[str, dict[str, list[str]]]]  # of each block: category -> tensor -> its parameters


def categories(anatomy: Anatomy) -> Blocks:
    """For each block: category -> tensor -> its parameters (a bias follows its matrix, a q- or k-norm its projection).

    Raises RecipeError, naming what was found, for fused projections and for blocks without one of the categories.
    """
    roles = {x.module: x.role for x in anatomy.linears}
    out = []
    for index, block in enumerate(anatomy.blocks):
        found: dict[str, dict[str, list[str]]] = {"attention": {}, "ffn": {}, "norms": {}}
        mine = [p for p in anatomy.parameters if p.startswith(block + ".")]
        for parameter in mine:
            module = parameter.rpartition(".")[0]
            category, tensor = _category(module, roles.get(module))
            if category is None:
                what = f"{parameter} is {tensor}, which hft cannot split"
                raise RecipeError("model", what, "choose the tuner full")
            found[category].setdefault(tensor, []).append(parameter)
        missing = [c for c, tensors in found.items() if not tensors]
        if missing:
            seen = ", ".join(sorted({p.rpartition(".")[0].rpartition(".")[2] for p in mine}))
            what = f"block {index} has no {missing[0]}, which hft halves; it has {seen}"
            raise RecipeError("model", what, "choose the tuner full")
        out.append(found)
    return out


def _category(module: str, role: str | None) -> tuple[str | None, str]:
    """(category, tensor that decides); None with the reason for what cannot be split."""
    name = module.rpartition(".")[2]
    if role in ATTENTION:
        return "attention", role
    if role in FFN:
        return "ffn", role
    if role in ("qkv", "gate_up"):
        return None, f"a fused projection ({name})"
    if role is not None:
        return None, f"a projection of an unknown kind ({name})"
    if name in ("q_norm", "k_norm"):
        return "attention", name[0]
    return "norms", module


def counts(blocks: int, tensors: int, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """[blocks] how many of a category's tensors train in each block: fraction * tensors on average.

    Any range of blocks is within one tensor of that. The total is rounded up at a half. Which blocks get more is random.
    """
    edges = np.floor(fraction * tensors * np.arange(blocks + 1) + 0.5)
    return generator.permutation(np.diff(edges).astype(np.int64))


def draw_plan(
    anatomy: Anatomy, fraction: float = 0.5, level: str = "category", balance: str = "params", seed: int = 0, stage: int = 0,
    embeddings: bool = True, epoch: int = 0,
) -> frozenset[str]:  # fmt: skip
    """Names of the parameters that train in an epoch of a stage. The same seed, stage and epoch give the same plan."""
    drawn = (stage, epoch) if epoch else (stage,)
    generator, blocks = Streams(seed).at("hft", *drawn), categories(anatomy)
    inside = {p for found in blocks for tensors in found.values() for ps in tensors.values() for p in ps}
    outside = {p for p in anatomy.parameters if p not in inside}
    if not embeddings:
        kept = (anatomy.embedding + ".", *([anatomy.head + "."] if anatomy.head else []))
        outside = {p for p in outside if not p.startswith(kept)}
    draw = {"category": _by_category, "layer": _by_layer, "model": _by_model}[level]
    return frozenset(outside | draw(anatomy, blocks, fraction, balance, generator))


def _by_category(
    anatomy: Anatomy, blocks: Blocks, fraction: float, balance: str, generator: np.random.Generator
) -> set[str]:
    grouped = anatomy.num_kv_heads < anatomy.num_heads
    chosen: set[str] = set()
    for category in ("attention", "ffn", "norms"):
        sizes = {len(found[category]) for found in blocks}
        each = counts(len(blocks), max(sizes), fraction, generator)
        if not each.any():
            log.warning("hft: with fraction %g no tensor of category %s trains", fraction, category)
        for found, n in zip(blocks, each, strict=True):
            names = list(found[category])
            if category == "attention" and balance == "params" and grouped and n == 2 and set(names) == set(ATTENTION):
                picked = PAIRS[generator.integers(len(PAIRS))]
            else:
                picked = tuple(generator.permutation(names)[: min(n, len(names))])
            chosen |= {p for name in picked for p in found[category][str(name)]}
    return chosen


def _by_layer(
    anatomy: Anatomy, blocks: Blocks, fraction: float, balance: str, generator: np.random.Generator
) -> set[str]:
    picked = generator.permutation(len(blocks))[: round(fraction * len(blocks))]
    return {p for i in picked for tensors in blocks[i].values() for ps in tensors.values() for p in ps}


def _by_model(
    anatomy: Anatomy, blocks: Blocks, fraction: float, balance: str, generator: np.random.Generator
) -> set[str]:
    groups = [ps for found in blocks for tensors in found.values() for ps in tensors.values()]
    sizes = [sum(math.prod(anatomy.parameters[p]) for p in ps) for ps in groups]
    chosen: set[str] = set()
    left = fraction * sum(sizes)
    for i in generator.permutation(len(groups)):
        if left <= 0:
            break
        chosen |= set(groups[i])
        left -= sizes[i]
    return chosen


def half_reset(update: Update, trainable: Iterable[str]) -> Update:
    """The update with everything outside a plan set back to the base: M theta_ft + (1 - M) theta^0.

    Raises KeyError for a plan that names parameters the update does not have, TypeError for an update that is not dense.
    """
    keep = set(trainable)
    if any(not part.linear and not part.replaces() for part in update.parts):
        raise TypeError("half_reset takes an update of whole tensors")
    changes = {n: d for part in update.parts if part.linear for n, d in part.deltas()}
    heads = {n: t for part in update.parts if not part.linear for n, t in part.tensors().items()}
    unknown = sorted(keep - changes.keys() - heads.keys())
    if unknown:
        raise KeyError(f"the plan names {unknown[0]}, which this update does not have: it belongs to another model")
    reset = Dense({n: d if n in keep else torch.zeros_like(d) for n, d in changes.items()})
    kept = {n: t for n, t in heads.items() if n in keep}
    return Update(update.base, (reset, Replace(kept)) if kept else (reset,))


# --- the method ---


class Hft(Tuner):
    """Train a random half of the tensors in every block, drawn again for each stage. The others keep their knowledge.

    Two of the attention's four matrices train, one or two of the MLP's three (alternating over shuffled blocks), one of the two
    norms, and embeddings, head and last norm. With grouped queries, `balance: params` draws from the four pairs that hold exactly
    half of the attention's weights; the plain rule gives half only on average (31% to 69% in a block). Frozen tensors have no
    gradient, no decay and no optimiser state. Every tuner that changes less forgets less: before you claim more, compare at equal
    target loss with full tuning at a lower learning rate.
    Cost: (4 + 2 f) P FLOPs a token instead of 6 P, 5/6 at one half; gradients and Adam's state halve.
    Refuses: fused projections (GPT-2's c_attn), blocks without attention, MLP or norms, quantised bases.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}), needs=frozenset({"plain_weights"}), linear=True)
    source: ClassVar[Source] = Source("HFT: Half Fine-Tuning for Large Language Models", 2024, "arXiv:2404.18466")

    fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the tensors that train."""
    level: Literal["category", "layer", "model"] = "category"
    """"category": the share in each category of each block; "layer": whole blocks; "model": any tensors, by weights."""
    balance: Literal["params", "tensors"] = "params"
    """How attention is halved with grouped queries: by number of weights, or two of four tensors of any size."""
    train_embeddings: bool = True
    """Also train embeddings and head; use false if they are tied and there are few rows."""
    resample: Literal["stage", "epoch"] = "stage"
    """Draw once for the stage, or again in every epoch (then newly frozen tensors lose their optimiser state)."""
    stage: int | None = Field(None, ge=0)
    """Number of the stage in the draw; null counts the stages of a pipeline that use hft, from 0."""
    seed: int = Field(0, ge=0)
    """Seed for the draws and for stochastic rounding."""

    def check_model(self, anatomy: Anatomy) -> None:
        categories(anatomy)

    def in_stage(self, number: int) -> Hft:
        """With another half than in the stages before, unless the recipe says which."""
        return self if self.stage is not None else self.model_copy(update={"stage": number})

    def plan(self, anatomy: Anatomy, epoch: int = 0) -> frozenset[str]:
        """Names of the parameters that train."""
        drawn = epoch if self.resample == "epoch" else 0
        return draw_plan(
            anatomy, self.fraction, self.level, self.balance, self.seed, self.stage or 0, self.train_embeddings, drawn
        )

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> Trainable:
        view = as_view(model)
        chosen = self.plan(view.anatomy)
        if self.resample == "stage":
            return DenseTrainable(view, [n for n in view.anatomy.parameters if n in chosen], self.seed)
        return EpochTrainable(self, view)


class EpochTrainable(DenseTrainable):
    """A plan for each epoch: every tensor has a master, and the tensors of the plan need gradients."""

    reselects = True

    def __init__(self, tuner: Hft, view: ModelView) -> None:
        inside = categories(view.anatomy)
        fixed = tuner.plan(view.anatomy)
        every = {p for found in inside for tensors in found.values() for ps in tensors.values() for p in ps}
        super().__init__(view, [n for n in view.anatomy.parameters if n in every or n in fixed], tuner.seed)
        self.tuner = tuner
        self._optimizer: Optimizer | None = None
        self.draw(0)

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        self._optimizer = default(groups)
        return self._optimizer

    def before_window(self, window: Window | None = None, probe: Any = None) -> None:
        epoch = 0 if window is None else int(window.clock.epoch)
        if epoch != self.epoch:
            self.draw(epoch)

    def draw(self, epoch: int) -> None:
        """Apply the plan of this epoch. Tensors that are frozen now lose their optimiser state."""
        self.epoch, self.chosen = epoch, self.tuner.plan(self.view.anatomy, epoch)
        for name in self.names:
            on = name in self.chosen
            self.view.weight(name).requires_grad_(on)
            if not on and self._optimizer is not None:
                self._optimizer.state.pop(self.master(name), None)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"epoch": torch.tensor(self.epoch)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.draw(int(state["epoch"]))
