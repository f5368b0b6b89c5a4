"""The exact checks of the sheet; numbers in names are the sheet's."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from luthier.data.batch import collate
from luthier.model.anatomy import Anatomy
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import batch_of, labelled_rows, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import green_trainer
from luthier.tuners.base import as_dicts, with_head
from luthier.tuners.green_trainer import CostModel, GreenTrainer, Item, cost_model, scheduled, select


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
    for _ in range(60):
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
    assert checked > 45


def test_1_coarse_rounding_stays_within_the_budget():
    generator = np.random.default_rng(1)
    for _ in range(100):
        costs = random_costs(generator)
        importance = {x.name: float(generator.random()) for x in costs.items}
        budget = 0.6 * costs.full_backward
        assert costs.backward(select(costs, importance, budget, resolution=20)) <= budget


def flops_of(forward):
    """What a forward pass counted, without the angles of rotary positions: some versions of transformers take them as a
    matrix product of one column, others elementwise.
    """
    counts = forward.get_flop_counts()
    rotary = [sum(of.values()) for name, of in counts.items() if name.rpartition(".")[2].startswith("rotary_emb")]
    return forward.get_total_flops() - sum(rotary)


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2", "opt", "qwen3", "gemma3"])
def test_2_backward_cost_equals_counted_flops(kind):
    model = tiny(kind.removeprefix("tied "), **({"tie_word_embeddings": "tied" in kind} if "llama" in kind else {}))
    model.set_attn_implementation("eager")
    anatomy = Anatomy(model)
    batch, length = 2, 12
    costs = cost_model(anatomy, batch * length, batch * length**2, batch)
    ids = torch.randint(3, 90, (batch, length))
    generator = np.random.default_rng(0)
    names = list(anatomy.parameters)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    assert 2 * costs.forward == flops_of(counter)
    for trial in range(12 if "llama" in kind else 8):
        chosen = [n for n in names if generator.random() < (0.1 if trial % 2 else 0.5)] or [names[-1]]
        for n, p in model.named_parameters():
            p.requires_grad_(n in chosen)
            p.grad = None
        logits = model(input_ids=ids).logits
        with FlopCounterMode(display=False) as counter:
            logits.square().sum().backward()
        assert 2 * costs.backward(chosen) == counter.get_total_flops(), chosen


@pytest.mark.parametrize("kind", ["llama-classifier", "gpt2-classifier", "bert-classifier"])
def test_2_with_a_task_head_it_does_too(kind):
    """The head reads one token of a sequence and always trains; so does BERT's pooler, which may be left out."""
    view = view_of(kind)
    view.module.set_attn_implementation("eager")
    view.layout, view._native_attention = "padded", "eager"
    rows = labelled_rows((12, 12))
    batch, names = collate(rows), [n for n in view.anatomy.parameters if n not in view.anatomy.task_head]
    costs = cost_model(view.anatomy, 24, 288, 2)
    assert [x.name for x in costs.items] == names
    generator = np.random.default_rng(0)
    for trial in range(8):
        chosen = [n for n in names if generator.random() < (0.1 if trial % 2 else 0.5)] or [names[-1]]
        for n, p in view.module.named_parameters():
            p.requires_grad_(n in chosen or n in view.anatomy.task_head)
        with FlopCounterMode(display=False) as forward:
            logits = Forward(batch, view).logits()
        with FlopCounterMode(display=False) as backward:
            logits.square().sum().backward()
        unused = 2 * 2 * 32**2 if "bert" in kind else 0  # the trunk calls its pooler once for nothing
        assert 2 * costs.forward == flops_of(forward) - unused
        assert 2 * costs.backward(chosen) == backward.get_total_flops(), chosen


@pytest.mark.parametrize("kind", ["llama", "bert-classifier"])
def test_2_every_tensor_alone_costs_what_is_counted(kind):
    """The shallowest trained tensor decides how far the backward goes: each of them once, but for a head over the
    vocabulary, whose activation gradient is paid whatever trains (CostModel.head).
    """
    view = view_of(kind, layers=1)
    view.module.set_attn_implementation("eager")
    view.layout, view._native_attention = "padded", "eager"
    batch = collate(labelled_rows((12, 12)) if "classifier" in kind else rows_of((12, 12), answer=11))
    costs = cost_model(view.anatomy, 24, 288, 2)
    for item in [x for x in costs.items if x.name != "lm_head.weight"]:
        for n, p in view.module.named_parameters():
            p.requires_grad_(n == item.name or n in view.anatomy.task_head)
        logits = Forward(batch, view).logits() if "classifier" in kind else view.module(batch.ids.view(2, 12)).logits
        with FlopCounterMode(display=False) as counter:
            logits.square().sum().backward()
        assert 2 * costs.backward([item.name]) == counter.get_total_flops(), item


