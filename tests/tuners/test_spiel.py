"""The exact checks of the sheet; numbers in names are the sheet's."""

import copy
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from luthier.method import Facts
from luthier.objectives.base import Clock
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import spiel as spiel_module
from luthier.tuners.base import ParamGroup, as_dicts
from luthier.tuners.sparse import top
from luthier.tuners.spiel import (
    AgeAdamW,
    Observed,
    SparseSM3,
    Spiel,
    budgets,
    everywhere,
    exchange,
    is_event,
    is_observed,
    outer_top,
    replaced_share,
    unseen,
)


def test_1_events_and_shares():
    events = [t for t in range(1, 101) if is_event(t, 20, 5, 100)]
    assert events == [5, 25, 45, 65, 85]
    assert [replaced_share(t, 100, 5, 0.2, "linear") for t in events] == pytest.approx([1.0, 0.15, 0.11, 0.07, 0.03])
    assert replaced_share(5, 100, 5, 0.2, "cosine") < 0.2  # no full first replacement


def test_windows_are_the_steps_up_to_each_event():
    assert [t for t in range(1, 50) if is_observed(t, 20, 5)] == [
        1,
        2,
        3,
        4,
        5,
        *range(20, 26),
        *range(40, 46),
    ]


def test_budgets_follow_size_and_stay_within_the_total():
    assert budgets(10, [30, 60, 10]) == [3, 6, 1]
    assert sum(budgets(100, [7, 11, 13])) <= 100


def trained(done: int, steps: int = 40, **fields):
    """View, trainable, loop and log after so many steps of a run of `steps`."""
    view = view_of()
    trainable = Spiel(**{"density": 0.05, "reselect_every": 4, "window": 2, **fields}).attach(view, total_steps=steps)
    loop = Loop(view, rows_of(), trainable, Sft(), TrainSettings(max_steps=steps, batch_size=4, learning_rate=1e-2))
    return view, trainable, loop, [loop.step() for _ in range(done)]


@pytest.mark.parametrize("variant", ["ag", "ma"])
def test_2_counts_are_constant_and_indices_unique_through_events(variant):
    _, trainable, loop, _ = trained(0, variant=variant)
    sizes = {n: len(i) for n, i in trainable.sparse.indices.items()}
    before = {n: i.clone() for n, i in trainable.sparse.indices.items()}
    for _ in range(12):
        loop.step()
        for name, index in trainable.sparse.indices.items():
            rows, columns = trainable.sparse.linears[name].shape
            assert len(index) == sizes[name] == len(index.unique())
            assert int(index.min()) >= 0 and int(index.max()) < rows * columns
    assert any(not torch.equal(before[n], i) for n, i in trainable.sparse.indices.items())
    assert sum(sizes.values()) <= int(0.05 * trainable.view.anatomy.num_parameters)


def test_3_gradient_is_the_gathered_dense_one_and_the_forward_is_the_merged_one():
    view, batch = view_of(), batch_of()
    name = "model.layers.1.mlp.up_proj.weight"
    reference = copy.deepcopy(view.module)
    trainable = Spiel(density=0.05).attach(view, total_steps=10)
    with torch.no_grad():
        trainable.sparse.values[name].normal_(generator=torch.Generator().manual_seed(0))
        trainable.sparse.write(torch.Generator())
        update = trainable.update()
        update.merge_into(reference)
    from luthier.model.view import ModelView
    from luthier.objectives.base import Forward

    other = ModelView(reference)
    reference.requires_grad_(False)  # so that both take the frozen head's path
    other.weight(name).requires_grad_(True)
    ours, theirs = Forward(batch, view).nll().sum(), Forward(batch, other).nll().sum()
    assert float((ours - theirs).detach().abs()) <= 1e-5
    ours.backward()
    theirs.backward()
    dense = other.weight(name).grad
    torch.testing.assert_close(
        trainable.sparse.values[name].grad, dense.reshape(-1)[trainable.sparse.indices[name]], atol=0, rtol=0
    )


def test_4_exchange_leaves_a_dropped_and_rechosen_position_alone():
    indices, values = torch.tensor([10, 11, 12, 13]), torch.tensor([0.1, -5.0, 0.2, 4.0])
    # Quota 2 drops 10 and 12. 12 is wanted again, 11 is still active, so 20 is the only newcomer and takes 10's slot.
    slots, incoming = exchange(indices, values, torch.tensor([12, 11, 20]), torch.tensor([3.0, 2.0, 1.0]), 2)
    assert slots.tolist() == [0] and incoming.tolist() == [20]


