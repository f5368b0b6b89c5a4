"""Frozen lower layers, a learning rate for each depth, and re-initialised top layers (the biomedical stability study)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.additions import refuse_packed
from luthier.model.anatomy import Anatomy
from luthier.model.features import FeatureCache
from luthier.model.undo import Undo
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import DenseTrainable, ParamGroup, Trainable, Tuner, as_view
from luthier.update import Update
from luthier.update.binding import overwrite

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
    """Full tuning of the upper layers, each with its own learning rate, from a stable start.

    The lowest `freeze_blocks` blocks and the embeddings stay frozen, with dropout off. The others train with learning rates that
    fall from the top down. The top `reinit_blocks` blocks start from new weights. Adam's bias correction is on, and short
    runs should take far more than three epochs: both matter more than the rest. "Decay 0.9" means different things in the
    two published conventions.
    Cost: the backward pass stops at the lowest trained block; masters and moments of trained weights only. With `cache_features`,
    the frozen forward pass is computed once; it takes the memory of one hidden state for each token.
    Refuses: freezing all blocks, re-initialising frozen ones, quantised bases.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}), needs=frozenset({"plain_weights"}))
    source: ClassVar[Source] = Source(
        "Fine-Tuning Large Neural Language Models for Biomedical Natural Language Processing", 2021, "arXiv:2112.07869"
    )

    freeze_blocks: int = Field(0, ge=0)
    """Number of lowest blocks that stay frozen, with the embeddings; half of them suits base-size encoders."""
    decay: float = Field(0.95, gt=0, le=1)
    """Factor from one depth to the next; 1 gives the same learning rate everywhere."""
    convention: Convention = "contiguous"
    """Where the decay starts."""
    reinit_blocks: int = Field(0, ge=0)
    """Number of top blocks that start from random weights (with the pooler, if there is one)."""
    reinit_style: Literal["normal", "zero_residual"] = "normal"
    """"normal" is the published rule; "zero_residual" lets a block start as the identity."""
    cache_features: bool = False
    """Keep the output of the frozen blocks for every row, and compute it once instead of in every epoch."""
    seed: int = Field(0, ge=0)
    """Seed for new weights and stochastic rounding."""

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
        self.refuse(Facts(anatomy=view.anatomy))
        return LayerwiseTrainable(self, view)

    def check_model(self, anatomy: Anatomy) -> None:
        n = len(anatomy.blocks)
        if self.freeze_blocks >= n:
            raise RecipeError(
                "tuner.layerwise.freeze_blocks", f"{self.freeze_blocks} of {n} blocks", f"at most {n - 1} can be frozen"
            )
        if self.reinit_blocks > n - self.freeze_blocks:
            raise RecipeError(
                "tuner.layerwise.reinit_blocks", f"{self.reinit_blocks} of {n} blocks with {self.freeze_blocks} frozen",
                f"at most {n - self.freeze_blocks} are free",
            )  # fmt: skip
        if self.reinit_style == "zero_residual":
            self._refuse_other_residuals(anatomy)

    def _refuse_other_residuals(self, anatomy: Anatomy) -> None:
        """Raises RecipeError for a block to be made the identity that writes through another matrix (a convolution's)."""
        for i in range(len(anatomy.blocks) - self.reinit_blocks, len(anatomy.blocks)):
            roles = {x.role for x in anatomy.block_linears if x.block == i}
            if not {"o", "down"} <= roles:
                raise RecipeError(
                    "tuner.layerwise.reinit_style", f"zero_residual, and block {i} has no attention or MLP output projection",
                    "use normal",
                )  # fmt: skip


