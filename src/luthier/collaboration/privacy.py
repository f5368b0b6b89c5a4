"""Differential privacy for one party's tuning: rows drawn by coin, each row's gradient clipped, noise on the sum.

Neighbours differ by one row, there or not. What may be told of a run is its noise, not the seed of its noise or of its
coins: both come from the machine's own randomness, never from a contract, since whoever knows them takes the noise off again.
Source: Deep Learning with Differential Privacy (arXiv:1607.00133); accounting by dp-accounting (privacy loss distributions).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from luthier.data.batch import IGNORE, collate
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.progress import Progress, steps, untold
from luthier.training.loop import Loop
from luthier.tuners.base import Tuner
from luthier.update import Update

FINE, COARSE = 1e-4, 3e-3


class Privacy(BaseModel, frozen=True, extra="forbid"):
    """What is promised: an observer's odds that any one row was tuned on change by a factor of e^epsilon at most, but for a
    chance of delta."""

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    """Upper bound; noise is found so that it is kept."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Smaller than one over the number of rows."""
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Longest gradient of a row (C)."""


class Plan(BaseModel, frozen=True, extra="forbid"):
    """One run under a promise: everything that its accounting needs."""

    privacy: Privacy
    rows: int
    rate: float
    """Chance of each row to be in a step: batch size over rows."""
    steps: int
    """Optimiser steps of one run."""
    rounds: int = 1
    """Runs on the same rows that the promise covers together."""
    noise: float
    """Deviation of the noise on a sum of gradients, in units of the clip."""
    spent: float
    """Epsilon by accounting."""


def plan(privacy: Privacy, rows: int, batch_size: int, steps: int, rounds: int = 1) -> Plan:
    """The least noise that keeps the promise over all rounds together. Raises LuthierError for one that means nothing."""
    if privacy.delta >= 1 / rows:
        raise LuthierError(
            f"privacy.delta: {privacy.delta:g} with {rows} rows would allow giving one of them away; "
            f"set it below {1 / rows:.2g}"
        )
    rate = min(1.0, batch_size / rows)
    noise = noise_for(privacy.epsilon, privacy.delta, rate, rounds * steps)
    spent = epsilon_of(noise, privacy.delta, rate, rounds * steps)
    return Plan(privacy=privacy, rows=rows, rate=rate, steps=steps, rounds=rounds, noise=noise, spent=spent)


@cache
def epsilon_of(noise: float, delta: float, rate: float, steps: int, coarseness: float = FINE) -> float:
    """Epsilon of so many steps of the sampled Gaussian mechanism, by privacy loss distributions; infinite without noise.

    coarseness  of the distributions: a coarse one is quick, and too large by a little
    """
    if noise == 0:
        return math.inf
    accounting, pld = _accounting()
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation, value_discretization_interval=coarseness)
    return float(accountant.compose(_event(accounting, noise, rate, steps)).get_epsilon(delta))


@cache
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier, to 1%, under which epsilon is kept."""
    high = 1.0
    while epsilon_of(high, delta, rate, steps, COARSE) > epsilon:
        high *= 2
    high = _bisected(0.0, high, 0.1, lambda noise: epsilon_of(noise, delta, rate, steps, COARSE) <= epsilon)
    low = 0.9 * high
    while epsilon_of(low, delta, rate, steps) <= epsilon:
        low, high = 0.9 * low, low
    return _bisected(low, high, 0.01, lambda noise: epsilon_of(noise, delta, rate, steps) <= epsilon)


def _bisected(low: float, high: float, share: float, kept: Callable[[float], bool]) -> float:
    """The upper end, where the promise is kept, of an interval no wider than a share of it."""
    while high - low > share * high:
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def _event(accounting: Any, noise: float, rate: float, steps: int) -> Any:
    one = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
    return accounting.SelfComposedDpEvent(one, steps)


def _accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise LuthierError("accounting needs dp-accounting: pip install 'luthier[private]'") from error
    return dp_accounting, pld


# --- the mechanism ---