@pytest.mark.parametrize("quota", [0, 2])
def test_an_exchange_without_candidates_or_quota_moves_nothing(quota):
    indices, values, none = (
        torch.tensor([10, 11, 900]),
        torch.tensor([0.1, -5.0, 0.2]),
        torch.tensor([], dtype=torch.long),
    )
    slots, incoming = exchange(indices, values, none, none.float(), quota)
    assert not len(slots) and not len(incoming)
    slots, incoming = exchange(indices, values, torch.tensor([4, 5]), torch.ones(2), quota)
    assert len(slots) == len(incoming) == quota


@pytest.mark.parametrize("variant", ["ag", "ma"])
def test_a_run_whose_last_event_replaces_nothing_ends_well(variant):
    _, trainable, _, entries = trained(10, variant=variant, reselect_every=4, window=2, steps=10)
    assert trainable._steps == 10 and is_event(10, 4, 2, 10) and len(entries) == 10


class Event(NamedTuple):
    """Entries of one matrix around an event: position -> (value, first moment, second moment, age)."""

    before: dict[int, tuple[float, ...]]
    after: dict[int, tuple[float, ...]]
    quota: int


def entries(trainable, name) -> dict[int, tuple[float, ...]]:
    values, state = trainable.sparse.values[name], trainable._optimizer.state[trainable.sparse.values[name]]
    moments = [state[k].tolist() for k in ("exp_avg", "exp_avg_sq", "age") if k in state]
    return dict(zip(trainable.sparse.indices[name].tolist(), zip(values.tolist(), *moments, strict=True), strict=True))


@pytest.mark.parametrize("variant", ["ag", "ma"])
def test_4_only_dropped_deltas_leave_the_weights_and_what_is_chosen_again_is_left_alone(variant):
    view, trainable, loop, _ = trained(5, variant=variant)  # the next event is after step 6
    seen: dict[str, Event] = {}
    reselect = trainable._reselect

    def spy(name, quota):
        before = entries(trainable, name)
        reselect(name, quota)
        seen[name] = Event(before, entries(trainable, name), quota)

    trainable._reselect = spy
    loop.step()
    again = 0
    for name, event in seen.items():
        base = tiny().get_parameter(name).detach().reshape(-1)
        effective = base.clone()
        for i, (value, *_) in event.before.items():
            effective[i] = base[i] + value
        dropped = sorted(event.before, key=lambda i: abs(event.before[i][0]))[: event.quota]
        gone, new = event.before.keys() - event.after.keys(), event.after.keys() - event.before.keys()
        assert len(gone) == len(new) > 0 and gone <= set(dropped)
        for i in gone:
            effective[i] = base[i]
        assert torch.equal(view.weight(name).detach().reshape(-1), effective)
        assert all(event.after[i][0] == 0.0 for i in new)
        for i in event.before.keys() & event.after.keys():
            assert event.after[i] == event.before[i]
        again += len(set(dropped) - gone)
    assert len(seen) == len(trainable.sparse.values) and (again > 0 or variant == "ma")


def test_5_every_entry_active_equals_adam_on_dense_weights():
    target = "model.layers.0.self_attn.q_proj"
    view, rows = view_of(), rows_of()
    name = f"{target}.weight"
    size = view.weight(name).numel()
    trainable = Spiel(num_weights=size, targets=(target,), reselect_every=50, window=40, adam_eps=1e-8).attach(
        view, total_steps=10
    )
    settings = TrainSettings(
        max_steps=10,
        batch_size=4,
        learning_rate=1e-2,
        max_grad_norm=1e9,
        shuffle=False,
        lr_scheduler_type="constant",
        warmup_fraction=0,
    )
    loop = Loop(view, rows, trainable, Sft(), settings)
    for _ in range(10):
        loop.step()

    dense = view_of()
    for p in dense.module.parameters():
        p.requires_grad_(False)
    w = dense.weight(name).requires_grad_(True)
    # Our eps is added before the correction of the second moment; rmsprop-like reference written out.
    from luthier.objectives.base import Forward

    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 11):
        loss = Forward(batch_of(), dense).nll().mean()
        (g,) = torch.autograd.grad(loss, w)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        with torch.no_grad():
            w -= 1e-2 * (m / (1 - 0.9**t)) / ((v.sqrt() + 1e-8) / (1 - 0.999**t) ** 0.5)
    torch.testing.assert_close(view.weight(name), w, atol=1e-6, rtol=0)


