"""The exact checks of the sheet; numbers in names are the sheet's."""

import pytest
import torch
import torch.nn.functional as F

from luthier.data.batch import IGNORE, collate
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.caft import Caft, further_labels, schedule_weight
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.frozen import Frozen
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora


def planned(view, objective, batch, clock=Clock(0, 10)):  # noqa: B008
    extra = objective.extend(view)
    window, counts = objective.plan(Window([batch], clock), Probe(view, objective, extra))
    return Forward(window.micro[0], view, extra), counts


def test_1_weight_zero_is_sft_to_the_bit():
    ends = []
    for objective in (Sft(), Caft(weight=0.0, allow_untrained_heads=True)):
        view = view_of()
        loop = Loop(view, rows_of(), Lora(rank=4).attach(view), objective, TrainSettings(max_steps=3, batch_size=4))
        ends.append([loop.step()["loss"] for _ in range(3)] + [float(p.sum()) for p in loop.trainable.parameters()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_2_copied_heads_predict_what_the_model_does(kind, layout):
    view, objective = view_of(kind), Caft(allow_untrained_heads=True)
    view.layout = layout
    fwd, _ = planned(view, objective, batch_of())
    last = len(view.anatomy.blocks) - 1
    for block in fwd.extra.blocks:
        torch.testing.assert_close(objective._state(fwd, block, last), fwd.hidden(), atol=1e-5, rtol=1e-5)


def test_3_shift_equals_a_plain_cross_entropy():
    view, objective = view_of(), Caft(allow_untrained_heads=True)
    rows = rows_of((12,), answer=6)
    batch = collate(rows)
    fwd, counts = planned(view, objective, batch)
    with torch.no_grad():
        for p in fwd.extra.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    terms = objective.loss(fwd)
    labels = torch.tensor(rows[0]["labels"])
    for i in range(1, 5):
        z = objective._state(fwd, fwd.extra.blocks[i - 1], 2) @ view.head_weight.T
        expected = F.cross_entropy(z[: -(1 + i)], labels[1 + i :], ignore_index=IGNORE, reduction="sum")
        assert float(terms[f"ahead_{i}"].sums) == pytest.approx(float(expected), abs=1e-4)
    assert counts["ahead.4"] == 6.0  # some of them inside the prompt


def test_3_changing_a_label_moves_one_position():
    batch = batch_of((10,), answer=6)
    for i in range(1, 5):
        base = further_labels(batch, i)
        labels = batch.labels.clone()
        labels[7] = 3  # what position 7 predicts, token 8
        changed = (further_labels(type(batch)(**{**vars(batch), "labels": labels}), i) != base).nonzero().squeeze(1)
        assert changed.tolist() == [7 - i]


def test_3_labels_stay_within_their_sequence():
    batch = batch_of((5, 6), answer=3)
    for i in range(1, 5):
        ahead = further_labels(batch, i)
        for s in range(2):
            alone = further_labels(batch.select(torch.tensor([s])), i)
            assert torch.equal(ahead[batch.seq == s], alone)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_4_heads_do_not_see_the_future(layout):
    view, objective, batch = view_of(), Caft(allow_untrained_heads=True), batch_of((9, 7))
    view.layout = layout
    states = []
    for change in (False, True):
        ids = batch.ids.clone()
        if change:
            ids[batch.ends] = (ids[batch.ends] + 1) % 90
        fwd, _ = planned(view, objective, type(batch)(**{**vars(batch), "ids": ids}))
        states.append(objective._state(fwd, fwd.extra.blocks[0], 2).detach())
    earlier = torch.ones(batch.num_tokens, dtype=torch.bool)
    earlier[batch.ends] = False
    torch.testing.assert_close(states[0][earlier], states[1][earlier], atol=1e-6, rtol=0)
    assert not torch.allclose(states[0][~earlier], states[1][~earlier])


def test_5_schedule():
    values = [schedule_weight("rsine", Clock(s, 100)) for s in (0, 50, 100)]
    assert values == pytest.approx([1.0, 0.70711, 0.0], abs=1e-5)
    assert schedule_weight("rsine", Clock(0, 0)) == 1.0
    terms_weights = [0.8**i for i in range(1, 5)]
    assert terms_weights == pytest.approx([0.8, 0.64, 0.512, 0.4096])
    view, objective = view_of(), Caft(stage="heads")
    fwd, _ = planned(view, objective, batch_of())
    assert [t.weight for t in objective.loss(fwd).values()] == pytest.approx(terms_weights)


def test_6_stage_one_leaves_the_model_and_stage_two_the_heads():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    heads = Loop(view, rows_of(), Frozen().attach(view), Caft(stage="heads"), TrainSettings(max_steps=3, batch_size=4))
    start = {n: p.detach().clone() for n, p in heads.extra.state_dict().items()}
    for _ in range(3):
        heads.step()
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    carried = heads.extra.state_dict()
    assert any(not torch.equal(start[n], carried[n]) for n in start)

    trainable = Full().attach(view)
    tune = Loop(
        view,
        rows_of(),
        trainable,
        Caft(weight=0.5),
        TrainSettings(max_steps=3, batch_size=4),
        carried=carried,
    )
    for _ in range(3):
        tune.step()
    assert all(torch.equal(carried[n], p) for n, p in tune.extra.state_dict().items())

    fwd = Forward(tune.objective.plan(tune.window(0), tune.probe)[0].micro[0], view, tune.extra)
    ahead = tune.objective.loss(fwd)["ahead_2"].sums
    (g,) = torch.autograd.grad(ahead, view.weight("model.layers.0.mlp.up_proj.weight"))
    assert float(g.abs().sum()) > 0


def test_7_the_update_is_of_the_model_alone():
    view = view_of()
    trainable = Full().attach(view)
    loop = Loop(
        view,
        rows_of(),
        trainable,
        Caft(weight=0.5, allow_untrained_heads=True),
        TrainSettings(max_steps=2, batch_size=4),
    )
    for _ in range(2):
        loop.step()
    live = view.trace(batch_of()).hidden[-1]
    names = {n for n, _ in trainable.update().deltas()}
    assert names == set(view.anatomy.parameters) == set(dict(view.module.named_parameters()))
    update = trainable.update()
    trainable.detach()
    fresh = view_of()
    with update.bind(fresh):
        torch.testing.assert_close(fresh.trace(batch_of()).hidden[-1], live, atol=1e-6, rtol=0)


def test_untrained_heads_are_refused_and_strangers_are_named():
    view = view_of()
    loop = Loop(view, rows_of(), Lora().attach(view), Caft(), TrainSettings(max_steps=1))
    with pytest.raises(LuthierError, match="heads are untrained"):
        loop.step()
    other = Caft(stage="heads").extend(view_of(hidden_size=64)).state_dict()
    with pytest.raises(LuthierError, match="hidden size 64, here 32"):
        Caft().extend(view_of(), other)


def test_heads_without_targets_are_skipped():
    fwd, _ = planned(view_of(), Caft(allow_untrained_heads=True), batch_of((4, 3), answer=1))
    terms = Caft(allow_untrained_heads=True).loss(fwd)
    assert "next" in terms and all(torch.isfinite(t.sums) for t in terms.values())


@pytest.mark.parametrize("fields", [{"ahead": 1}, {"weight": -0.1}, {"decay": 0.0}, {"schedule": "cosine"}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Caft(**fields)


@pytest.mark.parametrize("name", ["lora", "adapter", "spiel", "peft"])
def test_heads_copy_the_base_whatever_hangs_on_it(name):
    """A copied adapter would compute with the trunk's layer, and train or freeze what is the tuner's."""
    from luthier.tuners import Adapter, Lora, Peft, Spiel

    tuners = {
        "lora": Lora(rank=4), "adapter": Adapter(rank=4, init_std=0.05), "spiel": Spiel(density=0.05),
        "peft": Peft(options={"r": 4, "use_dora": True}),
    }  # fmt: skip
    plain, view = view_of(), view_of()
    reference = Caft().extend(plain)
    trainable = tuners[name].attach(view, total_steps=50)
    heads = Caft().extend(view)
    assert {n for n, _ in heads.named_parameters()} == {n for n, _ in reference.named_parameters()}
    with torch.no_grad():
        for p in view.module.parameters():  # the trunk moves on; the heads must not follow
            p.add_(0.1)
    batch = batch_of()
    trace = plain.trace(batch, (2, -1))
    there = plain.run_block(reference.blocks[0], trace.hidden[2], trace)
    here = view.run_block(heads.blocks[0], trace.hidden[2], trace)
    torch.testing.assert_close(here, there)
    assert trainable.update().parts