def clipped(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
    """One row's gradient, no longer than `clip` over all tensors together; nothing where it is not finite."""
    length = torch.stack([g.float().norm() for g in gradients]).norm()
    if not bool(length.isfinite()):
        return [torch.zeros_like(g) for g in gradients]
    return [g * min(1.0, clip / max(float(length), 1e-30)) for g in gradients]


def clipped_sum(
    rows: Sequence[Any], gradient: Callable[[Any], Sequence[Tensor]], like: Sequence[Tensor], clip: float
) -> list[Tensor]:
    """Sum over rows of clipped gradients, float32; zeros of the shapes of `like` for no row."""
    total = [torch.zeros_like(p, dtype=torch.float32) for p in like]
    for row in rows:
        for t, g in zip(total, clipped(gradient(row), clip), strict=True):
            t += g
    return total


def coins(count: int, rate: float, generator: np.random.Generator) -> list[int]:
    """Which rows are in a step: each by a coin of its own. May be none."""
    return np.flatnonzero(generator.random(count) < rate).tolist()


class PrivateRun:
    """A tuner's run under a plan. Every step costs the same privacy, whether it met rows or not.

    Each row is a forward and a backward of its own, with the mean over its own supervised tokens: a mean over a batch's
    tokens would let one row change another's gradient before it is clipped.
    generator  of coins and noise; None takes a seed from the machine that nobody learns. Pass one in tests only. Torch's
               and numpy's generators are good statistics, no cryptography.
    """

    def __init__(
        self, view: ModelView, rows: Sequence[Any], tuner: Tuner, settings: TrainSettings, plan: Plan,
        generator: np.random.Generator | None = None,
    ) -> None:  # fmt: skip
        if plan.rows != len(rows):
            raise LuthierError(f"the plan accounts for {plan.rows} rows, there are {len(rows)}; plan again")
        generator = np.random.default_rng(secrets.randbits(128)) if generator is None else generator
        self.view, self.rows, self.plan, self.coins = view, rows, plan, generator
        self.noise = torch.Generator().manual_seed(int(generator.integers(2**63)))
        self.batch = plan.rate * len(rows)
        self.trainable = tuner.attach(view, None, plan.steps)
        self.loop = Loop(view, rows, self.trainable, Sft(), settings.model_copy(update={"max_steps": plan.steps}))
        if self.trainable.steps_by_closure or self.trainable.reads_rows or self.trainable.reselects:
            self.trainable.detach()
            raise LuthierError(
                f"tuner: {tuner.key()} looks at rows in ways that clipping their gradients does not bound; choose lora"
            )
        self.taken = 0

    def step(self) -> int:
        """One noisy step; returns how many rows were in it, which nobody else may learn."""
        if self.taken == self.plan.steps:
            raise LuthierError(f"all {self.plan.steps} steps of the plan are taken; one more would break its promise")
        chosen = coins(len(self.rows), self.plan.rate, self.coins)
        params = list(self.trainable.parameters())
        clip, scale = self.plan.privacy.clip, self.plan.noise * self.plan.privacy.clip
        total = clipped_sum([self.rows[i] for i in chosen], self._gradient, params, clip)
        for p, t in zip(params, total, strict=True):
            noise = torch.randn(t.shape, generator=self.noise).to(t.device)
            p.grad = ((t + scale * noise) / self.batch).to(p.dtype)
        self.loop.optimizer.step()
        self.loop.optimizer.zero_grad(set_to_none=True)
        self.loop.scheduler.step()
        self.taken += 1
        self.trainable.after_step(Clock(self.taken, self.plan.steps, 0.0))
        return len(chosen)

    def finish(self, progress: Progress = untold) -> Update:
        """Take the steps that are left; the base is back afterwards."""
        try:
            for _ in steps(self.plan.steps, progress, self.taken):
                self.step()
            return self.trainable.update()
        finally:
            self.trainable.detach()

    def _gradient(self, row: Any) -> list[Tensor]:
        self.view.module.train()
        fwd = Forward(collate([row]).to(self.view.device), self.view)
        count = sum(y != IGNORE for y in row["labels"])
        with self.view.phase("train"):
            loss = sum((t.weight * t.sums.sum() for t in Sft().loss(fwd).values()), torch.zeros(())) / max(count, 1)
            loss.backward()
        self.trainable.after_backward()
        return list(_taken(self.trainable.parameters()))


def _taken(params: Iterator[nn.Parameter]) -> Iterator[Tensor]:
    """Gradients, which are then gone from their parameters."""
    for p in params:
        yield torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