def test_5_age_adamw_equals_torch_adamw_at_equal_ages():
    p, q = torch.nn.Parameter(torch.linspace(-1, 1, 7)), torch.nn.Parameter(torch.linspace(-1, 1, 7))
    ours = AgeAdamW([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0, total_steps=10)
    theirs = torch.optim.AdamW([q], lr=1e-2, eps=1e-12, weight_decay=0.0)
    for step in range(10):
        g = torch.randn(7, generator=torch.Generator().manual_seed(step))
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.int16), (32_767, torch.int16), (32_768, torch.int32)])
def test_ages_are_wide_enough_for_the_run(steps, dtype):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = AgeAdamW([p], lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, total_steps=steps)
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p]["age"].dtype == dtype and optimizer.state[p]["age"].tolist() == [1, 1]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_the_share_unseen_keeps_its_digits(beta):
    age = torch.tensor([1, 3, 20_000], dtype=torch.int16)
    torch.testing.assert_close(unseen(beta, age).double(), 1 - beta ** age.double(), rtol=2e-7, atol=0)


def test_6_seeded_moments_are_unbiased_after_one_more_step():
    g, n = torch.tensor([0.3, -2.0], dtype=torch.float64), 5
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AgeAdamW([p], lr=0.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, total_steps=10)
    optimizer.state[p].update(
        age=torch.full((2,), n, dtype=torch.int16),
        exp_avg=(1 - 0.9**n) * g,
        exp_avg_sq=(1 - 0.999**n) * g * g,
    )
    p.grad = g.clone()
    optimizer.step()
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg"] / (1 - 0.9 ** state["age"].double()), g, atol=1e-6, rtol=0)
    torch.testing.assert_close(state["exp_avg_sq"] / (1 - 0.999 ** state["age"].double()), g * g, atol=1e-6, rtol=1e-6)


def test_6_an_event_seeds_the_moments_that_the_window_saw():
    _, trainable, _, _ = trained(1)
    name = next(iter(trainable.sparse.values))
    k = len(trainable.sparse.indices[name])
    free = torch.tensor([i for i in range(2000) if i not in set(trainable.sparse.indices[name].tolist())][:k])
    g = torch.linspace(1.0, 2.0, k)
    seen = trainable.observed = Observed(trainable.sparse.indices)
    gradient = torch.zeros(trainable.sparse.linears[name].shape).reshape(-1)
    gradient[free] = g
    seen.choose(name, free)
    for _ in range(5):
        seen.see(name, gradient)
        seen.end_step(None)
    with torch.no_grad():
        trainable._reselect(name, k)
    state = trainable._optimizer.state[trainable.sparse.values[name]]
    at = torch.tensor([free.tolist().index(i) for i in trainable.sparse.indices[name].tolist()])
    torch.testing.assert_close(state["exp_avg"], (1 - 0.9**5) * g[at])
    torch.testing.assert_close(state["exp_avg_sq"], (1 - 0.999**5) * (g * g)[at])
    assert bool((state["age"] == 5).all())


def test_what_is_kept_inside_a_window_is_all_of_it():
    """After step 5 of the windows 1-2 and 4-6 two steps' gradients are summed up."""
    _, trainable, _, _ = trained(5)
    state = {k: v.clone() for k, v in trainable.state_dict().items()}
    assert (int(state["steps"]), int(state["samples"])) == (5, 2)
    _, other, _, _ = trained(0)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert other.observed.chosen == trainable.observed.chosen == set(trainable.sparse.values)
    _, later, _, _ = trained(0)
    later.continue_from(state)
    assert (later._steps, later.total_steps) == (5, 45)
    assert all(torch.equal(later.sparse.indices[n], i) for n, i in trainable.sparse.indices.items())


def test_positions_beyond_32_bits_are_kept_beside_others():
    seen = Observed({"small": torch.zeros(2, dtype=torch.int32), "large": torch.zeros(1, dtype=torch.long)})
    seen.choose("large", torch.tensor([2**31 + 5]))
    assert seen.candidates("large").tolist() == [2**31 + 5]


def test_a_matrix_whose_share_is_below_one_entry_is_left_alone():
    view = view_of(layers=1)
    names = {x.name: x.shape[0] * x.shape[1] for x in view.anatomy.match(("q_proj", "down_proj"))}
    assert list(names.values()) == [1024, 2048]
    found = Spiel(num_weights=2, targets=("q_proj", "down_proj")).with_budget(view.anatomy)
    assert [(x.role, k) for x, k in found] == [("down", 1)]
    with pytest.raises(RecipeError, match="1 entries leave none for any of 2 matrices"):
        Spiel(num_weights=1, targets=("q_proj", "down_proj")).with_budget(view.anatomy)


