"""How similar is an arriving update to the shadow sets? Far from them, a translation is a guess."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luthier.collaboration.translators.base import Pairs, standard

NORM_RANGE = (0.2, 5.0)  # of the shadows' median norm
QUANTILE = 0.99


class Likeness(NamedTuple):
    """norm      of the update, in units of the shadows' median norm
    distance  to the nearest shadow set, in standard form
    limit     that 99% of the shadow sets keep to their own nearest one
    """

    norm: float
    distance: float
    limit: float

    def warnings(self, who: str) -> list[str]:
        """Sentences about what is unusual; none if nothing is."""
        out = []
        if not NORM_RANGE[0] <= self.norm <= NORM_RANGE[1]:
            out.append(
                f"{who}: its norm is {self.norm:.2g} times the shadows', outside {NORM_RANGE[0]} to {NORM_RANGE[1]}"
            )
        if self.distance > self.limit:
            out.append(
                f"{who}: its nearest shadow is {self.distance:.3g} away, 99% of the shadows' are within {self.limit:.3g}"
            )
        return out


def likeness(x: Tensor, pairs: Pairs) -> Likeness:
    """How near one update [L, d] is to those of the shadow sets (their last snapshots)."""
    shadows = torch.stack([pairs.x[pairs.shadow == k][-1] for k in pairs.shadow.unique()])  # [K, L, d]
    form = standard(shadows, pairs.x_kinds)
    norms = shadows.flatten(1).norm(dim=1)
    known, new = form.apply(shadows).flatten(1), form.apply(x[None]).flatten(1)
    between = torch.cdist(known, known)
    between.fill_diagonal_(float("inf"))
    limit = torch.quantile(between.amin(1), QUANTILE)
    return Likeness(float(x.norm() / norms.median()), float(torch.cdist(new, known).min()), float(limit))


def mean_cosine(clients: Tensor) -> float:
    """Mean cosine of pairs of update vectors, [N, L, d] with N > 1. Near zero, their mean is like none of them."""
    unit = torch.nn.functional.normalize(clients.flatten(1), dim=1)
    n = len(unit)
    return float(((unit @ unit.T).sum() - n) / (n * (n - 1)))