def test_without_a_budget_nothing_is_chosen():
    costs = random_costs(np.random.default_rng(0))
    importance = {x.name: 1.0 for x in costs.items}
    assert select(costs, importance, 0.0) == select(costs, importance, -1.0) == []


def run_of(view, share=0.7, rate=1e-3, **fields):
    """The tuner on this view with an optimiser of its own."""
    trainable = GreenTrainer(flops_share=share, **fields).attach(view, total_steps=9)
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: torch.optim.AdamW(as_dicts(g, rate), lr=rate, weight_decay=0.1)
    )
    return trainable, optimizer


def plan(view, share, batch):
    trainable, _ = run_of(view, share)
    trainable.before_window(Window([batch], Clock(0, 9)), Probe(view, Sft()))
    return trainable


# --- the whole choice against the sheet's formulas, written out for a Llama ---


def llama_cost(anatomy, batch, length, chosen):
    """The sheet's level model: weight gradients, activation gradients above the lowest level, attention cores."""
    tokens, width = batch * length, anatomy.num_heads * anatomy.head_dim
    size = {x.module.rpartition(".")[2] + str(x.block): x.shape[0] * x.shape[1] for x in anatomy.linears}
    levels = [{"embed_tokens": 0}]
    for b in range(len(anatomy.blocks)):
        for names in (["input_layernorm"], ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["post_attention_layernorm"],
                      ["gate_proj", "up_proj"], ["down_proj"]):  # fmt: skip
            levels.append({f"{n}{b}": size.get(f"{n}{b}", 0) for n in names})
    levels += [{"norm": 0}, {"lm_head": size["lm_head-1"]}]
    short = {n: short_name(n) for n in anatomy.parameters}
    picked = {short[n] for n in chosen}
    lowest = min(j for j, level in enumerate(levels) if picked & level.keys())
    total = 0
    for j, level in enumerate(levels):
        total += tokens * sum(s for n, s in level.items() if n in picked)
        total += tokens * sum(level.values()) if j > lowest else 0
        if any(n.startswith("q_proj") for n in level) and j >= lowest:
            here = {n[0] for n in level if n in picked}
            units = 4 if j > lowest else {1: 1 if here == {"v"} else 2, 2: 3, 3: 4}[len(here)]
            total += units * batch * length**2 * width
    return total


def short_name(parameter):
    parts = parameter.split(".")
    return parts[-2] + (parts[2] if parts[1] == "layers" else "")


@pytest.mark.parametrize("seed", range(3))
def test_1_the_choice_on_a_model_is_the_best_of_all_subsets(seed):
    """All 4095 sets of a block's twelve tensors, priced by the sheet's formula; the knapsack's unit is a multiply-add."""
    model = tiny(
        layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=12, vocab_size=11
    )
    anatomy, generator = Anatomy(model), np.random.default_rng(seed)
    names = list(anatomy.parameters)
    values = generator.normal(0.3, 1.0, len(names)) * generator.choice([1.0, 5.0], len(names))
    importance = dict(zip(names, values.tolist(), strict=True))
    masks = (np.arange(1, 1 << len(names))[:, None] >> np.arange(len(names))) & 1  # [4095, 12]
    prices = np.array([llama_cost(anatomy, 1, 2, [n for n, on in zip(names, m, strict=True) if on]) for m in masks])
    budget = int(generator.uniform(0.3, 0.95) * prices.max())
    best = max(float(m @ values) for m, price in zip(masks, prices, strict=True) if price <= budget)
    chosen = select(cost_model(anatomy, 2, 4, 1), importance, budget, resolution=budget)
    assert llama_cost(anatomy, 1, 2, chosen) <= budget
    assert sum(importance[n] for n in chosen) == pytest.approx(max(best, 0.0))


