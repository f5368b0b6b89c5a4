"""FedKSeed: tune all weights with forward passes only. The result is one number for each of K agreed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.additions import refuse_packed
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError, RecipeError
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view, copies, writes_to
from luthier.update import Replace, Seeds, Update
from luthier.update.vectors import noise

HISTORY_CLIP = 1000.0

# --- the mathematics ---


def seed_pool(count: int, master: int) -> np.ndarray:
    """[K] distinct int64 seeds in [1, 1e11), generated from one master seed in the same way on every party."""
    generator = np.random.default_rng(master)
    seeds: dict[int, None] = {}
    while len(seeds) < count:
        seeds.update(dict.fromkeys(generator.integers(1, 10**11, size=count - len(seeds)).tolist()))
    return np.array(list(seeds)[:count], dtype=np.int64)


def projected_gradient(loss_plus: float, loss_minus: float, epsilon: float) -> float:
    """(L+ - L-) / 2 epsilon, rounded to the float32 that is sent, so that every party uses the same number."""
    return float(np.float32((float(loss_plus) - float(loss_minus)) / (2 * epsilon)))


def seed_probabilities(history: Sequence[Sequence[float]]) -> np.ndarray:
    """FedKSeed-Pro: softmax over seeds of their mean magnitude so far, scaled to [0, 1]. `history[j]` starts at [0.0]."""
    h = np.array([np.abs(np.clip(g, -HISTORY_CLIP, HISTORY_CLIP)).mean() for g in history])
    u = (h - h.min()) / (h.max() - h.min() + 1e-10)
    p = np.exp(u)
    shares: np.ndarray = p / p.sum()
    return shares


# --- the client ---


class ZerothOrder(Optimizer):
    """Steps along one of K random directions by a central difference of the loss."""

    def __init__(self, params: list[nn.Parameter], lr: float, client: FedKSeedTrainable) -> None:
        super().__init__(params, {"lr": lr})
        self.client = client

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        if closure is None:
            raise TypeError("FedKSeed needs losses: call step with a closure that returns one")
        lr = self.param_groups[0]["lr"]
        if lr != self.client.learning_rate:
            raise LuthierError(
                "tuner.fedkseed: its replay needs a constant learning rate; set lr_scheduler_type: constant"
            )
        return self.client.zo_step(closure, lr)


class FedKSeed(Tuner):
    """The client's side: two forward passes a step, no gradient, no optimiser state.

    Each step draws one of `num_seeds` agreed seeds. z(seed) is a random direction over all weights; it is made again whenever
    it is needed. The update is seeds and scalars; rebuilding the model from them is exact up to rounding. z is keyed by seed and
    tensor and drawn on the CPU in float32, so parties with other devices get the same z (the official code draws on the
    GPU in the model's precision, with one generator for all tensors).
    Cost: two forwards and three noise passes a step; memory of inference.
    Refuses: weight decay and learning-rate schedules, because they would make the replay wrong.
    """

    traits: ClassVar[Traits] = Traits(
        claims=frozenset({"weight", "loop"}), needs=frozenset({"closure", "one_process", "plain_weights"}), linear=True
    )
    source: ClassVar[Source] = Source(
        "Federated Full-Parameter Tuning of Billion-Sized LMs with Communication Cost under 18 Kilobytes",
        2023, "arXiv:2312.06353", "official code",
    )  # fmt: skip

    num_seeds: int = Field(4096, ge=1)
    """Number of agreed directions (K)."""
    epsilon: float = Field(5e-4, gt=0)
    """Size of the perturbation; float32 needs 5e-4."""
    seed_pool: int = Field(0, ge=0)
    """Master seed of the K seeds; it must be equal on all parties."""
    seed: int = Field(0, ge=0)
    """Seed for this party's draws among them."""

    def check(self, facts: Facts) -> list[Problem]:
        problems, s = super().check(facts), facts.settings
        if s is not None and (s.lr_scheduler_type != "constant" or s.weight_decay or s.warmup_fraction):
            problems.append(
                Problem(
                    "lr_scheduler_type",
                    f"{s.lr_scheduler_type} with weight_decay {s.weight_decay} and warmup_fraction {s.warmup_fraction}: "
                    "FedKSeed's replay needs constant lr and zero decay",
                    "set lr_scheduler_type: constant, weight_decay: 0, warmup_fraction: 0",
                )
            )
        return problems

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None,
        probabilities: np.ndarray | None = None,
    ) -> FedKSeedTrainable:  # fmt: skip
        """probabilities  [K] from the server (Pro); None draws uniformly."""
        view = as_view(model)
        refuse_packed("fedkseed", view.module, view.anatomy.parameters)
        return FedKSeedTrainable(self, view, probabilities)


