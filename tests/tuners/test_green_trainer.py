"""The exact checks of the sheet; numbers in names are the sheet's."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from luthier.errors import LuthierError
from luthier.model.anatomy import Anatomy
from luthier.objectives.base import Clock, Window
from luthier.objectives.sft import Sft
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.training.probe import Probe
from luthier.training.settings import TrainSettings
from luthier.tuners.green_trainer import CostModel, GreenTrainer, Item, cost_model, select


def random_costs(generator, levels=4):
    items, through, attention = [], {}, set()
    for level in range(levels):
        kind = generator.integers(0, 3)
        if kind == 0 and len(items) < 7:
            attention.add(level)
            sizes = generator.integers(1, 30, size=3)
            items += [Item(f"{level}{p}", level, int(s), p) for p, s in zip("qkv", sizes, strict=True)]
            through[level] = int(sizes.sum())
        else:
            size = int(generator.integers(1, 60))
            items.append(Item(f"{level}w", level, size))
            through[level] = size
    return CostModel(
        tuple(items),
        through,
        int(generator.integers(1, 10)),
        frozenset(attention),
        int(generator.integers(0, 20)),
        100,
    )


def test_1_knapsack_equals_brute_force():
    generator, checked = np.random.default_rng(0), 0
    for _ in range(200):
        costs = random_costs(generator)
        importance = {x.name: float(generator.normal()) for x in costs.items}
        budget = float(generator.uniform(0.1, 1.0)) * costs.full_backward
        budget = float(int(budget))
        if budget < 1:
            continue
        names = [x.name for x in costs.items]
        best = 0.0
        for size in range(1, len(names) + 1):
            for subset in itertools.combinations(names, size):
                if costs.backward(subset) <= budget:
                    best = max(best, sum(importance[n] for n in subset))
        # One unit a multiply-add, so that rounding up costs loses nothing.
        chosen = select(costs, importance, budget, resolution=int(budget))
        assert costs.backward(chosen) <= budget
        assert sum(importance[n] for n in chosen) == pytest.approx(best)
        checked += 1
    assert checked > 150


def test_1_coarse_rounding_stays_within_the_budget():
    generator = np.random.default_rng(1)
    for _ in range(100):
        costs = random_costs(generator)
        importance = {x.name: float(generator.random()) for x in costs.items}
        budget = 0.6 * costs.full_backward
        assert costs.backward(select(costs, importance, budget, resolution=20)) <= budget


@pytest.mark.parametrize("tied", [False, True])
def test_2_backward_cost_equals_counted_flops(tied):
    model = tiny(tie_word_embeddings=tied)
    model.set_attn_implementation("eager")
    anatomy = Anatomy(model)
    batch, length = 2, 12
    costs = cost_model(anatomy, batch * length, batch * length**2, batch)
    ids = torch.randint(3, 90, (batch, length))
    generator = np.random.default_rng(0)
    names = list(anatomy.parameters)
    for trial in range(32):
        chosen = [n for n in names if generator.random() < (0.1 if trial % 2 else 0.5)] or [names[-1]]
        for n, p in model.named_parameters():
            p.requires_grad_(n in chosen)
            p.grad = None
        logits = model(input_ids=ids).logits
        with FlopCounterMode(display=False) as counter:
            logits.square().sum().backward()
        assert 2 * costs.backward(chosen) == counter.get_total_flops(), chosen


def plan(view, share, batch):
    trainable = GreenTrainer(flops_share=share).attach(view, total_steps=9)
    trainable.optimizer(trainable.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-3))
    trainable.before_window(Window([batch], Clock(0, 9)), Probe(view, Sft()))
    return trainable


def test_3_share_one_selects_all_that_help_and_larger_shares_never_help_less():
    batch = batch_of()
    costs = cost_model(view_of().anatomy, batch.num_tokens, sum(n * n for n in batch.lengths), batch.num_sequences)
    full, last = costs.forward + costs.full_backward, 0.0
    for share in (0.45, 0.6, 0.75, 0.9, 1.0):
        view = view_of()
        trainable = plan(view, share, batch)
        assert costs.forward + costs.backward(trainable.selected) <= share * full * (1 + 1e-9)
        importance = trainable._importance(Window([batch], Clock(0, 9)), Probe(view, Sft()), trainable.dense.names)
        value = sum(importance[n] for n in trainable.selected)
        assert value >= last - 1e-9
        last = value
    helpful = {n for n, v in importance.items() if v > 0}
    assert set(trainable.selected) == helpful


def test_4_budget_identity():
    costs = cost_model(view_of().anatomy, 40, 500, 4)
    share, t_fp, t_bp = 0.7, costs.forward, costs.full_backward
    rho_bp = share * (1 + t_fp / t_bp) - t_fp / t_bp
    assert rho_bp * t_bp + t_fp == pytest.approx(share * (t_fp + t_bp))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_5_the_probe_leaves_no_trace(dtype):
    view = view_of()
    view.module.to(dtype)
    trainable = GreenTrainer().attach(view, total_steps=9)
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2)
    )
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    masters = {n: trainable.dense.master(n).detach().clone() for n in trainable.dense.names}
    state = torch.get_rng_state()
    trainable.before_window(Window([batch_of()], Clock(0, 9)), Probe(view, Sft()))
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    assert all(torch.equal(masters[n], trainable.dense.master(n)) for n in masters)
    assert torch.equal(state, torch.get_rng_state())
    assert not optimizer.state and all(p.grad is None for p in view.module.parameters())


def test_6_importance_sums_to_the_loss_difference():
    view, batch = view_of(), batch_of()
    probe = Probe(view, Sft())
    seen = probe.trial_step([batch], list(view.anatomy.parameters), lambda p: torch.optim.SGD(p, lr=1e-4))
    total = -sum(float((seen.changes[n].double() * seen.grads_after[n].double()).sum()) for n in seen.changes)
    with torch.no_grad():
        before = float(probe.mean_loss([batch]).double())
    assert seen.loss == pytest.approx(before, abs=1e-6)
    assert total == pytest.approx(_double_difference(batch), rel=0.05)


def _double_difference(batch):
    """loss(w0) - loss(w1) in float64, where the difference of two losses keeps its digits."""
    view = view_of()
    view.module.double()
    probe = Probe(view, Sft())
    names = list(view.anatomy.parameters)
    grads = probe.gradients([batch], names).grads
    with torch.no_grad():
        before = probe.mean_loss([batch])
        for n in names:
            view.weight(n).sub_(1e-4 * grads[n])
        return float(before - probe.mean_loss([batch]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_7_frozen_tensors_do_not_move_under_weight_decay(dtype):
    view = view_of()
    view.module.to(dtype)
    trainable = GreenTrainer(flops_share=0.5, reselect_every=100).attach(view, total_steps=9)
    loop = Loop(
        view,
        rows_of(),
        trainable,
        Sft(),
        TrainSettings(max_steps=6, batch_size=4, weight_decay=0.01, warmup_fraction=0),
    )
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    for _ in range(4):
        loop.step()
    chosen = set(trainable.selected)
    assert 0 < len(chosen) < len(before)
    for n, p in view.module.named_parameters():
        assert torch.equal(before[n], p) != (n in chosen), n


def test_a_share_that_trains_nothing_names_the_smallest_that_does():
    with pytest.raises(LuthierError, match=r"smallest share that trains anything here is 0\.\d+"):
        plan(view_of(), 0.2, batch_of())
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="flops_share"):
            GreenTrainer(flops_share=share)


def test_unknown_architecture_is_refused():
    with pytest.raises(LuthierError, match="does not know where"):
        plan(view_of("lfm2"), 0.8, batch_of())


@pytest.mark.parametrize(("every", "steps"), [(4, 9), (None, 7), (None, 2)])
def test_it_says_how_often_it_selects(every, steps):
    tuner, view, seen = GreenTrainer(flops_share=0.7, reselect_every=every), view_of(), []
    loop = Loop(
        view, rows_of(), tuner.attach(view, total_steps=steps), Sft(), TrainSettings(max_steps=steps, batch_size=4)
    )
    select_now = loop.trainable._select
    loop.trainable._select = lambda *words: seen.append(1) or select_now(*words)
    for _ in range(steps):
        loop.step()
    assert len(seen) == tuner.selections(steps)
