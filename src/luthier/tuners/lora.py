"""LoRA: a low-rank addition to selected matrices."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.method import Source, Traits
from luthier.model.additions import low_rank_adapter
from luthier.model.anatomy import Linear
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view, copies
from luthier.update import Chart, LowRank, Update


class Lora(Tuner):
    """Train two thin matrices beside each frozen one: W + (alpha / rank) B A.

    A starts Kaiming-uniform (a = sqrt 5) from a generator keyed by seed and layer name, B starts at zero, so the model
    is unchanged at first. Both are float32 masters, used in the model's precision. Files and names are peft's.
    Cost: about 4 P FLOPs a token instead of 6 P; 16 bytes for each trained number with AdamW.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}), linear=True)
    source: ClassVar[Source] = Source(
        "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "arXiv:2106.09685", "eq. 3"
    )

    rank: int = Field(16, ge=1)
    """Rank R of the addition."""
    alpha: float = Field(32.0, gt=0)
    """The addition is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the addition's inputs that are set to zero in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """"all-linear" (every matrix of the blocks), or patterns of module names; every pattern must match."""
    seed: int = 0
    """Seed for the start of A."""

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> LoraTrainable:
        return LoraTrainable(self, as_view(model))


class LoraTrainable(Trainable):
    """a: parameter -> [R, in], b: parameter -> [out, R]; float32."""

    def __init__(self, tuner: Lora, view: ModelView) -> None:
        self.targets = view.anatomy.match(tuner.targets)
        full = max(min(x.shape) for x in self.targets)
        if tuner.rank > full:
            what = f"is {tuner.rank}, and no matrix here has a higher rank than {full}"
            raise RecipeError("tuner.lora.rank", what, "set a smaller rank, or tuner: full")
        # This refuses, if at all, before anything is changed.
        layers = [view.layer(x.module, beside=True) for x in self.targets]
        super().__init__(view)
        self.freeze_base()
        self.scale = tuner.alpha / tuner.rank
        self.a: dict[str, nn.Parameter] = {}
        self.b: dict[str, nn.Parameter] = {}
        streams = Streams(tuner.seed)
        for x, module in zip(self.targets, layers, strict=True):
            a = nn.Parameter(initial_a(x, tuner.rank, streams).to(view.device))
            b = nn.Parameter(torch.zeros(x.shape[0], tuner.rank, device=view.device))
            self.a[x.name], self.b[x.name] = a, b
            get_a, get_b = self.add_parameter(module, "a", a), self.add_parameter(module, "b", b)
            self.put(low_rank_adapter(module, get_a, get_b, self.scale, tuner.dropout))
        self.initial = {f"a.{n}": a.detach().clone() for n, a in self.a.items()}

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup([*self.a.values(), *self.b.values()])]

    def state_dict(self) -> dict[str, Tensor]:
        out = {f"a.{n}": t.detach() for n, t in self.a.items()} | {f"b.{n}": t.detach() for n, t in self.b.items()}
        return out | {f"initial.{n}": t for n, t in self.initial.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for kind, tensors in (("a", self.a), ("b", self.b)):
            for n, t in tensors.items():
                t.copy_(state[f"{kind}.{n}"])
        self.initial = {n: state[f"initial.{n}"] for n in self.initial}

    def update(self) -> Update:
        transposed = frozenset(x.name for x in self.targets if x.transposed)
        part = LowRank(copies(self.a), copies(self.b), dict.fromkeys(self.a, self.scale), transposed)
        return Update(self.base, (part,), Chart({n: t.cpu() for n, t in self.initial.items()}))


def initial_a(linear: Linear, rank: int, streams: Streams) -> Tensor:
    """[R, in]: Kaiming-uniform with a = sqrt 5, that is U(-1/sqrt(in), 1/sqrt(in))."""
    limit = 1 / math.sqrt(linear.shape[1])
    generator = streams.torch("lora", linear.module)
    return torch.empty(rank, linear.shape[1]).uniform_(-limit, limit, generator=generator)