def test_a_tied_head_is_refused_only_as_a_target_and_another_head_is_a_matrix_like_others():
    assert Spiel(density=0.01).with_budget(view_of("gpt2").anatomy)
    assert [x.module for x, _ in Spiel(num_weights=9, targets=("lm_head",)).with_budget(view_of().anatomy)] == [
        "lm_head"
    ]


def test_another_optimiser_is_refused():
    _, trainable, _, _ = trained(0)
    trainable._optimizer = None
    trainable.before_window()
    trainable._optimizer = torch.optim.SGD(trainable.sparse.values.values(), lr=0.1)
    with pytest.raises(TypeError, match="use the optimiser it makes"):
        trainable.before_window()


def test_with_several_ranks_sums_are_of_the_whole_step_and_candidates_those_of_the_first(monkeypatch):
    """The loop multiplies each rank's loss by the number of ranks, so that the mean over ranks is the step's gradient."""
    one, other = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 4.0, 0.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: t.add_(other))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = Observed({"w": torch.arange(3)})
    seen.choose("w", torch.arange(3))
    seen.see("w", one)
    seen.end_step(object())
    mean = (one + other) / 2
    assert torch.equal(seen.sums("w")[0], mean) and torch.equal(seen.sums("w")[1], mean**2) and seen.samples == 1

    _, trainable, _, _ = trained(0)
    name, first = next(iter(trainable.sparse.indices)), {}
    chosen = torch.arange(len(trainable.sparse.indices[name]))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda t, src, group: (first.update(src=src), t.copy_(chosen)))
    trainable._ranks = object()
    trainable.before_window()
    trainable._see(name, torch.randn(trainable.sparse.linears[name].shape))
    assert first == {"src": 0} and torch.equal(trainable.observed.candidates(name).long(), chosen)


def test_7_sparse_sm3_with_every_position_equals_dense_sm3():
    rows, columns = 4, 3
    grid = torch.arange(rows * columns)
    p = torch.nn.Parameter(torch.zeros(rows * columns))
    optimizer = SparseSM3([p], 0.1, 0.0, lambda _: (grid // columns, grid % columns, (rows, columns)))
    w, r, c = torch.zeros(rows, columns), torch.zeros(rows), torch.zeros(columns)
    for step in range(20):
        g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step))
        nu = torch.minimum(r[:, None], c[None, :]) + g * g
        r, c = nu.max(1).values, nu.max(0).values
        w = w - 0.1 * g / (nu + 1e-8).sqrt()
        p.grad = g.reshape(-1)
        optimizer.step()
    torch.testing.assert_close(p.view(rows, columns), w, atol=1e-6, rtol=0)
    torch.testing.assert_close(optimizer.state[p]["row"], r, atol=1e-6, rtol=0)
    torch.testing.assert_close(optimizer.state[p]["column"], c, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 4), (5,)])
