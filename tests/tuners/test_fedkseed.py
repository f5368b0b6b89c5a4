"""The exact checks of the sheet; numbers in names are the sheet's."""

import math

import numpy as np
import pytest
import torch

from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.fedkseed import FedKSeed, projected_gradient, seed_pool, seed_probabilities
from luthier.update.vectors import noise

SETTINGS = TrainSettings(
    max_steps=200, batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant", warmup_fraction=0.0
)


def client(steps, seed=0, rows_seed=0, num_seeds=64, **fields):
    view = view_of()
    trainable = FedKSeed(num_seeds=num_seeds, seed=seed, **fields).attach(view)
    loop = Loop(view, rows_of(seed=rows_seed), trainable, Sft(), SETTINGS)
    for _ in range(steps):
        loop.step()
    return view, trainable, loop


def rebuilt_from(trainable):
    """w0 - learning_rate * sum_j scalars[j] z(seed_j), by parameter."""
    out = {}
    for i, (n, start) in enumerate(trainable.start.items()):
        moves = zip(trainable.seeds.tolist(), trainable.scalars.tolist(), strict=True)
        out[n] = start.double() - SETTINGS.learning_rate * sum(
            c * noise(s, i, tuple(start.shape)).double() for s, c in moves if c
        )
    return out


def test_1_replay_identity():
    view, trainable, _ = client(25)
    rebuilt = rebuilt_from(trainable)
    moved = max(float((view.weight(n) - trainable.start[n]).abs().max()) for n in rebuilt)
    worst = max(float((view.weight(n) - rebuilt[n]).abs().max()) for n in rebuilt)
    assert moved > 1e-3 and worst <= 2e-5
    update = trainable.update()
    live = {n: view.weight(n).detach().clone() for n in rebuilt}
    trainable.detach()
    with update.bind(view):
        assert max(float((view.weight(n) - live[n]).abs().max()) for n in live) <= 2e-5


def test_2_the_sum_of_updates_is_that_of_the_weights():
    """Both parties started from the same weights, with the same seeds."""
    (one, first, _), (other, second, _) = (client(8, seed=s, rows_seed=s) for s in (1, 2))
    for n, d in (0.75 * first.update() + 0.25 * second.update()).dense().items():
        mixed = 0.75 * one.weight(n) + 0.25 * other.weight(n)
        torch.testing.assert_close(first.start[n] + d, mixed.detach(), atol=1e-5, rtol=0)


def test_3_restore():
    view, trainable, _ = client(0)
    for scale in (5e-4, -1e-3, 5e-4):
        with torch.no_grad():
            trainable.add_noise(3, scale)
    worst = max(float((view.weight(n) - t).abs().max()) for n, t in trainable.start.items())
    assert worst <= 5e-7


def test_4_directional_derivative():
    view = view_of(seed=3)
    trainable = FedKSeed(num_seeds=8).attach(view)
    from luthier.testing.models import batch_of

    batch = batch_of()
    for p in view.module.parameters():
        p.requires_grad_(True)
    grads = torch.autograd.grad(Forward(batch, view).nll().mean(), [view.weight(n) for n in trainable.names])
    good = 0
    with torch.no_grad():
        for j in range(8):
            z = [noise(int(trainable.seeds[j]), i, tuple(view.weight(n).shape)) for i, n in enumerate(trainable.names)]
            exact = sum(float((g.double() * x.double()).sum()) for g, x in zip(grads, z, strict=True))
            trainable.add_noise(j, 5e-4)
            plus = float(Forward(batch, view).nll().double().mean())
            trainable.add_noise(j, -1e-3)
            minus = float(Forward(batch, view).nll().double().mean())
            trainable.add_noise(j, 5e-4)
            good += abs(projected_gradient(plus, minus, 5e-4) - exact) / abs(exact) < 0.02
    assert good >= 7


