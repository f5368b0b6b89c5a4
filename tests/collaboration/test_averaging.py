"""one-shot's exact checks on its server step; numbers in names are the sheet's."""

import pytest
import torch

from luthier.collaboration.averaging import (
    averaged,
    barrier,
    best_step,
    cosines,
    factor_averaged,
    gap_bound,
    outliers,
)
from luthier.collaboration.rounds import shares
from luthier.data.batch import collate
from luthier.kernels.plain import plain_operations
from luthier.model.fingerprint import Fingerprint
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.update import Dense, LowRank, Prompt, Sparse, Update

BASE = Fingerprint(name="tiny", weights="w" * 64, tokenizer="t" * 64)
NAMES = ("m.0.q.weight", "m.1.q.weight")


def low_rank(rank, seed, scale=0.5, base=BASE, a=None):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    factors = {n: rand(rank, 12) for n in NAMES}
    part = LowRank(a or factors, {n: rand(10, rank) for n in NAMES}, dict.fromkeys(NAMES, scale))
    return Update(base, (part,))


def dense(seed, base=BASE):
    g = torch.Generator().manual_seed(seed)
    return Update(base, (Dense({n: torch.randn(10, 12, generator=g) for n in NAMES}),))


def gap(update, expected):
    found = update.dense()
    return max(float((found[n] - t).abs().max()) for n, t in expected.items())


def one_step(rows, rate=0.1):
    """A full-batch gradient step from the same model, as an update."""
    view = view_of()
    trainable = Full().attach(view, None, 1)
    settings = TrainSettings(max_steps=1, batch_size=len(rows), warmup_fraction=0.0, max_grad_norm=1e9)
    loop = Loop(view, rows, trainable, Sft(), settings)
    loop.optimizer = torch.optim.SGD(list(trainable.parameters()), lr=rate)
    loop.scheduler = torch.optim.lr_scheduler.ConstantLR(loop.optimizer, factor=1.0)
    loop.step()
    update = trainable.update()
    trainable.detach()
    return update


def test_1_one_full_batch_step_each_is_one_on_all_rows():
    # Equally long answers, so that rows weigh what their tokens do.
    clients = {"a": rows_of((9, 7), seed=1), "b": rows_of((8, 6, 11, 12), seed=2)}
    updates = {name: one_step(rows) for name, rows in clients.items()}
    together = one_step([*clients["a"], *clients["b"]])
    mean = averaged(updates, {name: len(rows) for name, rows in clients.items()})
    assert gap(mean, together.dense()) < 1e-6
    assert max(float(t.abs().max()) for t in together.dense().values()) > 1e-4


def descent(hessian, target, start, steps, rate=0.1):
    w = start.clone()
    for _ in range(steps):
        w = w - rate * hessian @ (w - target)
    return w


@pytest.mark.parametrize("same", [True, False])
def test_2_with_one_hessian_one_round_equals_many_and_with_several_the_gap_grows(same):
    g = torch.Generator().manual_seed(0)
    make = lambda: (lambda m: m @ m.T / 6 + torch.eye(6))(torch.randn(6, 6, generator=g, dtype=torch.float64))  # noqa: E731
    one = make()
    hessians = [one if same else make() for _ in range(3)]
    targets = [torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3)]
    gaps, start = [], torch.zeros(6, dtype=torch.float64)
    for steps in (1, 3, 9):
        shot = sum(descent(h, t, start, steps) for h, t in zip(hessians, targets, strict=True)) / 3
        many = start
        for _ in range(steps):
            many = sum(descent(h, t, many, 1) for h, t in zip(hessians, targets, strict=True)) / 3
        gaps.append(float((shot - many).norm()))
    assert max(gaps) < 1e-10 if same else gaps[0] < 1e-10 < gaps[1] < gaps[2]


def test_3_stacking_is_exact_for_unequal_ranks_and_scales():
    updates = {"a": low_rank(2, 1, 0.5), "b": low_rank(4, 2, 2.0), "c": low_rank(3, 3, 1.0)}
    rows = {"a": 50, "b": 30, "c": 20}
    expected = {n: sum(p * updates[c].dense()[n] for c, p in shares(rows).items()) for n in NAMES}
    mean = averaged(updates, rows)
    assert gap(mean, expected) < 1e-5
    assert mean.parts[0].a[NAMES[0]].shape[0] == 9


def test_3_a_bound_average_gives_the_logits_of_the_merged_one():
    view, updates = view_of(), {}
    for name, seed in (("a", 1), ("b", 2)):
        trainable = Lora(rank=2 + seed, alpha=8).attach(view, None, 3)
        settings = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2)
        loop = Loop(view, rows_of(seed=seed), trainable, Sft(), settings)
        for _ in range(3):
            loop.step()
        updates[name] = trainable.update()
        trainable.detach()
    mean, ids = averaged(updates, {"a": 3, "b": 1}), batch_of().ids[None]
    with torch.no_grad():
        before = view.module(input_ids=ids).logits
        with mean.bind(view):
            bound = view.module(input_ids=ids).logits
        mean.merge_into(view.module)
        merged = view.module(input_ids=ids).logits
    assert (bound - merged).abs().max() < 1e-5 < (merged - before).abs().max()


def test_4_the_mean_of_factors_is_biased_but_for_one_shared_a():
    updates, rows = {"a": low_rank(2, 1), "b": low_rank(2, 2)}, {"a": 1, "b": 1}

    def error(found, true):
        lost = sum(float((found.dense()[n] - true.dense()[n]).square().sum()) for n in NAMES)
        return (lost / sum(float(t.square().sum()) for t in true.dense().values())) ** 0.5

    assert error(factor_averaged(updates, rows), averaged(updates, rows)) > 0.1
    shared = low_rank(2, 1).parts[0].a
    alike = {"a": low_rank(2, 1, a=shared), "b": low_rank(2, 2, a=shared)}
    assert error(factor_averaged(alike, rows), averaged(alike, rows)) < 1e-6
    with pytest.raises(ValueError, match="another rank"):
        factor_averaged({"a": low_rank(2, 1), "b": low_rank(3, 2)}, rows)