class LayerwiseTrainable(Trainable):
    """The upper weights with their masters, grouped by depth."""

    def __init__(self, tuner: Layerwise, view: ModelView) -> None:
        self.tuner, anatomy = tuner, view.anatomy
        refuse_packed("tuner", view.module, anatomy.parameters)
        fresh = new_weights(view, tuner.reinit_blocks, tuner.reinit_style, Streams(tuner.seed))
        super().__init__(view)
        self.frozen = {n for n in anatomy.parameters if tuner.freeze_blocks and anatomy.depth(n) <= tuner.freeze_blocks}
        self.fresh = frozenset(fresh)
        self.put(overwrite(view, fresh.items()), fresh)
        self.dense = DenseTrainable(view, [n for n in anatomy.parameters if n not in self.frozen], tuner.seed)
        self.own(self.dense)
        self._undo += [still(view.module, m) for m in frozen_modules(view, tuner.freeze_blocks)]
        self.features = FeatureCache(view, tuner.freeze_blocks) if tuner.cache_features else None
        if self.features is not None:
            self.put(self.features.install())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keeps features in training only: its rows come again, others would only fill the cache."""
        if self.features is not None:
            self.features.active = name == "train"
        try:
            yield
        finally:
            if self.features is not None:
                self.features.active = False

    def groups(self) -> list[ParamGroup]:
        """One group of matrices and one of biases and norms for each depth. The head has no weight decay if rates decay."""
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

    def after_backward(self) -> None:
        self.dense.after_backward()

    def after_step(self, clock: Any = None) -> None:
        self.dense.after_step(clock)

    def state_dict(self) -> dict[str, Tensor]:
        return self.dense.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.dense.load_state_dict(state)

    def update(self) -> Update:
        """Differences, and whole tensors for what did not start from the base."""
        return Update(self.base, self.dense.parts(self.fresh))


def frozen_modules(view: ModelView, count: int) -> list[nn.Module]:
    """The lowest `count` blocks and, where there are any, what comes before them: embeddings and their dropout."""
    if not count:
        return []
    anatomy = view.anatomy
    way = [anatomy.block_list[:i] for i, c in enumerate(anatomy.block_list) if c == "."]  # what holds the blocks
    front = []
    for holder in ["", *way]:
        for name, child in view.module.get_submodule(holder).named_children():
            full = f"{holder}.{name}" if holder else name
            if full not in (*way, anatomy.block_list) and anatomy.depth(f"{full}.weight") == 0:
                front.append(child)
    return front + [view.block(i) for i in range(count)]


def still(model: nn.Module, part: nn.Module) -> Undo:
    """Keep a part in eval mode, whatever mode the model is set to, so that all its dropout is off.

    Setting the p of dropout layers is not enough: Llama and OPT keep theirs as numbers.
    """
    part.eval()
    part.train = lambda mode=True: part  # type: ignore[method-assign]

    def undo() -> None:
        del part.train
        part.train(model.training)

    return undo


def reinitialised(anatomy: Anatomy, count: int) -> list[str]:
    """Parameters of the top `count` blocks, and the pooler's where there is one."""
    if not count:
        return []
    top = len(anatomy.blocks) - count
    inside = [n for n in anatomy.parameters if top < anatomy.depth(n) <= len(anatomy.blocks)]
    return inside + [n for n in anatomy.parameters if ".pooler." in f".{n}"]


@torch.no_grad()
def new_weights(view: ModelView, count: int, style: str, streams: Streams) -> dict[str, Tensor]:
    """Matrices and kernels ~ N(0, initializer_range), biases 0, norms neutral; with "zero_residual" output projections 0."""
    anatomy, out = view.anatomy, {}
    std = getattr(view.module.config.get_text_config(), "initializer_range", 0.02)
    roles = {x.name: x.role for x in anatomy.linears}
    for name in reinitialised(anatomy, count):
        shape = anatomy.parameters[name]
        if name.endswith(".bias"):
            out[name] = torch.zeros(shape)
        elif len(shape) > 1:
            silent = style == "zero_residual" and roles.get(name) in ("o", "down")
            draw = torch.randn(shape, generator=streams.torch("reinit", name)) * std
            out[name] = torch.zeros(shape) if silent else draw
        else:
            out[name] = neutral(view, name)
    return out


def neutral(view: ModelView, name: str) -> Tensor:
    """A norm's weight as the architecture starts it: 1 for most, 0 where the norm adds one itself (Gemma).

    Raises LuthierError for a vector that the architecture does not start by itself.
    """
    holder, _, leaf = name.rpartition(".")
    module = copy.deepcopy(view.module.get_submodule(holder))
    own = module.get_parameter(leaf)
    own.fill_(float("nan"))
    view.module._init_weights(module)
    if not bool(own.isfinite().all()):
        raise LuthierError(f"tuner.layerwise.reinit_blocks: how {name} starts is not known; set it to 0")
    return own.detach().cpu()
