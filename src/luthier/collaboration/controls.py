"""Controls: updates of the large model that do not use the client's update. A translation must be better than these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.collaboration.translators.base import Pairs, Translator, standard
from luthier.collaboration.translators.ridge import Ridge
from luthier.support.rng import Streams


def mean_shadow(pairs: Pairs, x: Tensor) -> Tensor:
    """C1: the mean of the shadows' large updates, equal for all clients. x [N, L_S, d_S] -> [N, L_T, d_T]."""
    return pairs.y.mean(0).expand(len(x), *pairs.y.shape[1:])


def nearest_shadow(pairs: Pairs, x: Tensor) -> Tensor:
    """C3: the large update of the shadow whose small update is nearest in standard form."""
    form = standard(pairs.x, pairs.x_kinds)
    return pairs.y[torch.cdist(form.apply(x).flatten(1), form.apply(pairs.x).flatten(1)).argmin(1)]


def controls(pairs: Pairs, x: Tensor, translator: Translator, streams: Streams) -> dict[str, Tensor]:
    """C0, C1, C3, C4 and C5 for clients' updates x [N, L_S, d_S]. (C2 is tuned, not translated.)

    C5 is the same translator, trained on pairs of small updates with large updates of other shadow sets.
    """
    return {
        "C0 no update": pairs.y.new_zeros(len(x), *pairs.y.shape[1:]),
        "C1 mean shadow": mean_shadow(pairs, x),
        "C3 nearest shadow": nearest_shadow(pairs, x),
        "C4 ridge": Ridge().fit(pairs)(x),
        "C5 shuffled pairs": translator.fit(pairs.shuffled(streams))(x),
    }


def gap_recovered(found: float, small: float, large: float) -> float:
    """PGR in percent: 100 (found - small) / (large - small), of any measure where higher is better.

    small is the tuned small model, large is the large one tuned on the same rows. If the two are nearly equal, the result is very
    large; above 100, `large` was no upper limit. So always show it together with the three measures.
    """
    return 100 * (found - small) / (large - small) if large != small else float("nan")


def share_of_gain(found: float, untouched: float, true: float) -> float:
    """The share of the true update's gain that this loss reaches: 1 for the true update, 0 for the base model."""
    return (untouched - found) / (untouched - true) if untouched != true else float("nan")


def pooled(updates: Mapping[str, Tensor]) -> Tensor:
    """The mean over clients of [L, d], added in float64. Raises ValueError if there is no client."""
    if not updates:
        raise ValueError("no update has arrived, so there is nothing to pool")
    return torch.stack([u.double() for u in updates.values()]).mean(0).float()
