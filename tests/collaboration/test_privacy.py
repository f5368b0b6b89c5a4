"""Differential privacy: the clipper against opacus, the accounting against opacus' own, and what each step may give away."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from luthier.collaboration.privacy import (
    Plan,
    Privacy,
    PrivateRun,
    clipped,
    clipped_sum,
    epsilon_of,
    noise_for,
    plan,
    poisson_sample,
)
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.hft import Hft
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

LORA = Lora(rank=2)
SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0, max_grad_norm=1e9)


def rehearsed(rate=1.0, noise=0.0, clip=1e9, rows=4, steps=3):
    """A plan made by hand."""
    return Plan(privacy=Privacy(epsilon=1.0, clip=clip), rows=rows, rate=rate, steps=steps, noise=noise, spent=1.0)


def run_of(made, rows, tuner=LORA, seed=0, view=None):
    return PrivateRun(view or view_of(), rows, tuner, SETTINGS, made, np.random.default_rng(seed))


def gap(one, other):
    a, b = one.dense(), other.dense()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("tuner", [LORA, Full()], ids=lambda t: t.key())
def test_8_without_noise_and_clipping_it_is_plain_training(tuner):
    rows = rows_of((9, 8, 12, 7))  # each with four supervised tokens: their mean is the mean of the rows' means
    private = run_of(rehearsed(), rows, tuner).finish()
    view = view_of()
    trainable = tuner.attach(view, None, 3)
    loop = Loop(view, rows, trainable, Sft(), SETTINGS)
    for _ in range(3):
        loop.step()
    assert gap(private, trainable.update()) < 1e-5


def test_8_one_row_moves_a_sum_by_no_more_than_the_clip():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)] for _ in range(6)]
    huge = [1e12 * t for t in rows[0]]
    shapes = rows[0]
    for clip in (0.1, 1.0):
        without = clipped_sum(rows, list, shapes, clip)
        with_it = clipped_sum([*rows, huge], list, shapes, clip)
        moved = torch.cat([(a - b).flatten() for a, b in zip(with_it, without, strict=True)]).norm()
        assert float(moved) == pytest.approx(clip, rel=1e-4)
    short = [0.001 * t for t in rows[0]]
    assert all(torch.equal(a, b) for a, b in zip(clipped(short, 1.0), short, strict=True)), "a short one stays as it is"
    broken = [torch.full((3, 4), torch.nan), torch.ones(5)]
    assert not any(t.any() for t in clipped(broken, 1.0)), "a row that breaks cannot break the sum"


def test_the_clipped_sum_is_that_of_opacus():
    """On a padded batch of a model that opacus can hook: low-rank additions between linear layers."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)

    class Thin(nn.Module):
        """A frozen layer with a low-rank addition, over padded sequences."""

        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x):
            return self.base(x) + 16.0 * self.b(self.a(x))

    model = Thin()
    x, target, mask = torch.randn(5, 7, 6), torch.randn(5, 7, 8), torch.rand(5, 7) > 0.3
    mask[:, 0] = True

    def losses(m, xs, ys, masks):
        each = (m(xs) - ys).square().mean(-1) * masks
        return each.sum(1) / masks.sum(1)  # a mean over each sequence's own positions

    def gradient(i):
        parts = slice(i, i + 1)
        return torch.autograd.grad(
            losses(model, x[parts], target[parts], mask[parts]).sum(), [model.a.weight, model.b.weight]
        )

    ours = clipped_sum(range(5), gradient, [model.a.weight, model.b.weight], 0.5)
    lengths = [float(torch.cat([g.flatten() for g in gradient(i)]).norm()) for i in range(5)]
    assert min(lengths) < 0.5 < max(lengths) or min(lengths) > 0.5, "some are cut"
    hooked = GradSampleModule(model, loss_reduction="sum")
    params = [p for p in hooked.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(params, lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=5,
        loss_reduction="sum",
    )
    losses(hooked, x, target, mask).sum().backward()
    optimizer.clip_and_accumulate()
    for mine, p in zip(ours, params, strict=True):
        assert torch.allclose(mine, p.summed_grad, atol=1e-6)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.05, 100), (2.0, 0.2, 40), (0.8, 1.0, 3)])