def test_7_a_task_head_under_sm3_is_dense(shape):
    """A matrix with its rows and columns; a bias is one column, so that each of its entries has a sum of its own."""
    view = view_of()
    trainable = Spiel(density=0.05, variant="ma").attach(view, total_steps=9)
    head = torch.nn.Parameter(torch.zeros(shape))
    groups = [*trainable.groups(), ParamGroup([head], weight_decay=0.2)]
    optimizer = trainable.optimizer(groups, lambda g: torch.optim.AdamW(as_dicts(g, 0.1), lr=0.1))
    w, r, c = torch.zeros(shape).view(shape[0], -1), torch.zeros(shape[0]), torch.zeros(torch.zeros(shape)[0].numel())
    for step in range(9):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        nu = torch.minimum(r[:, None], c[None, :]) + g.view(w.shape) ** 2
        r, c = nu.max(1).values, nu.max(0).values
        w = (w - 0.1 * g.view(w.shape) / (nu + 1e-8).sqrt()) * (1 - 0.1 * 0.2)
        head.grad = g
        optimizer.step()
    torch.testing.assert_close(head.detach(), w.view(shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [3, 1000])  # few values: many equal products
@pytest.mark.parametrize("k", [1, 20, 300, 400])  # 357 are free
@pytest.mark.parametrize("empty_rows", [0, 30, 37])
def test_outer_top_equals_the_head_of_the_whole_outer_product(steps, k, empty_rows):
    generator = torch.Generator().manual_seed(0)
    r, c = (torch.randint(0, steps, (n,), generator=generator) / steps for n in (37, 11))
    r[:empty_rows] = 0
    active = torch.randperm(37 * 11, generator=generator)[:50].int()
    scores = (r[:, None] * c[None, :]).reshape(-1).clone()
    scores[active] = -1
    wanted = scores.argsort(descending=True, stable=True)[: min(k, 357)].sort().values
    at, products = outer_top(r, c, active, k)
    assert torch.equal(at, wanted) and torch.equal(products, scores[at])


@pytest.mark.parametrize("kept", [0, 30])
def test_outer_top_looks_at_little_more_than_it_was_asked_for(monkeypatch, kept):
    """At the products from a bound on that is at most a ten-thousandth below the last of them."""
    looked, generator = [], torch.Generator().manual_seed(0)
    monkeypatch.setattr(spiel_module, "top", lambda scores, k: looked.append(scores) or top(scores, k))
    rows, columns = torch.rand(200, generator=generator), torch.rand(150, generator=generator)
    for k in (1, 50, 5000):
        for a, b in (
            (rows, columns),
            (rows.clone().index_fill_(0, torch.tensor([7]), 0.0), columns),
            (columns, 9 * rows),
        ):
            whole = (a[:, None] * b[None, :]).reshape(-1)
            best = whole.argsort(descending=True)
            active = best[:kept].int()
            at, _ = outer_top(a, b, active, k)
            assert torch.equal(at, best[kept : kept + k].sort().values)
            last = float(whole[best[kept + k - 1]])
            assert k <= len(looked[-1]) <= int((whole >= last * (1 - 1.3e-4)).sum()) - kept


@pytest.mark.parametrize("seed", [29, 32, 44, 45])
def test_outer_top_finds_products_close_to_the_bound(seed):
    generator, none = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.int)
    r, c = torch.rand(3, generator=generator), torch.rand(4, generator=generator)
    assert torch.equal(outer_top(r, c, none, 5)[0], (r[:, None] * c).reshape(-1).topk(5).indices.sort().values)


def test_outer_top_finds_a_product_that_rounding_puts_below_the_bound():
    rows, columns = (
        torch.tensor([1.0, 0.911776602268219, 0.813419759273529]),
        torch.tensor([1.0, 0.3735671043395996, 0.4187379777431488]),
    )
    scores = (rows[:, None] * columns[None, :]).reshape(-1)
    wanted = scores.argsort(descending=True, stable=True)[:7].sort().values
    assert torch.equal(outer_top(rows, columns, torch.zeros(0, dtype=torch.int), 7)[0], wanted)