def test_importance_is_the_slope_after_a_step_of_the_runs_own():
    """-<change, gradient behind it>, with AdamW written out; a rate at which gradients before and behind differ."""
    view, batch, rate = view_of(), batch_of(), 0.01
    trainable, _ = run_of(view, rate=rate)
    names = trainable.names
    found = trainable._importance(Window([batch], Clock(0, 9)), Probe(view, Sft()), names)
    other = view_of()
    weights = {n: other.weight(n).requires_grad_(True) for n in names}

    def slopes():
        return torch.autograd.grad(Forward(batch, other).nll().mean(), list(weights.values()))

    first = dict(zip(names, slopes(), strict=True))
    before = {n: p.detach().clone() for n, p in weights.items()}
    with torch.no_grad():
        for n, p in weights.items():  # Adam's first step is the sign, but for its eps; vectors do not decay
            p.mul_(1 - rate * 0.1 if p.ndim > 1 else 1.0).sub_(rate * first[n] / (first[n].abs() + 1e-8))
    second = dict(zip(names, slopes(), strict=True))
    for n in names:
        change = (weights[n] - before[n]).detach().double()
        assert found[n] == pytest.approx(-float((change * second[n].double()).sum()), rel=2e-3, abs=1e-6), n
    with_first = [-float(((weights[n] - before[n]).detach() * first[n]).sum()) for n in names]
    assert not np.allclose(with_first, [found[n] for n in names], rtol=0.1), "the gradient before the step is another"


def test_the_trial_step_has_the_scheduled_rate_and_at_the_start_of_a_warm_up_the_peak():
    view, batch = view_of(), batch_of()
    trainable, optimizer = run_of(view, rate=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5, 1.0, 0.25][step])
    seen = []
    for _ in range(4):
        trial = trainable._make([trainable.master(n) for n in trainable.names])
        seen.append({g["lr"] for g in trial.param_groups})
        optimizer.step()
        scheduler.step() if len(seen) < 4 else None
    assert seen == [{1e-3}, {0.5e-3}, {1e-3}, {0.25e-3}]
    assert scheduled(torch.optim.SGD([torch.zeros(1)], lr=0.1)) == 1.0, "a loop without a schedule"
    changes = []
    for factor in (1.0, 0.25):
        for group in optimizer.param_groups:
            group["lr"] = factor * 1e-3
        probed = Probe(view, Sft()).trial_step([batch], trainable.names, trainable._make)
        changes.append(float(probed.changes["model.layers.0.mlp.up_proj.weight"].norm()))
    assert changes[1] == pytest.approx(changes[0] / 4, rel=1e-3)


def test_in_the_loop_the_trial_step_follows_the_schedule():
    view, rates = view_of(), []
    settings = TrainSettings(max_steps=4, batch_size=4, learning_rate=1e-3, warmup_fraction=0.25)
    trainable = GreenTrainer(flops_share=0.8, reselect_every=1).attach(view, total_steps=4)
    loop = Loop(view, rows_of(), trainable, Sft(), settings)
    importance = trainable._importance

    def spy(window, probe, names):
        rates.append(trainable._make([trainable.master(names[0])]).param_groups[0]["lr"])
        return importance(window, probe, names)

    trainable._importance = spy
    logged = [loop.step()["learning_rate"] for _ in range(4)]
    assert logged[0] == 0 and rates == pytest.approx([1e-3, *logged[1:]])


def test_3_share_one_selects_all_that_help_and_larger_shares_never_help_less():
    batch = batch_of()
    costs = cost_model(view_of().anatomy, batch.num_tokens, sum(n * n for n in batch.lengths), batch.num_sequences)
    full, last = costs.forward + costs.full_backward, 0.0
    for share in (0.45, 0.6, 0.75, 0.9, 1.0):
        view = view_of()
        trainable = plan(view, share, batch)
        assert costs.forward + costs.backward(trainable.selected) <= share * full * (1 + 1e-9)
        importance = trainable._importance(Window([batch], Clock(0, 9)), Probe(view, Sft()), trainable.names)
        value = sum(importance[n] for n in trainable.selected)
        assert value >= last - 1e-9
        last = value
    helpful = {n for n, v in importance.items() if v > 0}
    assert set(trainable.selected) == helpful


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.9])
def test_4_the_budget_is_the_share_less_the_forward_by_counted_flops(share, monkeypatch):
    """rho_bp = rho (1 + T_fp / T_bp) - T_fp / T_bp of the whole backward, with both times counted by torch."""
    view, length, given = view_of(), 12, []
    monkeypatch.setattr(
        green_trainer,
        "select",
        lambda costs, values, budget, n: given.append(budget) or select(costs, values, budget, n),
    )
    batch = batch_of((length, length), answer=length - 1)
    trainable = plan(view, share, batch)
    model = tiny()
    model.set_attn_implementation("eager")
    ids = batch.ids.view(2, length)

    def counted(chosen):
        for n, p in model.named_parameters():
            p.requires_grad_(n in chosen)
        with FlopCounterMode(display=False) as forward:
            logits = model(input_ids=ids).logits
        with FlopCounterMode(display=False) as backward:
            logits.square().sum().backward()
        return flops_of(forward) / 2, backward.get_total_flops() / 2  # multiply-adds

    t_fp, t_bp = counted(list(view.anatomy.parameters))
    rho_bp = share * (1 + t_fp / t_bp) - t_fp / t_bp
    assert given == [pytest.approx(rho_bp * t_bp)]
    forward, backward = counted(trainable.selected)
    assert 0 < backward <= rho_bp * t_bp
    assert (forward + backward) / (t_fp + t_bp) == pytest.approx(trainable.spent["flops_share"]) and forward == t_fp
    assert trainable.spent["flops_share"] <= share and trainable.spent["tensors"] == len(trainable.selected)


