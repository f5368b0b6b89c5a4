"""SpIEL against an implementation written from its sheet alone: dense, slow, one matrix at a time.

Every step's weight gradient is given (the loss is linear in the weights), so both see the same numbers and the positions
must be equal at every step.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch

from luthier.objectives.base import Clock
from luthier.testing.models import view_of
from luthier.tuners.spiel import Spiel

B1, B2 = 0.9, 0.999


class Settings(NamedTuple):
    """What a run is made of."""

    total: int = 24
    every: int = 6
    window: int = 2
    share: float = 0.4
    policy: str = "linear"
    rate: float = 0.03
    decay: float = 0.5
    eps: float = 1e-6
    micro: int = 2


def event_shares(s: Settings) -> dict[int, float]:
    """Completed steps -> share replaced: t = window and t = every * j + window."""
    times = [s.window, *(j * s.every + s.window for j in range(1, s.total))]
    shares = {}
    for t in times:
        if t > s.total:
            break
        if s.policy == "linear":
            shares[t] = 1.0 if t == s.window else s.share * (1 - t / s.total)
        else:
            shares[t] = s.share * (1 + math.cos(math.pi * t / s.total)) / 2
    return shares


def observed_steps(s: Settings) -> set[int]:
    first = set(range(1, s.window + 1))
    return first | {t for j in range(1, s.total) for t in range(j * s.every, j * s.every + s.window + 1)}


class Naive:
    """One matrix [m, n] with everything dense: float64 moments, a mask of what is active."""

    def __init__(self, base: torch.Tensor, active: torch.Tensor, s: Settings) -> None:
        self.base, self.s, self.active = base.double().reshape(-1), s, active.clone()
        zeros = torch.zeros(base.numel(), dtype=torch.float64)
        self.delta, self.m, self.v, self.age = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
        self.candidates: torch.Tensor | None = None
        self.s1, self.s2, self.samples = zeros.clone(), zeros.clone(), 0

    def observe(self, micro: list[torch.Tensor]) -> None:
        k = int(self.active.sum())
        if self.candidates is None:
            self.candidates = micro[0].reshape(-1).abs().argsort(descending=True, stable=True)[:k]
        step = torch.stack([g.double().reshape(-1) for g in micro]).sum(0)
        self.s1[self.candidates] += step[self.candidates]
        self.s2[self.candidates] += step[self.candidates] ** 2
        self.samples += 1

    def adam(self, gradient: torch.Tensor, rate: float) -> None:
        g, on = gradient.double().reshape(-1), self.active
        self.age[on] += 1
        self.m[on] = B1 * self.m[on] + (1 - B1) * g[on]
        self.v[on] = B2 * self.v[on] + (1 - B2) * g[on] ** 2
        top = self.m[on] / (1 - B1 ** self.age[on])
        bottom = (self.v[on].sqrt() + self.s.eps) / (1 - B2 ** self.age[on]).sqrt()
        self.delta[on] -= rate * top / bottom
        self.delta[on] -= rate * self.s.decay * self.delta[on]

    def reselect(self, share: float, wanted_scores: torch.Tensor, pool: list[int]) -> None:
        """Drop the smallest, grow the most wanted of the pool; both by whole sets."""
        quota = int(int(self.active.sum()) * share)
        active = self.active.nonzero().squeeze(1).tolist()
        dropped = sorted(active, key=lambda i: abs(float(self.delta[i])))[:quota]
        kept = set(active) - set(dropped)
        grown = sorted((i for i in pool if i not in kept), key=lambda i: -float(wanted_scores[i]))[:quota]
        incoming = [i for i in grown if not self.active[i]]
        leaving = [i for i in dropped if i not in set(grown)][: len(incoming)]
        for i in leaving:
            self.active[i] = False
            self.delta[i] = 0
        for i in incoming:
            self.active[i] = True
            self.delta[i] = 0

    def reselect_by_gradients(self, share: float) -> None:
        assert self.candidates is not None
        before = self.active.clone()
        self.reselect(share, self.s1.abs(), self.candidates.tolist())
        new, n = self.active & ~before, self.samples
        self.m[new] = (1 - B1**n) * self.s1[new] / n
        self.v[new] = (1 - B2**n) * self.s2[new] / n
        self.age[new] = n
        self.candidates, self.samples = None, 0
        self.s1.zero_()
        self.s2.zero_()


class NaiveMomentum(Naive):
    """The variant with SM3 instead of Adam, and its row and column accumulators instead of a window."""

    def __init__(self, base: torch.Tensor, active: torch.Tensor, s: Settings) -> None:
        super().__init__(base, active, s)
        self.shape = tuple(base.shape)
        self.row, self.column = (torch.zeros(n, dtype=torch.float64) for n in self.shape)

    def adam(self, gradient: torch.Tensor, rate: float) -> None:
        g, n = gradient.double().reshape(-1), self.shape[1]
        row, column = self.row.clone(), self.column.clone()
        for i in self.active.nonzero().squeeze(1).tolist():
            nu = min(float(row[i // n]), float(column[i % n])) + float(g[i]) ** 2
            self.row[i // n] = max(float(self.row[i // n]), nu)
            self.column[i % n] = max(float(self.column[i % n]), nu)
            self.delta[i] -= rate * g[i] / math.sqrt(nu + 1e-8)
            self.delta[i] -= rate * self.s.decay * self.delta[i]

    def reselect_by_gradients(self, share: float) -> None:
        product = (self.row[:, None] * self.column[None, :]).reshape(-1)
        self.reselect(share, product, (~self.active).nonzero().squeeze(1).tolist())


def gradients(shape: tuple[int, ...], seed: int, s: Settings) -> list[list[torch.Tensor]]:
    """Step -> micro-batches -> [m, n]: some directions last, most of it is noise."""
    g = torch.Generator().manual_seed(seed)
    lasting = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.2)
    draw = lambda: lasting / s.micro + 0.3 * torch.randn(shape, generator=g)  # noqa: E731
    return [[draw() for _ in range(s.micro)] for _ in range(s.total)]


def both(seed: int, s: Settings, fields: dict[str, Any]):
    """A run of the tuner and of the naive one, yielding after every step (name, production, naive)."""
    view = view_of(layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24, seed=seed)
    tuner = Spiel(
        targets=("q_proj", "down_proj"), reselect_every=s.every, window=s.window, replace_fraction=s.share,
        policy=s.policy, adam_eps=s.eps, seed=seed, **fields,
    )  # fmt: skip
    trainable = tuner.attach(view, total_steps=s.total)
    sparse = trainable.sparse
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: torch.optim.AdamW(g[0].params, lr=1.0, weight_decay=s.decay)
    )
    kind = NaiveMomentum if tuner.variant == "ma" else Naive
    naive, given = {}, {}
    for i, name in enumerate(sparse.linears):
        weight = view.weight(name).detach()
        active = torch.zeros(weight.numel(), dtype=torch.bool)
        active[sparse.indices[name].long()] = True
        naive[name] = kind(weight.clone(), active, s)
        given[name] = gradients(tuple(weight.shape), 100 * seed + i, s)
    shares, watched = event_shares(s), observed_steps(s)
    for t in range(1, s.total + 1):
        rate = s.rate * (1 - t / (2 * s.total))
        for group in optimizer.param_groups:
            group["lr"] = rate
        trainable.before_window()
        for part in range(s.micro):
            for name, x in sparse.linears.items():
                g = given[name][t - 1][part]
                out = view.module.get_submodule(x.module)(torch.eye(x.shape[1]))  # [in, out], the weight turned
                (out * g.T).sum().backward()
        trainable.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        trainable.after_step(Clock(t, s.total))
        for name, n in naive.items():
            micro = given[name][t - 1]
            if t in watched:
                n.observe(micro)
            n.adam(torch.stack(list(micro)).sum(0), rate)
            if t in shares:
                n.reselect_by_gradients(shares[t])
        yield t, view, trainable, naive


@pytest.mark.parametrize("variant", ["ag", "ma"])
@pytest.mark.parametrize(
    "s",
    [
        Settings(),
        Settings(every=5, window=3, share=0.2, policy="cosine", decay=0.0),
        Settings(total=20, every=4, window=1, micro=1, decay=3.0),
    ],
    ids=["linear", "cosine", "window of one"],
)
@pytest.mark.parametrize("seed", range(4))
def test_positions_and_values_are_those_of_the_sheet_at_every_step(variant, s, seed):
    moved = 0
    before: dict[str, set[int]] = {}
    for t, view, trainable, naive in both(seed, s, {"density": 0.02, "variant": variant}):
        for name, n in naive.items():
            index = trainable.sparse.indices[name].long()
            active = set(n.active.nonzero().squeeze(1).tolist())
            assert set(index.tolist()) == active, f"step {t}, {name}"
            moved += len(active - before.get(name, active))
            before[name] = active
            values = trainable.sparse.values[name].detach()
            torch.testing.assert_close(values, n.delta[index].float(), atol=1e-5, rtol=1e-4)
            whole = (n.base + n.delta).float().reshape(view.weight(name).shape)
            torch.testing.assert_close(view.weight(name).detach(), whole, atol=1e-5, rtol=1e-4)
    assert moved > 5, "positions moved"


@pytest.mark.parametrize("seed", range(3))
def test_moments_and_ages_are_those_of_the_sheet(seed):
    for _, _, trainable, naive in both(seed, Settings(total=14), {"num_weights": 100}):
        for name, n in naive.items():
            index, state = (
                trainable.sparse.indices[name].long(),
                trainable._optimizer.state[trainable.sparse.values[name]],
            )
            assert torch.equal(state["age"].double(), n.age[index])
            for key, wanted in (("exp_avg", n.m), ("exp_avg_sq", n.v)):
                torch.testing.assert_close(state[key].double(), wanted[index], atol=1e-6, rtol=1e-4)


def test_the_budget_is_a_share_of_all_parameters_divided_by_size():
    view = view_of(layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    sizes = {n: p.numel() for n, p in view.module.named_parameters()}
    total = int(0.02 * sum(sizes.values()))
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    trainable = Spiel(targets=("q_proj", "down_proj"), density=0.02).attach(view, total_steps=30)
    found = {n: len(i) for n, i in trainable.sparse.indices.items()}
    assert found == {n: int(total * sizes[n] / (sizes[q] + sizes[down])) for n in (q, down)}
    assert sum(found.values()) > 0.05 * (sizes[q] + sizes[down]), "a share of the targets would be a third of that"