def planted(**fields):
    """Share of the 60 of 4096 places at which the target of a linear map differs that SpIEL trains after 300 steps."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 64, generator=generator) / 8
    places = torch.randperm(64 * 64, generator=generator)[:60]
    target = base.clone().view(-1)
    target[places] += torch.where(torch.rand(60, generator=generator) < 0.5, -0.5, 0.5)
    view = view_of("llama", hidden_size=64, num_attention_heads=4, layers=1)
    module = view.module.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        module.weight.copy_(base)
    trainable = Spiel(num_weights=90, targets=("q_proj",), **fields).attach(view, total_steps=300)
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: torch.optim.AdamW(g[0].params, lr=0.03, weight_decay=0.0)
    )
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 300)
        trainable.before_window()
        x = torch.randn(64, 64, generator=generator)
        ((module(x) - x @ target.view(64, 64).T).square().sum() / 64).backward()
        trainable.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        trainable.after_step(Clock(step + 1, 300))
    index = trainable.sparse.indices["model.layers.0.self_attn.q_proj.weight"]
    return float(torch.isin(places, index).float().mean())


def test_8_planted_entries_are_found_and_by_a_fixed_mask_they_are_not():
    assert planted(reselect_every=20, window=5) >= 0.95
    assert planted(reselect_every=10_000, window=9_999) < 0.10


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"num_weights": 10**9}, "1000000000 entries"),
        ({"window": 20}, "window: 20 is not below reselect_every = 20"),
        ({"targets": ("q_porj",)}, "matches 0 of"),
        ({"targets": ("lm_head",)}, "tied"),
    ],
)
def test_bad_input_is_named(fields, match):
    kind = "gpt2" if fields.get("targets") == ("lm_head",) else "llama"
    with pytest.raises((ValueError, LuthierError), match=match):
        Spiel(**fields).attach(view_of(kind), total_steps=10)


def test_a_number_of_entries_that_does_not_fit_is_seen_before_a_model_is_loaded():
    anatomy = view_of().anatomy
    problems = Spiel(num_weights=10**9).check(Facts(anatomy=anatomy))
    assert [p.key for p in problems] == ["density"] and "asks for 1000000000 entries" in problems[0].what
    with pytest.raises(RecipeError, match="asks for 0 entries of the"):
        Spiel(density=1e-9).with_budget(anatomy)


def test_entries_that_another_tuner_trains_are_refused_before_anything_changes():
    view = view_of()
    Spiel(density=0.05, targets=("q_proj",)).attach(view, total_steps=9)
    phases, attached = list(view.phases), list(view.attached)
    with pytest.raises(LuthierError, match="entries of .*q_proj.weight train already; detach that tuner first"):
        Spiel(density=0.05).attach(view, total_steps=9)
    assert view.phases == phases and view.attached == attached


def test_only_entries_train_and_those_of_a_whole_matrix_stand_in_its_order():
    view = view_of()
    name = "model.layers.0.self_attn.q_proj.weight"
    trainable = Spiel(num_weights=view.weight(name).numel(), targets=("layers.0.self_attn.q_proj",)).attach(
        view, total_steps=9
    )
    assert trainable.sparse.indices[name].tolist() == list(range(view.weight(name).numel()))
    trained = {id(p) for p in view.module.parameters() if p.requires_grad}
    assert trained <= {id(p) for p in trainable.sparse.values.values()}


@pytest.mark.parametrize(
    "there, processes, own", [(False, 9, False), (True, 1, False), (True, 2, True), (True, 3, True)]
)
def test_several_processes_agree_on_candidates_in_a_group_of_their_own(monkeypatch, there, processes, own):
    made = SimpleNamespace(is_initialized=lambda: there, get_world_size=lambda: processes, new_group=lambda: "a group")
    monkeypatch.setattr(spiel_module, "dist", made)
    assert Spiel(density=0.05).attach(view_of(layers=1), total_steps=9)._ranks == ("a group" if own else None)


def test_unknown_length_is_refused():
    with pytest.raises(RecipeError, match="total number of steps"):
        Spiel().attach(view_of())


def held_bytes(trainable, optimizer_state) -> int:
    """Bytes of what tuning adds, by storage: values, positions, gradients, optimiser; and the open window."""
    seen = trainable.observed
    window = (
        [] if seen is None else [seen._sum, seen._squares, seen._step, *map(seen.candidates, trainable.sparse.values)]
    )
    values = list(trainable.sparse.values.values())
    tensors = [*values, *trainable.sparse.indices.values(), *(p.grad for p in values), *optimizer_state, *window]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("variant, inside, between", [("ag", 38, 22), ("ma", 12, 12)])
def test_bytes_an_entry_are_the_sheets_with_ages_in_two(variant, inside, between):
    _, trainable, loop, _ = trained(1, variant=variant)
    entries = sum(len(v) for v in trainable.sparse.values.values())
    grads = lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in trainable.sparse.values.values()]  # noqa: E731
    for steps, each in ((1, inside), (2, between)):  # the first window is steps 1 and 2
        while loop.progress.step < steps:
            loop.step()
        grads()  # the loop frees them after the step
        state = [t for s in loop.optimizer.state.values() for k, t in s.items() if k not in ("row", "column")]
        assert held_bytes(trainable, state) == each * entries


def test_where_fewer_come_than_were_dropped_those_leave_that_changed_least():
    slots, incoming = exchange(
        torch.tensor([1, 2, 3]), torch.tensor([-0.5, 0.1, 4.0]), torch.tensor([9]), torch.ones(1), 2
    )
    assert slots.tolist() == [1] and incoming.tolist() == [9]


def test_a_head_of_one_row_has_one_row():
    rows, columns, shape = everywhere(torch.zeros(1, 3))
    assert (rows.tolist(), columns.tolist(), shape) == ([0, 0, 0], [0, 1, 2], (1, 3))


def test_a_state_is_numbers_without_a_window_of_no_samples_and_the_base_comes_back():
    view, trainable, _, _ = trained(3)  # the first window is steps 1 and 2
    state = trainable.state_dict()
    assert int(state["samples"]) == 0 and not any(t.requires_grad for t in state.values())
    trainable.detach()
    assert all(torch.equal(p, tiny().get_parameter(n)) for n, p in view.module.named_parameters())