class FedKSeedTrainable(Trainable):
    """The accumulated scalars, and the weights that follow from them."""

    steps_by_closure = True

    def __init__(self, tuner: FedKSeed, view: ModelView, probabilities: np.ndarray | None = None) -> None:
        super().__init__(view)
        self.freeze_base()
        view.module.eval()
        self.tuner = tuner
        self.seeds = seed_pool(tuner.num_seeds, tuner.seed_pool)
        self.probabilities = probabilities
        head = view.anatomy.task_head  # last, so that the noise of all others is keyed as the update keys it
        self.names = [*(n for n in view.anatomy.parameters if n not in head), *head]
        self.start = {n: view.weight(n).detach().clone() for n in self.names}
        self.put(writes_to(view, self.start), self.names)
        low = any(t.dtype != torch.float32 for t in self.start.values())
        # In low precision a perturbation cannot be removed exactly: keep float32 weights and round once.
        self.masters = {n: t.float() for n, t in self.start.items()} if low else None
        self.scalars = torch.zeros(tuner.num_seeds, dtype=torch.float64)
        self.learning_rate = 0.0
        self.steps = 0
        self.observed: list[tuple[int, float]] = []  # (seed index, scalar): Pro's server learns from these

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup([self.view.weight(n) for n in self.names])]

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        settings = default([ParamGroup([nn.Parameter(torch.zeros(1))])]).defaults
        if settings["weight_decay"]:
            raise RecipeError(
                "tuner.fedkseed", f"weight_decay = {settings['weight_decay']} breaks the replay", "set it to 0"
            )
        self.learning_rate = settings["lr"]
        return ZerothOrder([p for g in groups for p in g.params], self.learning_rate, self)

    def _trained(self, name: str) -> Tensor:
        """The tensor of this parameter that takes the steps."""
        return self.view.weight(name) if self.masters is None else self.masters[name]

    def add_noise(self, index: int, scale: float) -> None:
        """w += scale * z(seeds[index])."""
        for i, name in enumerate(self.names):
            p, target = self.view.weight(name), self._trained(name)
            target.add_(noise(int(self.seeds[index]), i, tuple(p.shape)).to(p.device), alpha=scale)
            if self.masters is not None:
                p.copy_(target)

    def zo_step(self, closure: Callable[[], float], lr: float) -> float:
        """One step; returns the mean of the two losses. A loss that is not finite skips it."""
        e, generator = self.tuner.epsilon, np.random.default_rng([self.tuner.seed, self.steps])
        index = int(generator.choice(len(self.seeds), p=self.probabilities))
        self.steps += 1
        self.add_noise(index, e)
        plus = closure()
        self.add_noise(index, -2 * e)
        minus = closure()
        if not (np.isfinite(plus) and np.isfinite(minus)):
            self.add_noise(index, e)
            return float("nan")
        g = projected_gradient(plus, minus, e)
        self.add_noise(index, e - lr * g)  # restore and step in one pass
        self.scalars[index] += g
        self.observed.append((index, g))
        return (plus + minus) / 2

    def state_dict(self) -> dict[str, Tensor]:
        # The current weights too, not only the scalars: a resumed run must continue bit for bit.
        out = {f"weight.{n}": self._trained(n).detach() for n in self.names}
        index = torch.tensor([i for i, _ in self.observed], dtype=torch.int64)
        values = torch.tensor([g for _, g in self.observed], dtype=torch.float64)
        history = {"observed.index": index, "observed.value": values}
        return out | history | {"scalars": self.scalars, "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        self.scalars = state["scalars"].clone()
        self.observed = list(zip(state["observed.index"].tolist(), state["observed.value"].tolist(), strict=True))
        for n in self.names:
            if self.masters is not None:
                self.masters[n].copy_(state[f"weight.{n}"])
            self.view.weight(n).copy_(state[f"weight.{n}"])

    def update(self) -> Update:
        used, head = self.scalars.nonzero().squeeze(1), self.view.anatomy.task_head
        shapes = {n: tuple(t.shape) for n, t in self.start.items() if n not in head}
        part = Seeds(torch.as_tensor(self.seeds)[used], -self.learning_rate * self.scalars[used], shapes)
        whole = Replace(copies({n: self._trained(n) for n in head}))  # a head is drawn anew at every load
        return Update(self.base, (part, whole) if head else (part,))
