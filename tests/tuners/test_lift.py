"""The exact checks of the sheet; numbers in names are the sheet's. 3 is in test_lift_oracle.py, 8 and 9 are claims."""

import logging
import time

import pytest
import torch

from luthier.method import Facts
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.lift import Lift, carried, low_rank, num_entries, principal

SETTINGS = TrainSettings(max_steps=50, batch_size=4, learning_rate=1e-3, max_grad_norm=1e9)


def loop_of(tuner, view=None, **changes):
    view, settings = view or view_of(), SETTINGS.model_copy(update=changes)
    return Loop(view, rows_of(), tuner.attach(view, total_steps=settings.max_steps), Sft(), settings)


@pytest.mark.parametrize("rank", [1, 4, 500])
def test_1_every_mask_has_the_numbers_of_a_lora(rank):
    sparse = Lift(rank=rank).attach(view_of(), total_steps=10).sparse
    for n, x in sparse.linears.items():
        index = sparse.indices[n]
        assert len(index.unique()) == len(index) == min(rank * sum(x.shape), x.shape[0] * x.shape[1])
        assert int(index.max()) < x.shape[0] * x.shape[1]
    assert num_entries((40, 50), None, 0.05) == 100 and num_entries((2, 3), None, 0.01) == 1


def test_2_full_rank_is_plain_magnitude_and_rank_one_is_the_outer_product():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(20, 30, generator=g)
    assert torch.equal(principal(low_rank(w, 20), 50), w.abs().reshape(-1).topk(50).indices.sort().values)
    assert torch.equal(low_rank(w, 20), w)
    u, v = torch.randn(20, generator=g), torch.randn(30, generator=g)
    noisy = torch.outer(u, v) + 1e-3 * torch.randn(20, 30, generator=g)
    wanted = torch.outer(u, v).abs().reshape(-1).topk(30).indices.sort().values
    for randomized in (False, True):
        assert torch.equal(principal(low_rank(noisy, 1, randomized), 30), wanted)


def test_3_a_randomized_decomposition_chooses_nearly_the_same():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(60, 60, generator=g))[0] for _ in range(2))
    weight = u @ torch.diag(0.7 ** torch.arange(60)) @ v  # a spectrum that falls, as trained weights have
    exact, quick = (principal(low_rank(weight, 6, r), 180) for r in (False, True))
    assert float(torch.isin(quick, exact).float().mean()) > 0.97
    once, again = (
        Lift(density=0.1, filter_rank=4, svd="randomized").attach(view_of(), total_steps=9).sparse for _ in range(2)
    )
    assert all(torch.equal(once.indices[n], again.indices[n]) for n in once.indices), "drawn by seed"


def test_4_with_a_fixed_mask_nothing_else_moves():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    loop = loop_of(Lift(reselect_every=0), view)
    for _ in range(10):
        loop.step()
    sparse = loop.trainable.sparse
    for n, p in view.module.named_parameters():
        if ".luthier_" in n:
            continue
        moved = (p.detach() != before[n]).reshape(-1).nonzero().squeeze(1)
        if n in sparse.indices:
            assert 0 < len(moved) <= len(sparse.indices[n]) and torch.isin(moved, sparse.indices[n].long()).all()
        else:
            assert not len(moved), n


