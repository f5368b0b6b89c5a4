"""The contract of grad-transformer: both models, how they are tuned, and the exact tensors that tuning starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.messages import Refused
from luthier.model.fingerprint import Fingerprint
from luthier.model.view import ModelView
from luthier.step.settings import TrainSettings
from luthier.tuners.lora import Lora
from luthier.update import Chart, LowRank, Update
from luthier.update.packing import factor_deltas, from_deltas, kinds, pack, unpack

PACKING = 1  # version of the order and shape of packed updates
# Cosine between a message and A0. A difference is nearly orthogonal to its start, a whole adapter nearly parallel.
ADAPTER_COSINE = 0.5


class Side(BaseModel, frozen=True, extra="forbid"):
    """One of the two models, tuned from a fixed start."""

    base: Fingerprint
    initial: str
    """Digest of the tensors that tuning starts from (A0). Low-rank updates can be compared only if they have the same start."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the factors, by "a.NAME" and "b.NAME"."""
    scale: float
    """The addition is scale * B A."""

    @property
    def layout(self) -> tuple[int, int]:
        """(layers, numbers in each layer) of a packed update."""
        return tuple(self.kinds().shape)  # type: ignore[return-value]

    def kinds(self) -> Tensor:
        """[L, d] int8: the factor that each coordinate belongs to."""
        return kinds(self.shapes)


class Start(NamedTuple):
    """A side with its start tensors."""

    side: Side
    chart: Chart

    def update(self, coordinates: Tensor) -> Update:
        """The model's update from [L, d]: B, and A0 plus the difference in A."""
        deltas = unpack(coordinates, self.side.shapes)
        scale = {k[2:]: self.side.scale for k in self.side.shapes if k.startswith("a.")}
        return Update(self.side.base, (from_deltas(deltas, self.chart, scale),), self.chart)

    def initial(self) -> Tensor:
        """[L, d]: A0 at the coordinates of an A, zero elsewhere."""
        zeros = {k: torch.zeros(s) for k, s in self.side.shapes.items()}
        return pack(zeros | {k: t.float() for k, t in self.chart.initial.items()}).rows


def start_of(view: ModelView, tuner: Lora) -> Start:
    """The start of tuning for this model: the same on every machine for the same model and tuner."""
    trainable = tuner.attach(view)
    update = trainable.update()
    trainable.detach()
    part, chart = update.only(LowRank), update.chart
    assert part is not None and chart is not None
    shapes = {k: tuple(t.shape) for k, t in factor_deltas(part, chart).items()}
    side = Side(base=update.base, initial=chart.digest, shapes=shapes, scale=tuner.alpha / tuner.rank)
    return Start(side, chart)


class Contract(Agreement, frozen=True, extra="forbid"):
    """The contract. It is the same for all shadow runs and clients."""

    small: Side
    large: Side
    tuner: Lora
    large_learning_rate: float | None = None
    """Learning rate of the large model's runs; None: as in the settings."""
    packing: int = PACKING

    def settings_of(self, side: str) -> TrainSettings:
        """The settings for "small" or "large"."""
        if side == "small" or self.large_learning_rate is None:
            return self.settings
        return self.settings.model_copy(update={"learning_rate": self.large_learning_rate})


def refuse_other(found: Side, agreed: Side, who: str) -> None:
    """Raises Refused with the name of the first field that differs."""
    for name, is_so, should in (
        ("base", found.base.weights, agreed.base.weights),
        ("tokenizer", found.base.tokenizer, agreed.base.tokenizer),
        ("initial", found.initial, agreed.initial),
        ("shapes", found.shapes, agreed.shapes),
        ("scale", found.scale, agreed.scale),
    ):
        if is_so != should:
            raise Refused(name, f"{who} has {_short(is_so)}, the contract says {_short(should)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def refuse_vector(x: Tensor, start: Start, who: str) -> None:
    """Raises Refused for a vector that cannot be an update of this side: dtype, shape, not-finite, zero, adapter."""
    if not x.is_floating_point():
        raise Refused("dtype", f"{who} sent {x.dtype}, an update is of real numbers")
    if tuple(x.shape) != start.side.layout:
        raise Refused("shape", f"{who} sent {tuple(x.shape)}, the contract's updates are {start.side.layout}")
    if not x.isfinite().all():
        raise Refused("not-finite", f"{who} sent {int((~x.isfinite()).sum())} values that are not finite")
    if not x.any():
        raise Refused("zero", f"{who} sent an update that changes nothing")
    initial = start.initial()
    here = x.float()[initial != 0]
    cosine = torch.cosine_similarity(here, initial[initial != 0], dim=0)
    if cosine > ADAPTER_COSINE:
        raise Refused(
            "adapter", f"{who} sent a whole adapter (cosine {cosine:.2f} with its start), not the difference to it"
        )
