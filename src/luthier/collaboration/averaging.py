"""Means of updates: exact in weight space, or of the factors for comparison; and tests of how good one mean is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.collaboration.rounds import shares
from luthier.data.batch import collate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward
from luthier.update import LowRank, Update

STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
OUTLIER = 10.0  # an update is an outlier if its norm is above this many medians


def averaged(updates: Mapping[str, Update], rows: Mapping[str, int]) -> Update:
    """sum of p_i U_i in weight space. It is exact for every form: ranks are stacked, dense tensors are added in float32.

    The order is that of the clients' names, so the order of arrival cannot change any bit.
    Raises ValueError with the name of the client and the first thing in which it differs from the others.
    """
    refuse_mixed(updates)
    total: Update | None = None
    for name, p in sorted(shares(rows).items()):
        term = p * updates[name]
        total = term if total is None else total + term
    assert total is not None
    return total


def refuse_mixed(updates: Mapping[str, Update]) -> None:
    """Raises ValueError for updates that cannot be averaged: other bases, forms or parameters, infinite values, or no parts."""
    names = sorted(updates)
    for name in names:
        first, other = updates[names[0]], updates[name]
        if not other.linear:
            raise ValueError(f"{name}: a {other.parts[0].kind} part is no difference of weights; it cannot be averaged")
        if not first.base.same_base(other.base):
            raise ValueError(f"{name}: tuned {other.base.weights[:12]}, {names[0]} tuned {first.base.weights[:12]}")
        kinds = [[p.kind for p in u.parts] for u in (first, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{name}: sends {kinds[1]}, {names[0]} sends {kinds[0]}; bring them into one form first")
        moved = [{n for p in u.parts for n in p.names()} for u in (first, other)]
        if odd := sorted(moved[0] ^ moved[1]):
            raise ValueError(f"{name}: {odd[0]} is changed by only one of {names[0]} and {name}")
        tensors = [t for p in other.parts for t in p.tensors().values()]
        if not tensors or not all(t.isfinite().all() for t in tensors):
            raise ValueError(f"{name}: its update is empty, or a value is not finite")


def factor_averaged(updates: Mapping[str, Update], rows: Mapping[str, int]) -> Update:
    """The mean of the factors, as a baseline. It is biased by cross terms p_i p_j B_i A_j, and exact only if all A are equal.

    Raises ValueError unless each update is one low-rank part, with equal ranks and scales.
    """
    refuse_mixed(updates)
    parts: dict[str, LowRank] = {}
    for name, u in updates.items():
        part = u.only(LowRank)
        if part is None:
            raise ValueError(f"{name}: factors can be averaged for low-rank updates only")
        parts[name] = part
    one = parts[min(parts)]
    for name, part in parts.items():
        if part.scale != one.scale or any(part.a[n].shape != one.a[n].shape for n in one.a):
            raise ValueError(f"{name}: another rank or scale; factors can be averaged for equal ones only")

    def mean(factors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {n: sum((p * factors[c][n] for c, p in shares(rows).items()), torch.zeros(())) for n in one.a}

    a, b = mean({c: p.a for c, p in parts.items()}), mean({c: p.b for c, p in parts.items()})
    whole = LowRank(a, b, one.scale, one.transposed)
    return Update(updates[min(updates)].base, (whole,))


def cosines(updates: Mapping[str, Update]) -> Tensor:
    """[N, N] float64: the cosines of all pairs, in the order of names."""
    names = sorted(updates)
    gram = torch.tensor([[updates[a].inner(updates[b]) for b in names] for a in names], dtype=torch.float64)
    length = gram.diagonal().clamp_min(1e-30).sqrt()
    return gram / length[:, None] / length


def length(update: Update) -> float:
    """The norm ||Delta|| in weight space."""
    return math.sqrt(max(update.inner(update), 0.0))


def outliers(updates: Mapping[str, Update]) -> list[str]:
    """The clients whose update is more than ten times as long as the median."""
    norms = {n: length(u) for n, u in updates.items()}
    median = float(torch.tensor(list(norms.values())).median())
    return sorted(n for n, x in norms.items() if x > OUTLIER * median)


def best_step(loss: Callable[[float], float], steps: Sequence[float] = STEPS) -> tuple[float, dict[float, float]]:
    """(the multiple of the mean with the lowest public loss, the loss of every multiple and of 0).

    If the loss at 0.5 is above those at 0 and at 1, there is a barrier: one round has failed, and more rounds are needed.
    """
    found = {s: loss(s) for s in (0.0, *steps)}
    return min(steps, key=lambda s: found[s]), found


def barrier(losses: Mapping[float, float]) -> bool:
    """Whether the loss in the middle of the line is higher than at both ends."""
    return losses[0.5] > max(losses[0.0], losses[1.0])


# --- how far one round can be from many rounds ---


class Gap(NamedTuple):
    """A bound on the distance between the model of one round and that of many rounds: smoothness * travel * horizon * clients.

    smoothness  ||grad f(w0 + Delta) - grad f(w0)|| / ||Delta||, of the mean, on public rows
    travel      the largest ||Delta_i|| / ||w0||, over the changed parameters
    """

    smoothness: float
    travel: float
    bound: float


def gap_bound(view: ModelView, updates: Mapping[str, Update], mean: Update, rows: Sequence[Any], horizon: int) -> Gap:
    """Compute the bound. It is loose: use it to compare one set-up with another.

    horizon  rounds times local epochs that one round stands for
    """
    names = sorted({n for p in mean.parts for n in p.names()})
    before = _gradient(view, names, rows)
    with mean.to("dense")[0].bind(view):
        after = _gradient(view, names, rows)
    moved = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    smoothness = float(moved.norm()) / max(length(mean), 1e-30)
    whole = math.sqrt(sum(float(view.weight(n).double().square().sum()) for n in names))
    travel = max(length(u) for u in updates.values()) / whole
    return Gap(smoothness, travel, smoothness * travel * horizon * len(updates))


def _gradient(view: ModelView, names: Sequence[str], rows: Sequence[Any]) -> list[Tensor]:
    """The gradient of the mean loss a token with respect to base weights. The model is unchanged afterwards."""
    weights = [view.weight(n) for n in names]
    flags = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        nll = Forward(collate(rows).to(view.device), view).nll()
        return [g.double() for g in torch.autograd.grad(nll.mean(), weights)]
    finally:
        for w, flag in zip(weights, flags, strict=True):
            w.requires_grad_(flag)