def test_epsilon_agrees_with_opacus_accountants(noise, rate, steps):
    """Its PRV accountant is as tight as ours; its Renyi one is looser, so above."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    ours = epsilon_of(noise, 1e-5, rate, steps)
    found = {}
    for accountant in (PRVAccountant(), RDPAccountant()):
        for _ in range(steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
        found[type(accountant).__name__] = accountant.get_epsilon(delta=1e-5)
    assert ours == pytest.approx(found["PRVAccountant"], rel=0.02)
    assert ours <= found["RDPAccountant"] * 1.001


def test_the_noise_found_keeps_the_promise_and_little_less_would_not():
    noise = noise_for(0.5, 1e-5, 0.1, 50)
    assert epsilon_of(noise, 1e-5, 0.1, 50) <= 0.5 < epsilon_of(0.98 * noise, 1e-5, 0.1, 50)
    assert epsilon_of(0.0, 1e-5, 0.1, 50) == math.inf
    made = plan(Privacy(epsilon=0.5), 500, 50, 50)
    assert (made.rate, made.noise) == (0.1, noise) and made.spent <= 0.5 < 1.05 * made.spent


def test_a_promise_covers_all_rounds_together():
    one, five = (plan(Privacy(epsilon=0.5), 500, 50, 10, rounds) for rounds in (1, 5))
    assert five.steps == one.steps == 10 and five.noise == plan(Privacy(epsilon=0.5), 500, 50, 50).noise
    assert epsilon_of(one.noise, 1e-5, 0.1, 50) > 0.5 >= epsilon_of(five.noise, 1e-5, 0.1, 50)


def test_rows_come_by_coin_and_empty_batches_take_a_step_of_noise():
    counts = [len(poisson_sample(100, 0.05, np.random.default_rng(seed))) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(5, abs=0.4) and np.var(counts) == pytest.approx(4.75, rel=0.25)
    rows = rows_of((9, 8, 12, 7))
    run = run_of(rehearsed(rate=1e-9, noise=1.0, clip=1.0), rows)
    assert [run.step() for _ in range(3)] == [0, 0, 0]
    moved = run.trainable.update().dense()
    assert all(t.any() for t in moved.values()), "nobody can tell an empty batch by its standing still"


def test_noise_has_the_size_that_is_accounted_for():
    rows, seen = rows_of((9, 8)), []
    run = run_of(rehearsed(rate=1e-9, noise=2.0, clip=0.5, rows=2), rows)
    run.loop.optimizer.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in run.trainable.parameters()]))
    run.step()
    expected = 2.0 * 0.5 / (1e-9 * 2)
    assert float(seen[0].std()) == pytest.approx(expected, rel=0.05) and abs(float(seen[0].mean())) < 0.1 * expected


def test_coins_and_noise_are_the_machines_own_unless_given():
    rows = rows_of((9, 8, 12, 7))
    made = rehearsed(noise=1.0, clip=1.0)
    same = [run_of(made, rows, seed=1).finish().digest() for _ in range(2)]
    own = [PrivateRun(view_of(), rows, LORA, SETTINGS, made).finish().digest() for _ in range(2)]
    assert same[0] == same[1] and len({*same, *own}) == 3


def test_a_plan_is_not_overdrawn():
    rows = rows_of((9, 8, 12, 7))
    run = run_of(rehearsed(steps=1), rows)
    run.step()
    with pytest.raises(LuthierError, match="all 1 steps of the plan are taken"):
        run.step()
    with pytest.raises(LuthierError, match="accounts for 4 rows, there are 3"):
        run_of(rehearsed(), rows[:3])


@pytest.mark.parametrize("tuner", [Spiel(density=0.05), Hft(resample="epoch")], ids=lambda t: t.key())
def test_tuners_that_look_at_rows_otherwise_are_refused_and_leave_the_base(tuner):
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    with pytest.raises(LuthierError, match=f"{tuner.key()} uses rows in ways"):
        run_of(rehearsed(), rows_of((9, 8, 12, 7)), tuner, view=view)
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())


def test_promises_that_mean_nothing_are_refused():
    with pytest.raises(LuthierError, match="privacy.delta: 0.01 with 500 rows"):
        plan(Privacy(epsilon=1.0, delta=0.01), 500, 32, 10)
    for wrong in (
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"epsilon": 1.0, "clip": 0.0},
        {"epsilon": 1.0, "delta": 0.0},
    ):
        with pytest.raises(ValueError, match="greater than|finite"):
            Privacy(**wrong)