def test_5_equal_clients_and_a_single_one_give_the_local_model():
    one = low_rank(2, 1)
    assert gap(averaged({"a": one}, {"a": 7}), one.dense()) < 1e-6
    assert gap(averaged({"a": one, "b": one, "c": one}, {"a": 1, "b": 2, "c": 3}), one.dense()) < 1e-6


def test_6_a_client_that_comes_twice_weighs_double():
    a, b = low_rank(2, 1), low_rank(2, 2)
    thrice = averaged({"a": a, "a again": a, "b": b}, {"a": 5, "a again": 5, "b": 3})
    assert gap(averaged({"a": a, "b": b}, {"a": 10, "b": 3}), thrice.dense()) < 1e-6


def test_7_a_shorter_form_is_exact_at_the_full_rank_and_loses_less_the_longer_it_is():
    whole = averaged({"a": low_rank(2, 1), "b": low_rank(4, 2), "c": low_rank(3, 3)}, {"a": 1, "b": 1, "c": 1})
    errors = []
    for rank in range(1, 10):
        shorter, said = whole.to("lowrank", rank=rank)
        difference = sum(float((shorter.dense()[n] - t).square().sum()) for n, t in whole.dense().items())
        size = sum(float(t.square().sum()) for t in whole.dense().values())
        assert said == pytest.approx((difference / size) ** 0.5, abs=1e-5)
        errors.append(said)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 and errors[3] > 0.05


@pytest.mark.parametrize(
    ("updates", "rows", "words"),
    [
        ({}, {}, "no client"),
        ({"a": low_rank(2, 1)}, {"a": 0}, "a has 0 rows"),
        ({"a": low_rank(2, 1), "b": dense(1)}, {"a": 1, "b": 1}, r"b: sends \['dense'\], a sends \['lowrank'\]"),
        (
            {"a": low_rank(2, 1), "b": low_rank(2, 1, base=BASE.model_copy(update={"weights": "v" * 64}))},
            {"a": 1, "b": 1},
            "b: tuned v",
        ),
        ({"a": dense(1) * float("nan")}, {"a": 1}, "a: its update is empty, or a value is not finite"),
        ({"a": Update(BASE, (Dense({}),))}, {"a": 1}, "a: its update is empty"),
        ({"a": Update(BASE, (Prompt(torch.ones(2, 3)),))}, {"a": 1}, "a: a prompt part"),
        (
            {"a": dense(1), "b": Update(BASE, (Dense({NAMES[0]: torch.ones(10, 12)}),))},
            {"a": 1, "b": 1},
            r"b: m\.1\.q\.weight is changed by only one",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused_with_its_client(updates, rows, words):
    with pytest.raises(ValueError, match=words):
        averaged(updates, rows)


def test_products_norms_and_cosines_are_those_of_the_dense_differences():
    a, b = low_rank(2, 1, 0.5), low_rank(3, 2, 2.0)
    left, right = a.dense(), b.dense()
    expected = sum(float((left[n] * right[n]).sum()) for n in NAMES)
    assert a.inner(b) == pytest.approx(expected, rel=1e-5)
    one, other = dense(1), dense(2)
    by_hand = sum(float((one.dense()[n] * other.dense()[n]).sum()) for n in NAMES)
    assert one.inner(other) == pytest.approx(by_hand, rel=1e-5)
    found = cosines({"b": b, "a": a, "a twice": 2 * a})
    assert torch.allclose(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(expected / (a.inner(a) * b.inner(b)) ** 0.5, rel=1e-4)
    assert outliers({"a": a, "b": b, "c": 1000 * a}) == ["c"]


def test_the_step_with_the_lowest_public_loss_and_a_barrier_on_the_way():
    step, losses = best_step(lambda s: (s - 0.8) ** 2)
    assert step == 0.75 and losses[0.0] == pytest.approx(0.64) and not barrier(losses)
    assert barrier(best_step(lambda s: 1 - abs(s - 0.5))[1])


def test_sparse_updates_average_too():
    def make(at):
        part = Sparse({NAMES[0]: torch.tensor(at)}, {NAMES[0]: torch.ones(2)}, {NAMES[0]: (10, 12)})
        return Update(BASE, (part,))

    mean = averaged({"a": make([0, 5]), "b": make([5, 7])}, {"a": 1, "b": 3}).dense()[NAMES[0]].view(-1)
    assert mean[[0, 5, 7]].tolist() == pytest.approx([0.25, 1.0, 0.75])


def test_the_bound_on_the_gap_is_made_of_curvature_and_distance():
    """For a small step the change of the gradient is the Hessian's product with it, taken here by autograd twice."""
    view, rows = view_of(), rows_of()
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    direction = torch.randn(view.weight(name).shape, generator=generator)
    small = Update(view.base, (Dense({name: 1e-3 * direction}),))
    found = gap_bound(view, {"a": small, "b": 2 * small}, small, rows, horizon=3)
    weight = view.weight(name).requires_grad_(True)
    with plain_operations():
        loss = Forward(collate(rows), view).nll().mean()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), weight)
    assert found.smoothness == pytest.approx(float(product.norm() / direction.norm()), rel=0.02)
    assert found.travel == pytest.approx(float(2e-3 * direction.norm() / weight.norm()), rel=1e-5)
    assert found.bound == pytest.approx(found.smoothness * found.travel * 3 * 2)