def test_a_task_head_is_priced_for_every_row_of_the_window():
    view, rows = view_of("bert-classifier"), labelled_rows()
    trainable = GreenTrainer(flops_share=0.8).attach(view, total_steps=9)
    loop = Loop(
        view, rows, with_head(trainable, view.anatomy.task_head), Sft(),
        TrainSettings(max_steps=9, batch_size=4, tokens_per_forward=20),
    )  # fmt: skip
    loop.step()
    lengths = [len(r["ids"]) for r in rows]
    costs = cost_model(view.anatomy, sum(lengths), sum(n * n for n in lengths), len(rows))
    spent = costs.forward + costs.backward(trainable.selected)
    assert trainable.spent["flops_share"] == spent / (costs.forward + costs.full_backward)
    assert not set(trainable.selected) & set(view.anatomy.task_head)


def test_costs_are_those_of_all_ranks_together():
    """Two ranks with one batch each see the costs of both; a budget is a share of the same sum on every rank."""
    view, batch, seen = view_of(), batch_of(), []
    for window in (Window([batch, batch], Clock(0, 9)), Window([batch], Clock(0, 9), total=lambda x: 2 * x)):
        trainable, _ = run_of(view, 0.7)
        trainable.before_window(window, Probe(view, Sft()))
        seen.append((sorted(trainable.selected), trainable.spent))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_5_the_probe_leaves_no_trace(dtype):
    view = view_of()
    view.module.to(dtype)
    trainable = GreenTrainer().attach(view, total_steps=9)
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2)
    )
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    masters = {n: trainable.master(n).detach().clone() for n in trainable.names}
    state = torch.get_rng_state()
    trainable.before_window(Window([batch_of()], Clock(0, 9)), Probe(view, Sft()))
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    assert all(torch.equal(masters[n], trainable.master(n)) for n in masters)
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
    trainable.detach()
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())


def test_a_share_that_trains_nothing_names_the_smallest_that_does():
    with pytest.raises(LuthierError, match=r"smallest share that trains anything here is 0\.\d+"):
        plan(view_of(), 0.2, batch_of())
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="flops_share"):
            GreenTrainer(flops_share=share)


def test_a_share_just_above_the_smallest_trains_and_one_just_below_does_not():
    with pytest.raises(LuthierError) as refused:
        plan(view_of(), 0.2, batch_of())
    least = float(str(refused.value).rpartition(" ")[2])
    with pytest.raises(LuthierError, match="nothing can be trained"):
        plan(view_of(), least - 0.001, batch_of())
    view, tried = view_of(), []
    trainable, _ = run_of(view, least + 0.001)
    trainable._importance = lambda window, probe, names: tried.extend(names) or dict.fromkeys(names, 1.0)
    trainable.before_window(Window([batch_of()], Clock(0, 9)), Probe(view, Sft()))
    assert trainable.selected and set(trainable.selected) <= set(tried)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_the_trial_moves_every_tensor_that_could_be_trained_and_no_other(share):
    view, batch, tried = view_of(), batch_of((12, 12), answer=11), []
    trainable, _ = run_of(view, share)
    trainable._importance = lambda window, probe, names: tried.extend(names) or dict.fromkeys(names, 1.0)
    trainable.before_window(Window([batch], Clock(0, 9)), Probe(view, Sft()))
    names = list(view.anatomy.parameters)
    whole = llama_cost(view.anatomy, 2, 12, names)
    forward = cost_model(view.anatomy, 24, 288, 2).forward  # equal to counted FLOPs in test 2
    budget = share * (forward + whole) - forward
    assert tried == [n for n in names if llama_cost(view.anatomy, 2, 12, [n]) <= budget]


