"""Linear adapters behind each block's two output projections, as LiST uses them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.kernels.linear import folded
from luthier.method import Source, Traits
from luthier.model.additions import bias_of, oriented, output_adapter
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view, copies
from luthier.update import Modules, Update


class Adapter(Tuner):
    """h' = h + B (A h) on the attention's and the MLP's output, before the residual; no bias, no non-linearity.

    Both matrices start at N(0, init_std^2), so the adapter starts near the identity. It is linear, so it folds into the
    projection exactly.
    Cost: 4 R D numbers a block; activation gradients through all blocks.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}))
    source: ClassVar[Source] = Source(
        "LiST: Lite Prompted Self-training Makes Parameter-efficient Few-shot Learners",
        2021,
        "arXiv:2110.06274",
        "official code",
    )

    rank: int = Field(128, ge=1)
    """Inner width; at most a quarter of the hidden size makes sense."""
    init_std: float = Field(0.0002, ge=0)
    """Standard deviation of both matrices at the start."""
    seed: int = 0
    """Seed for the start; use another one for each student."""

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> AdapterTrainable:
        return AdapterTrainable(self, as_view(model))


class AdapterTrainable(Trainable):
    """a: module -> [R, out], b: module -> [out, R]; float32."""

    def __init__(self, tuner: Adapter, view: ModelView) -> None:
        places = [x for x in view.anatomy.block_linears if x.role in ("o", "down")]
        layers = [view.layer(x.module) for x in places]
        super().__init__(view)
        self.freeze_base()
        self.a: dict[str, nn.Parameter] = {}
        self.b: dict[str, nn.Parameter] = {}
        streams = Streams(tuner.seed)
        for x, module in zip(places, layers, strict=True):
            generator = streams.torch("adapter", x.module)
            shapes = (tuner.rank, x.shape[0]), (x.shape[0], tuner.rank)
            start = (torch.randn(shape, generator=generator) * tuner.init_std for shape in shapes)
            a, b = (nn.Parameter(t.to(view.device)) for t in start)
            self.a[x.module], self.b[x.module] = a, b
            get_a, get_b = self.add_parameter(module, "a", a), self.add_parameter(module, "b", b)
            self.put(output_adapter(module, get_a, get_b))

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup([*self.a.values(), *self.b.values()])]

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """Parameters by name, in their stored shapes, with the adapters folded in."""
        out: dict[str, Tensor] = {}
        for name in self.a:
            module = self.view.layer(name)
            weight, bias = folded(oriented(module), bias_of(module), self.a[name], self.b[name])
            out[f"{name}.weight"] = weight if oriented(module) is module.weight else weight.T
            if bias is not None:
                out[f"{name}.bias"] = bias
        return out

    def update(self) -> Update:
        return Update(self.base, (Modules(copies(self.a), copies(self.b)),))