def test_5_with_every_entry_it_is_adam():
    view, plain = view_of(), tiny().eval()
    loop = loop_of(Lift(rank=500, reselect_every=0), view, max_steps=20)
    names = list(loop.trainable.sparse.indices)
    for n, p in plain.named_parameters():
        p.requires_grad_(n in names)
    dense = view_of()
    dense.module.load_state_dict(plain.state_dict())
    weights = [dense.weight(n) for n in names]
    adam = torch.optim.Adam(weights, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    from luthier.data.batch import collate
    from luthier.objectives.base import Forward

    for step in range(8):
        loop.step()
        for group in adam.param_groups:
            group["lr"] = 1e-3 * _factor(step)
        batch = collate([loop.rows[i] for i in loop.order.rows(step)])
        adam.zero_grad()
        nll = Forward(batch, dense).nll()
        (nll.sum() / len(nll)).backward()
        adam.step()
    for n in names:
        assert torch.allclose(view.weight(n), dense.weight(n), atol=1e-6), n


def _factor(step, total=20, warmup=2):
    return step / warmup if step < warmup else (total - step) / (total - warmup)


def test_6_a_new_mask_keeps_moments_where_masks_meet_and_moves_no_weight():
    view = view_of()
    loop = loop_of(Lift(density=0.1, reselect_every=0), view)
    for _ in range(5):
        loop.step()
    trainable, name = loop.trainable, next(iter(loop.trainable.sparse.indices))
    sparse, values = trainable.sparse, trainable.sparse.values[name]
    old, weight = sparse.indices[name].long().clone(), view.weight(name).detach().clone()
    before = {k: v.clone() for k, v in loop.optimizer.state[values].items()}
    size = view.weight(name).numel()
    others = [i for i in range(size) if i not in set(old.tolist())][: len(old) // 2]
    new = torch.tensor(sorted([*old[: len(old) - len(others)].tolist(), *others]))
    trainable.reselect(name, new)
    state = loop.optimizer.state[values]
    assert torch.equal(view.weight(name), weight) and len(values) == len(new) == len(state["exp_avg"])
    for key in ("exp_avg", "exp_avg_sq"):
        for i, position in enumerate(new.tolist()):
            was = (old == position).nonzero()
            assert float(state[key][i]) == (float(before[key][was[0, 0]]) if len(was) else 0.0)
    assert state["step"] == before["step"], "Adam's count goes on"
    # ... and back: what was dropped is taken up where training left it.
    loop.step()
    kept = view.weight(name).detach().clone()
    trainable.reselect(name, old)
    assert torch.equal(view.weight(name), kept)
    deltas = dict(trainable.update().deltas())[name]
    start = dict(view_of().module.named_parameters())[name]
    assert torch.allclose(start + deltas, kept, atol=1e-6)


def test_6_carried_by_hand():
    old, new = torch.tensor([1, 4, 6]), torch.tensor([0, 4, 6])
    assert carried(old, new, torch.tensor([10.0, 20.0, 30.0])).tolist() == [0.0, 20.0, 30.0]


def test_7_accumulated_gradients_are_those_of_one_batch():
    losses = []
    for limit in (10_000, 1):
        loop = loop_of(Lift(density=0.1, reselect_every=2), tokens_per_forward=limit, max_steps=10)
        losses.append([loop.step()["loss"] for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_blocks_are_whole():
    index = principal(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), 40, block=4)
    assert len(index) == 32
    rows, columns = index // 12, index % 12
    places = {(r // 4, c // 4) for r, c in zip(rows.tolist(), columns.tolist(), strict=True)}
    assert len(places) == 2 and all(int(((rows // 4 == a) & (columns // 4 == b)).sum()) == 16 for a, b in places)
    sparse = Lift(density=0.1, block=4).attach(view_of(), total_steps=10).sparse
    assert all(len(i) % 16 == 0 for i in sparse.indices.values())


def test_entries_are_chosen_again_and_a_resumed_run_is_the_same(tmp_path):
    def run(folder, *parts):
        for steps in parts:
            view = view_of()
            loop = Loop(view, rows_of(), Lift(density=0.1, reselect_every=3).attach(view, total_steps=15), Sft(),
                        SETTINGS.model_copy(update={"max_steps": 15, "learning_rate": 1e-2}), folder=folder)  # fmt: skip
            loop.resume()
            for _ in range(steps):
                loop.step()
            if folder is not None:
                loop.save()
        return loop

    whole, resumed = run(None, 7), run(tmp_path, 4, 3)
    assert whole.trainable.every == 3 and any(x < 1 for x in whole.trainable.overlap.values())
    for n, p in whole.view.module.named_parameters():
        assert torch.equal(p, resumed.view.module.get_parameter(n)), n
    a, b = whole.trainable.update().parts[0], resumed.trainable.update().parts[0]
    assert all(torch.equal(a.indices[n], b.indices[n]) and torch.equal(a.values[n], b.values[n]) for n in a.indices)
    assert sum(map(len, a.indices.values())) > sum(map(len, whole.trainable.sparse.indices.values())), (
        "the union of masks"
    )


def test_at_first_only_the_chosen_entries_train_and_none_was_ever_dropped():
    view = view_of()
    trainable = Lift(density=0.1).attach(view, total_steps=10)
    trains = {id(p) for p in view.module.parameters() if p.requires_grad}
    assert trains == {id(p) for p in trainable.sparse.values.values()}
    assert trainable.left.keys() == trainable.sparse.values.keys()
    assert all(len(x) == 0 for left in trainable.left.values() for x in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detaching_after_re_selection_gives_the_base_back(dtype):
    view = view_of("gpt2")
    view.module.to(dtype)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    loop = loop_of(Lift(density=0.1, reselect_every=2), view, max_steps=12, learning_rate=1e-2)
    for _ in range(5):
        loop.step()
    loop.trainable.detach()
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())


def test_the_work_of_choosing_is_in_the_ledger():
    loop = loop_of(Lift(density=0.1, reselect_every=2), max_steps=12)
    first = loop.progress.flops["select"]
    loop.step()
    assert loop.progress.flops["select"] == first > 0
    loop.step()
    assert loop.progress.flops["select"] == 2 * first


@pytest.mark.parametrize("steps", [4, 12])
def test_it_says_how_often_it_chooses_and_the_first_time_counts(steps):
    view, tuner = view_of(), Lift(rank=2, reselect_every=5)
    settings = TrainSettings(max_steps=steps, batch_size=4)
    loop = Loop(view, rows_of(), tuner.attach(view, None, steps), Sft(), settings)
    a_choice = loop.progress.flops["select"]
    for _ in range(steps):
        loop.step()
    assert loop.progress.flops["select"] == pytest.approx(a_choice * tuner.selections(steps)) and a_choice > 0
    assert loop.trainable.attach_seconds < loop.progress.select_seconds < loop.progress.seconds
    assert [tuner.selections(n) for n in (1, 4, 5, 15, 26)] == [1, 1, 5, 5, 6], "a fifth of four steps is no step"


def test_bad_input(caplog):
    for wrong in ({"rank": 0}, {"filter_rank": 0}, {"density": 0}, {"density": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lift(**wrong)
    view = view_of()
    view.weight("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(LuthierError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        Lift().attach(view, total_steps=10)
    with pytest.raises(LuthierError, match="matches 0 of"):
        Lift(targets=("nothing",)).attach(view_of(), total_steps=10)
    with pytest.raises(RecipeError, match="total number of steps"):
        Lift().attach(view_of())
    decay = TrainSettings(weight_decay=0.1)
    assert [p.key for p in Lift().check(Facts(settings=decay))] == ["weight_decay"]
    with caplog.at_level(logging.WARNING):
        Lift(filter_rank=1000).attach(view_of(), total_steps=10)
    assert "is cut to" in caplog.text
    one, other = (
        Lift(density=0.1).attach(view_of(), total_steps=10),
        Lift(density=0.2).attach(view_of(), total_steps=10),
    )
    with pytest.raises(LuthierError, match="the checkpoint trains"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(RecipeError, match="tied to the embeddings"):
        Lift(targets=("lm_head", "q_proj")).attach(tiny(tie_word_embeddings=True), total_steps=10)


def test_what_is_said_of_numbers_that_do_not_fit_is_said_only_then(caplog):
    with caplog.at_level(logging.INFO, "luthier"):
        for steps, filter_rank in ((200, 16), (199, 17)):
            caplog.clear()
            tuner = Lift(filter_rank=filter_rank, targets=("layers.0.self_attn.k_proj",))  # 16 x 32
            tuner.check(Facts(total_steps=steps))
            tuner.attach(view_of(), total_steps=steps)
            assert [r.levelname for r in caplog.records] == ([] if filter_rank == 16 else ["INFO", "WARNING"])


def test_without_a_length_it_chooses_once():
    assert Lift(reselect_every=0).attach(view_of()).every == 0


def test_a_matrix_without_whole_blocks_is_refused_without_weights():
    anatomy = view_of().anatomy
    Lift(targets=("lm_head",)).check_model(anatomy)
    with pytest.raises(RecipeError, match=r"lm_head\.weight of 97 x 32 has no whole blocks"):
        Lift(block=4, targets=("lm_head",)).check_model(anatomy)


def test_the_work_of_the_first_choice_is_its_own_and_a_whole_rank_needs_none():
    """14 m n^2 + 8 n^3 for the decomposition of a matrix of 32 x 16, and 2 m n r for the product."""
    for filter_rank, flops in ((3, 14 * 32 * 16**2 + 8 * 16**3 + 2 * 16 * 32 * 3), (16, 0), (20, 0)):
        view, start = view_of(), time.perf_counter()
        view.meter.charge(1000.0)
        trainable = Lift(filter_rank=filter_rank, targets=("layers.0.self_attn.k_proj",)).attach(view, total_steps=10)
        assert trainable.attach_flops == flops
        assert 0 < trainable.attach_seconds < time.perf_counter() - start


def test_a_second_one_on_the_same_entries_is_refused_before_anything_changes():
    view = view_of()
    first = Lift().attach(view, total_steps=10)
    with pytest.raises(LuthierError, match="train already"):
        Lift().attach(view, total_steps=10)
    assert view.attached == [first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_taken_over_whatever_was_trained_meanwhile(dtype):
    view = view_of()
    view.module.to(dtype)
    loop = loop_of(Lift(density=0.1, reselect_every=2), view, max_steps=15, learning_rate=1e-2, warmup_fraction=0.0)
    for _ in range(3):
        loop.step()
    state = {k: t.clone() for k, t in loop.trainable.state_dict().items()}
    assert state["steps"] == 3 and not any(t.requires_grad for t in loop.trainable.state_dict().values())
    weights = {n: view.weight(n).detach().clone() for n in view.anatomy.parameters}
    for _ in range(4):
        loop.step()
    loop.trainable.load_state_dict(state)
    assert all(torch.equal(view.weight(n), w) for n, w in weights.items())
    assert all(torch.equal(t, state[k]) for k, t in loop.trainable.state_dict().items())
