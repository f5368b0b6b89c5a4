"""Freezing lower layers, a learning rate for each depth, and re-initialised top layers (the biomedical stability study)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.anatomy import Anatomy
from luthier.model.features import FeatureCache
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import DenseTrainable, ParamGroup, Trainable, Tuner, as_view
from luthier.update import Dense, Replace, Update

Convention = Literal["contiguous", "head_gap"]


def rate_factor(depth: int, num_blocks: int, decay: float, convention: Convention) -> float:
    """Learning-rate factor at a depth (0 embeddings, i + 1 block i, n + 1 final norm and pooler, n + 2 head).

    "contiguous": head and pooler 1, top block decay, ..., block 0 decay^n, embeddings decay^(n + 1).
    "head_gap": decay^(n + 2 - depth), as in ELECTRA's code, where no block uses exponent 1.
    """
    if convention == "head_gap":
        return decay ** (num_blocks + 2 - depth)
    return decay ** max(0, num_blocks + 1 - depth)


class Layerwise(Tuner):
    """Full tuning of the upper layers, each with its own rate, from a stable start.

    `freeze_blocks` lowest blocks and the embeddings stay; the rest train at rates that fall with depth; the
    `reinit_blocks` top blocks start anew. Adam's bias correction is on, and short runs should take far more than three
    epochs: both matter more than the rest. "Decay 0.9" means different things in the two published conventions.
    Frozen blocks have their dropout off.
    Cost: the backward stops at the lowest trained block; masters and moments of trained weights only. With
    `cache_features` the frozen forward is paid once, for one hidden state a token of memory.
    Refuses: freezing all blocks, re-initialising frozen ones, quantised bases.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}), needs=frozenset({"plain_weights"}))
    source: ClassVar[Source] = Source(
        "Fine-Tuning Large Neural Language Models for Biomedical Natural Language Processing", 2021, "arXiv:2112.07869"
    )

    freeze_blocks: int = Field(0, ge=0)
    """Lowest blocks that stay, with the embeddings; half of them suits base-size encoders."""
    decay: float = Field(0.95, gt=0, le=1)
    """Factor from one depth to the next; 1 gives one rate everywhere."""
    convention: Convention = "contiguous"
    """Where the decay starts to count."""
    reinit_blocks: int = Field(0, ge=0)
    """Top blocks that start from random weights (and the pooler, where there is one)."""
    reinit_style: Literal["normal", "zero_residual"] = "normal"
    """"normal" is the published rule; "zero_residual" lets a block start as the identity."""
    cache_features: bool = False
    """Keep what the frozen blocks put out for every row, and compute it once instead of in every epoch."""
    seed: int = Field(0, ge=0)
    """For new weights and stochastic rounding."""

    def check(self, facts: Facts) -> list[Problem]:
        found = super().check(facts)
        if self.cache_features and not self.freeze_blocks:
            found.append(
                Problem("cache_features", "no block is frozen, so nothing stays the same", "set freeze_blocks")
            )
        if self.cache_features and facts.redraws:
            what = f"{facts.task} hides other tokens in every epoch, so nothing stays the same"
            found.append(Problem("cache_features", what, "remove it"))
        return found

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> LayerwiseTrainable:
        view = as_view(model)
        for problem in self.check(Facts()):
            raise RecipeError(f"layerwise.{problem.key}", problem.what, problem.remedy)
        n = len(view.anatomy.blocks)
        if self.freeze_blocks >= n:
            raise RecipeError(
                "layerwise.freeze_blocks", f"{self.freeze_blocks} of {n} blocks", f"at most {n - 1} can be frozen"
            )
        if self.reinit_blocks > n - self.freeze_blocks:
            raise RecipeError(
                "layerwise.reinit_blocks", f"{self.reinit_blocks} of {n} blocks with {self.freeze_blocks} frozen",
                f"at most {n - self.freeze_blocks} are free",
            )  # fmt: skip
        return LayerwiseTrainable(self, view)


