"""Differential privacy for one party's tuning: rows drawn at random, each row's gradient clipped, noise added to the sum.

Two data sets are neighbours if they differ by one row. The noise itself may be known, but not the seed of the noise or of the
draws: whoever knows the seed can subtract the noise. So both come from the machine's own randomness, never from a contract.
Source: Deep Learning with Differential Privacy (arXiv:1607.00133); accounting by dp-accounting (privacy loss distributions).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from luthier.data.batch import IGNORE, collate
from luthier.model.view import ModelView, as_found
from luthier.objectives.base import Clock, Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.progress import OnProgress, no_progress, steps
from luthier.training.loop import Loop
from luthier.tuners.base import Trainable, Tuner
from luthier.update import Update

FINE, COARSE = 1e-4, 3e-3


class Privacy(BaseModel, frozen=True, extra="forbid"):
    """The privacy limit: the odds that an observer gives to any one row being in the data change by a factor of at most
    e^epsilon, except with probability delta."""

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    """Upper bound on epsilon; the noise is chosen to keep it."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Smaller than one over the number of rows."""
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Largest norm of a row's gradient (C); longer gradients are scaled down to it."""


class Plan(BaseModel, frozen=True, extra="forbid"):
    """One run under a privacy limit, with everything that its accounting needs."""

    privacy: Privacy
    rows: int
    rate: float
    """Probability of each row to be in a step: batch size over rows."""
    steps: int
    """Optimiser steps of one run."""
    rounds: int = 1
    """Runs on the same rows that the limit covers together."""
    noise: float
    """Standard deviation of the noise on a sum of gradients, in units of the clip."""
    spent: float
    """Epsilon by accounting."""


def plan(privacy: Privacy, rows: int, batch_size: int, steps: int, rounds: int = 1) -> Plan:
    """The smallest noise that keeps the limit over all rounds together. Raises LuthierError for a limit without meaning."""
    if privacy.delta >= 1 / rows:
        raise LuthierError(
            f"privacy.delta: {privacy.delta:g} with {rows} rows would allow revealing a whole row; "
            f"set it below {1 / rows:.2g}"
        )
    rate = min(1.0, batch_size / rows)
    noise = noise_for(privacy.epsilon, privacy.delta, rate, rounds * steps)
    spent = epsilon_of(noise, privacy.delta, rate, rounds * steps)
    return Plan(privacy=privacy, rows=rows, rate=rate, steps=steps, rounds=rounds, noise=noise, spent=spent)


@cache
def epsilon_of(noise: float, delta: float, rate: float, steps: int, coarseness: float = FINE) -> float:
    """Epsilon of so many steps of the sampled Gaussian mechanism, by privacy loss distributions; infinite without noise.

    coarseness  of the distributions: a coarse one is faster, and its epsilon is slightly too large
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
    """The upper end, where the limit is kept, of an interval no wider than this share of it."""
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
    """One row's gradient, scaled to at most `clip` over all tensors together; nothing if it is not finite."""
    length = torch.stack([g.float().norm() for g in gradients]).norm()
    if not bool(length.isfinite()):
        return [torch.zeros_like(g) for g in gradients]
    return [g * min(1.0, clip / max(float(length), 1e-30)) for g in gradients]


def clipped_sum(
    rows: Sequence[Any], gradient: Callable[[Any], Sequence[Tensor]], like: Sequence[Tensor], clip: float
) -> list[Tensor]:
    """Sum over rows of clipped gradients, float32; zeros with the shapes of `like` if there is no row."""
    total = [torch.zeros_like(p, dtype=torch.float32) for p in like]
    for row in rows:
        for t, g in zip(total, clipped(gradient(row), clip), strict=True):
            t += g
    return total


def poisson_sample(count: int, rate: float, generator: np.random.Generator) -> list[int]:
    """The rows of a step: each is drawn independently. There may be none."""
    return np.flatnonzero(generator.random(count) < rate).tolist()


class PrivateRun:
    """A tuner's run under a plan. Every step costs the same privacy, even if no row was drawn.

    Each row has a forward and a backward pass of its own, with the mean over its own supervised tokens. With a mean over a
    batch's tokens, one row could change another row's gradient before it is clipped.
    generator  for draws and noise; None takes a secret seed from the machine. Pass one in tests only. The generators of torch and
    numpy have good statistics, but are not cryptographic.
    """

    def __init__(
        self, view: ModelView, rows: Sequence[Any], tuner: Tuner, settings: TrainSettings, plan: Plan,
        generator: np.random.Generator | None = None,
    ) -> None:  # fmt: skip
        if plan.rows != len(rows):
            raise LuthierError(f"the plan accounts for {plan.rows} rows, there are {len(rows)}; plan again")
        generator = np.random.default_rng(secrets.randbits(128)) if generator is None else generator
        self.view, self.rows, self.plan, self.generator = view, rows, plan, generator
        self.noise = torch.Generator().manual_seed(int(generator.integers(2**63)))
        self.batch = plan.rate * len(rows)
        self.trainable = tuner.attach(view, None, plan.steps)
        self.loop = Loop(view, rows, self.trainable, Sft(), settings.model_copy(update={"max_steps": plan.steps}))
        if self.trainable.steps_by_closure or self.trainable.reads_rows or self.trainable.reselects:
            self.trainable.detach()
            raise LuthierError(
                f"tuner: {tuner.key()} uses rows in ways that clipped gradients do not limit; choose lora"
            )
        self.taken = 0

    def step(self) -> int:
        """Take one noisy step. Returns the number of rows in it, which must stay secret."""
        if self.taken == self.plan.steps:
            raise LuthierError(
                f"all {self.plan.steps} steps of the plan are taken; one more would break the privacy limit"
            )
        chosen = poisson_sample(len(self.rows), self.plan.rate, self.generator)
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

    def finish(self, progress: OnProgress = no_progress) -> Update:
        """Take the remaining steps. The base model is restored afterwards."""
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
    """The gradients; they are removed from their parameters."""
    for p in params:
        yield torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None


@contextmanager
def tuning(
    view: ModelView, rows: Sequence[Any], tuner: Tuner, settings: TrainSettings, privacy: Privacy | None = None, rounds: int = 1,
) -> Iterator[tuple[Trainable, Callable[[], Any]]]:  # fmt: skip
    """(what is tuned, a function that takes one step): plain steps, or private ones under a limit over all rounds.

    The base model is restored afterwards, bit for bit.
    """
    total = Loop.length(rows, settings)
    with as_found(view):
        step: Callable[[], Any]
        if privacy is not None:
            made = plan(privacy, len(rows), settings.batch_size, total, rounds)
            run = PrivateRun(view, rows, tuner, settings, made)
            trainable, step = run.trainable, run.step
        else:
            trainable = tuner.attach(view, None, total)
            step = Loop(view, rows, trainable, Sft(), settings).step
        try:
            yield trainable, step
        finally:
            trainable.detach()