def test_a_trial_that_helps_nowhere_keeps_the_choice_and_stops_a_run_without_one():
    view, probe = view_of(), Probe(view_of(), Sft())
    trainable, _ = run_of(view, 0.7)
    values = iter([0.0, 1.0, -1.0])
    trainable._importance = lambda window, probe, names: dict.fromkeys(names, next(values))
    at = lambda step: Window([batch_of()], Clock(step, 9))  # noqa: E731
    with pytest.raises(LuthierError, match="the change of no tensor lowers the loss"):
        trainable.before_window(at(0), probe)
    trainable.before_window(at(0), probe)
    chosen, spent = list(trainable.selected), dict(trainable.spent)
    trainable.before_window(at(3), probe)
    assert trainable.selected == chosen and trainable.spent == spent
    assert {n for n in trainable.names if view.weight(n).requires_grad} == set(chosen)


def test_a_trial_step_that_is_not_finite_is_named():
    view = view_of()
    trainable, _ = run_of(view, 0.7, rate=float("inf"))
    with pytest.raises(LuthierError, match="not finite; lower learning_rate"):
        trainable.before_window(Window([batch_of()], Clock(0, 9)), Probe(view, Sft()))


def test_unknown_architecture_is_refused():
    with pytest.raises(LuthierError, match="does not know the place of"):
        plan(view_of("lfm2"), 0.8, batch_of())
    with pytest.raises(LuthierError, match="does not know the place of"):
        GreenTrainer().check_model(view_of("lfm2").anatomy)


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


def two_levels(*items):
    """Items at the first level, below a matrix of 10 multiply-adds that their gradients pass through."""
    return CostModel(tuple(Item(n, 1, c) for n, c in items), {1: 0, 2: 10}, 1, frozenset(), 0, 100)


def test_nothing_chosen_costs_nothing_and_what_does_not_help_is_not_chosen():
    costs = two_levels(("a", 5), ("b", 5), ("c", 5))
    assert costs.backward([]) == 0 and costs.backward(["a"]) == 15
    assert select(costs, {"a": 1.0, "b": 0.0}, 1000.0) == ["a"], "of c nothing is known"


def test_a_tensor_whose_cost_is_the_whole_budget_is_chosen():
    assert select(two_levels(("a", 0), ("b", 5)), {"a": 1.0, "b": 2.0}, 10.0) == ["a"]


def test_costs_are_counted_in_parts_of_the_budget():
    """Units of 200: three, five and eight of the ten units that there are."""
    costs = CostModel((Item("a", 1, 600), Item("b", 1, 1000), Item("c", 1, 1500)), {1: 0}, 1, frozenset(), 0, 100)
    chosen = select(costs, {"a": 1.0, "b": 1.0, "c": 1.5}, 2000.0, resolution=10)
    assert sorted(chosen) == ["a", "b"]


def test_it_selects_three_times_a_run_unless_the_recipe_says_when():
    assert [GreenTrainer().every(n) for n in (2, 9, 13)] == [1, 3, 4]
    assert GreenTrainer(reselect_every=2).attach(view_of()).every == 2
    with pytest.raises(RecipeError, match="is unset and the run has no known length"):
        GreenTrainer().attach(view_of())


def test_one_value_that_is_not_finite_is_enough_to_stop():
    trainable, _ = run_of(view_of())
    seen = SimpleNamespace(changes={"a": torch.ones(1), "b": torch.ones(1)},
                           grads_after={"a": torch.ones(1), "b": torch.tensor([float("nan")])})  # fmt: skip
    probe = SimpleNamespace(trial_step=lambda *words: seen)
    assert trainable._importance(None, probe, ["a"]) == {"a": -1.0}
    with pytest.raises(LuthierError, match="not finite"):
        trainable._importance(None, probe, ["a", "b"])


def test_a_state_holds_the_masters_and_what_is_selected():
    (first, _), (second, _) = run_of(view_of()), run_of(view_of())
    first.selected = [first.names[1], first.names[3]]
    with torch.no_grad():
        first.master(first.names[1]).add_(0.5)
    second.load_state_dict({k: t.clone() for k, t in first.state_dict().items()})
    assert second.selected == first.selected
    assert all(torch.equal(first.master(n), second.master(n)) for n in first.names)