class LayerwiseTrainable(Trainable):
    """Upper weights with masters, grouped by depth."""

    def __init__(self, tuner: Layerwise, view: ModelView) -> None:
        super().__init__(view)
        self.tuner, anatomy = tuner, view.anatomy
        self.frozen = {n for n in anatomy.parameters if tuner.freeze_blocks and anatomy.depth(n) <= tuner.freeze_blocks}
        self.original = {n: view.weight(n).detach().clone() for n in reinitialised(anatomy, tuner.reinit_blocks)}
        fresh = new_weights(view, tuner.reinit_blocks, tuner.reinit_style, Streams(tuner.seed))
        with torch.no_grad():
            for name, value in fresh.items():
                view.weight(name).copy_(value)
        self.dense = DenseTrainable(view, [n for n in anatomy.parameters if n not in self.frozen], tuner.seed)
        for i in range(tuner.freeze_blocks):
            self._without_dropout(view.block(i))
        self.features = FeatureCache(view, tuner.freeze_blocks) if tuner.cache_features else None
        if self.features is not None:
            self._undo += self.features.install()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Rows of training come again; others would only fill the cache."""
        if self.features is not None:
            self.features.active = name == "train"
        try:
            yield
        finally:
            if self.features is not None:
                self.features.active = False

    def _without_dropout(self, block: nn.Module) -> None:
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                before = module.p
                module.p = 0.0
                self._undo.append(partial(setattr, module, "p", before))

    def groups(self) -> list[ParamGroup]:
        """By depth, matrices apart from biases and norms; the head without decay of its weights."""
        anatomy, t, out = self.view.anatomy, self.tuner, []
        n = len(anatomy.blocks)
        for depth in range(n + 3):
            names = [x for x in self.dense.names if anatomy.depth(x) == depth]
            factor = rate_factor(depth, n, t.decay, t.convention)
            matrices = [self.dense.master(x) for x in names if len(anatomy.parameters[x]) > 1]
            vectors = [self.dense.master(x) for x in names if len(anatomy.parameters[x]) <= 1]
            out.append(ParamGroup(matrices, factor, 0.0 if depth > n and t.decay < 1 else None))
            out.append(ParamGroup(vectors, factor, 0.0))
        return [g for g in out if g.params]

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        return default(groups)

    def after_backward(self) -> None:
        self.dense.after_backward()

    def after_step(self, clock: Any = None) -> None:
        self.dense.after_step(clock)

    def state_dict(self) -> dict[str, Tensor]:
        return self.dense.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.dense.load_state_dict(state)

    @torch.no_grad()
    def update(self) -> Update:
        """Differences, and whole tensors for what did not start from the base."""
        (part,) = self.dense.update().parts
        assert isinstance(part, Dense)
        changes = {n: d for n, d in part.changes.items() if n not in self.original}
        whole = {n: self.dense.master(n).detach().cpu().clone() for n in self.original}
        parts: list[Dense | Replace] = [Dense(changes)] if changes else []
        return Update(self.base, (*parts, Replace(whole)) if whole else tuple(parts))

    @torch.no_grad()
    def detach(self) -> None:
        self.dense.detach()
        for name, value in self.original.items():
            self.view.weight(name).copy_(value)
        super().detach()


def reinitialised(anatomy: Anatomy, count: int) -> list[str]:
    """Parameters of the top `count` blocks, and the pooler's where there is one."""
    if not count:
        return []
    top = len(anatomy.blocks) - count
    inside = [n for n in anatomy.parameters if top < anatomy.depth(n) <= len(anatomy.blocks)]
    return inside + [n for n in anatomy.parameters if ".pooler." in f".{n}"]


@torch.no_grad()
def new_weights(view: ModelView, count: int, style: str, streams: Streams) -> dict[str, Tensor]:
    """Matrices ~ N(0, initializer_range), biases 0, norm weights 1; with "zero_residual" output projections 0."""
    anatomy, out = view.anatomy, {}
    std = getattr(view.module.config.get_text_config(), "initializer_range", 0.02)
    roles = {x.name: x.role for x in anatomy.linears}
    for name in reinitialised(anatomy, count):
        shape, module = anatomy.parameters[name], view.module.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias"):
            out[name] = torch.zeros(shape)
        elif isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            silent = style == "zero_residual" and roles.get(name) in ("o", "down")
            draw = torch.randn(shape, generator=streams.torch("reinit", name)) * std
            out[name] = torch.zeros(shape) if silent else draw
        else:
            out[name] = torch.ones(shape)
    return out
