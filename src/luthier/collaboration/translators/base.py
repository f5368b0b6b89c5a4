"""The base class of translators, aligned pairs of updates, their standard form, and the split by shadow set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luthier.method import Method
from luthier.step.lab import Lab
from luthier.support.rng import Streams

PADDED = -1  # kind of a coordinate that a narrower layer does not have
FLOOR = 1e-8  # smallest deviation


class Pairs(NamedTuple):
    """Update vectors of the small and of the large model, tuned on the same rows.

    x        [N, L_S, d_S] float32, from `luthier.update.packing.pack`
    y        [N, L_T, d_T] float32
    shadow   [N] int64: the shadow set of a pair; snapshots of one set share it
    x_kinds  [L_S, d_S] int8, from `luthier.update.packing.kinds`: the factor that a coordinate belongs to, PADDED if none
    y_kinds  [L_T, d_T] int8
    """

    x: Tensor
    y: Tensor
    shadow: Tensor
    x_kinds: Tensor
    y_kinds: Tensor

    def checked(self, at_least: int = 2) -> Pairs:
        """Return the pairs unchanged. Raises ValueError if no translator can be fitted to them."""
        for name, values, kinds in (("x", self.x, self.x_kinds), ("y", self.y, self.y_kinds)):
            if values.shape[1:] != kinds.shape:
                raise ValueError(f"pairs.{name} is {tuple(values.shape)}, its layout {tuple(kinds.shape)}")
            if not values.is_floating_point() or not values.isfinite().all():
                raise ValueError(f"pairs.{name}: {values.dtype}, holds a value that is not finite, or no real numbers")
        if not len(self.x) == len(self.y) == len(self.shadow):
            raise ValueError(f"{len(self.x)} updates of the small model, {len(self.y)} of the large one: pair them up")
        if (sets := len(self.shadow.unique())) < at_least:
            raise ValueError(f"{sets} shadow sets where {at_least} are needed at least" + _remedy(sets, at_least))
        return self

    def take(self, which: Tensor) -> Pairs:
        """The pairs of a mask or of indices, [N]."""
        return self._replace(x=self.x[which], y=self.y[which], shadow=self.shadow[which])

    def split(self, share: float, streams: Streams) -> tuple[Pairs, Pairs]:
        """(training, validation): whole shadow sets, because snapshots of one set are nearly equal."""
        sets = self.shadow.unique()
        kept = min(max(round(share * len(sets)), 1), len(sets) - 1)
        order = torch.from_numpy(streams.at("shadow-split").permutation(len(sets)))
        training = torch.isin(self.shadow, sets[order[:kept]])
        return self.take(training), self.take(~training)

    def shuffled(self, streams: Streams) -> Pairs:
        """Pairs for a control: every small update beside the large update of another shadow set."""
        sets = self.shadow.unique()
        turned = torch.from_numpy(streams.at("shadow-shuffle").permutation(len(sets)))
        # A cycle through a random order: no set keeps its own partner.
        partner = dict(zip(sets[turned].tolist(), sets[turned.roll(1)].tolist(), strict=True))
        rows = [_nth(self.shadow, partner[int(k)], i) for k, i in _numbered(self.shadow)]
        return self._replace(y=self.y[rows])


def _remedy(sets: int, at_least: int) -> str:
    return ": use ridge, or tune on more shadow sets" if sets >= 2 and at_least > 2 else ""


def _numbered(shadow: Tensor) -> list[tuple[int, int]]:
    """The shadow set of each pair, and its number within that set."""
    seen: dict[int, int] = {}
    out = []
    for k in shadow.tolist():
        out.append((k, seen.get(k, 0)))
        seen[k] = seen.get(k, 0) + 1
    return out


def _nth(shadow: Tensor, k: int, i: int) -> int:
    rows = (shadow == k).nonzero().squeeze(1)
    return int(rows[i % len(rows)])


class Standard(NamedTuple):
    """(v - mean) / deviation. Raw low-rank updates are so small that an untrained translator learns to predict zero.

    mean       [L, d], over pairs
    deviation  [L, d]; one number for each layer and kind of factor: root mean square over pairs and coordinates
    """

    mean: Tensor
    deviation: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """[..., L, d]."""
        return (values - self.mean) / self.deviation

    def undo(self, values: Tensor) -> Tensor:
        """[..., L, d]."""
        return values * self.deviation + self.mean


def standard(values: Tensor, kinds: Tensor) -> Standard:
    """The standard form of [N, L, d] update vectors. Padded coordinates stay zero."""
    mean = values.mean(0)  # [L, d]
    square = (values - mean).square().mean(0)
    deviation = torch.ones_like(mean)
    for layer in range(len(mean)):
        for kind in kinds[layer].unique().tolist():
            here = kinds[layer] == kind
            if kind != PADDED:
                deviation[layer, here] = square[layer, here].mean().sqrt().clamp_min(FLOOR)
    return Standard(mean, deviation)


def identity(values: Tensor) -> Standard:
    """A standard form that changes nothing, as in the paper."""
    return Standard(torch.zeros_like(values[0]), torch.ones_like(values[0]))


class Translator(Method):
    """Maps update vectors of the small model to those of the large one. It learns from public pairs only."""

    standardise: bool = True
    """Centre and scale both sides by layer and kind of factor, from the training pairs."""

    def fit(self, pairs: Pairs, lab: Lab | None = None) -> Fitted:
        """Learn from pairs. Every translator has its own. Raises ValueError for pairs it cannot learn from.

        lab  for translators that ask the models
        """
        raise NotImplementedError  # the seam: every translator has its own

    def standards(self, pairs: Pairs) -> tuple[Standard, Standard]:
        if not self.standardise:
            return identity(pairs.x), identity(pairs.y)
        return standard(pairs.x, pairs.x_kinds), standard(pairs.y, pairs.y_kinds)


class Fitted:
    """A trained translator. `epochs` holds what it reported during training."""

    def __init__(self, x: Standard, y: Standard) -> None:
        self.x, self.y = x, y
        self.epochs: list[dict[str, float]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[N, L_S, d_S] -> [N, L_T, d_T], float32. Raises ValueError for vectors of another layout."""
        if x.shape[1:] != self.x.mean.shape:
            raise ValueError(
                f"update vectors are {tuple(x.shape[1:])}, the translator learnt {tuple(self.x.mean.shape)}"
            )
        if not x.is_floating_point() or not x.isfinite().all():
            raise ValueError("an update vector holds a value that is not finite, or no real numbers")
        return self.y.undo(self.translate(self.x.apply(x)))

    def translate(self, x: Tensor) -> Tensor:
        """Translate in standard form."""
        raise NotImplementedError  # the seam: every translator has its own