def test_5_central_difference_of_a_quadratic_is_exact():
    generator = torch.Generator().manual_seed(0)
    w, target, z = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(3))
    f = lambda x: float(0.5 * (x - target).square().sum())  # noqa: E731
    for e in (1e-3, 0.1, 1.0):
        assert projected_gradient(f(w + e * z), f(w - e * z), e) == pytest.approx(float((w - target) @ z), rel=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_6_weights_move_in_a_k_dimensional_space(k):
    view, trainable, loop = client(0, num_seeds=k)
    path = []
    for _ in range(5):
        loop.step()
        path.append(torch.cat([(view.weight(n) - t).detach().reshape(-1) for n, t in trainable.start.items()]))
    singular = torch.linalg.svdvals(torch.stack(path).double())
    assert int((singular > 1e-4 * singular[0]).sum()) <= k


def test_7_pro_probabilities():
    p = seed_probabilities([[0.0]] * 16)
    assert np.all(p == 1 / 16)
    generator = np.random.default_rng(0)
    p = seed_probabilities([[0.0, *generator.normal(scale=500, size=5)] for _ in range(64)])
    assert p.max() / p.min() <= math.e + 1e-9
    assert abs(p.sum() - 1) < 1e-12
    assert np.all(seed_probabilities([[3.0], [-3.0]]) == 0.5), "equal magnitudes, equal shares"
    far = np.exp([0.0, 1 / 3, 1.0]) / np.exp([0.0, 1 / 3, 1.0]).sum()  # magnitudes 1, 2 and 4, scaled to [0, 1]
    np.testing.assert_allclose(seed_probabilities([[1.0], [-3.0, 1.0], [4.0, -4.0]]), far, rtol=1e-9)
    _, trainable, _ = client(0, num_seeds=4)
    only = np.array([0.0, 0.0, 1.0, 0.0])
    trainable.probabilities = only
    trainable.learning_rate = 1e-3
    trainable.zo_step(lambda: 1.0, 1e-3)
    assert trainable.observed[0][0] == 2


def test_the_pool_is_distinct_and_agreed():
    seeds = seed_pool(4096, 7)
    assert len(set(seeds.tolist())) == 4096 and seeds.min() >= 1 and seeds.max() < 10**11
    assert np.array_equal(seeds, np.random.default_rng(7).integers(1, 10**11, size=4096)), (
        "the first draw has no seed twice"
    )
    assert np.array_equal(seeds, seed_pool(4096, 7)) and not np.array_equal(seeds, seed_pool(4096, 8))


def test_low_precision_keeps_float32_weights():
    view = view_of()
    view.module.to(torch.bfloat16)
    trainable = FedKSeed(num_seeds=8).attach(view)
    loop = Loop(view, rows_of(), trainable, Sft(), SETTINGS)
    for _ in range(8):
        loop.step()
    rebuilt = rebuilt_from(trainable)
    assert max(float((trainable.masters[n] - rebuilt[n]).abs().max()) for n in rebuilt) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_goes_on_where_it_was(dtype):
    views = [view_of(), view_of()]
    first, second = (FedKSeed(num_seeds=8).attach(v) for v in views if v.module.to(dtype) is not None)
    loop = Loop(views[0], rows_of(), first, Sft(), SETTINGS)
    for _ in range(5):
        loop.step()
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert all(torch.equal(views[0].weight(n), views[1].weight(n)) for n in first.names)
    assert (first.masters is None) == (dtype == torch.float32)
    assert all(torch.equal(t, second.masters[n]) for n, t in (first.masters or {}).items())
    assert second.observed == first.observed and torch.equal(first.scalars, second.scalars) and second.steps == 5


def test_a_step_says_the_mean_of_its_two_losses():
    _, trainable, _ = client(0)
    losses = iter([3.0, 1.0])
    with torch.no_grad():
        assert trainable.zo_step(lambda: next(losses), 1e-3) == 2.0
    assert trainable.observed[0][1] == pytest.approx(2.0 / (2 * trainable.tuner.epsilon))


def test_bad_input():
    for fields in ({"num_seeds": 0}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            FedKSeed(**fields)
    from luthier.method import Facts

    assert "constant lr and zero decay" in FedKSeed().check(Facts(settings=TrainSettings()))[0].what
    plain = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "warmup_fraction": 0.0}
    for wrong in ({}, {"lr_scheduler_type": "linear"}, {"weight_decay": 0.1}, {"warmup_fraction": 0.1}):
        assert len(FedKSeed().check(Facts(settings=TrainSettings(**{**plain, **wrong})))) == bool(wrong)
    view = view_of()
    with pytest.raises(RecipeError, match=r"weight_decay = 0\.1"):
        Loop(view, rows_of(), FedKSeed().attach(view), Sft(), SETTINGS.model_copy(update={"weight_decay": 0.1}))


@pytest.mark.parametrize("losses", [(math.nan, math.nan), (math.nan, 1.0), (1.0, math.inf)])
def test_a_loss_that_is_not_finite_is_skipped(losses):
    view, trainable, _ = client(0)
    trainable.learning_rate, left = 1e-3, iter(losses)
    with torch.no_grad():
        assert math.isnan(trainable.zo_step(lambda: next(left), 1e-3))
    assert float(trainable.scalars.abs().sum()) == 0 and not trainable.observed
    assert max(float((view.weight(n) - t).abs().max()) for n, t in trainable.start.items()) <= 5e-7


def test_dropout_is_off_in_loops_of_ones_own_too():
    view = view_of()
    view.module.train()
    FedKSeed(num_seeds=4).attach(view)
    assert not any(m.training for m in view.module.modules())


def test_one_tensor_in_low_precision_is_enough_for_float32_weights_beside_all():
    view, name = view_of(), "model.layers.1.mlp.up_proj.weight"
    view.layer(name.removesuffix(".weight")).to(torch.bfloat16)
    masters = FedKSeed(num_seeds=4).attach(view).masters
    assert masters.keys() == view.anatomy.parameters.keys()
    assert all(t.dtype == torch.float32 for t in masters.values())


def test_a_packed_model_is_refused_before_anything_changes():
    view, wants = view_of(), view_of().weight("lm_head.weight").requires_grad
    view.layer("model.layers.0.mlp.up_proj").weight = torch.nn.Parameter(torch.zeros(8, 1).byte(), requires_grad=False)
    with pytest.raises(LuthierError, match=r"fedkseed: model\.layers\.0\.mlp\.up_proj\.weight is quantised"):
        FedKSeed(num_seeds=4).attach(view)
    assert not view.attached and view.weight("lm_head.weight").requires_grad == wants
