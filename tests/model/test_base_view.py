"""`without_update`: the base model in the middle of training. The contract suite tests it for every tuner; this is the rest."""

import copy

import pytest
import torch

from luthier.data.batch import collate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import states
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Adapter, Dept, Full, Hft, Layerwise, Lift, Lora, Peft, Spiel
from luthier.tuners.base import Trainable, with_head
from luthier.update import Dense, Structure, Update

SETTINGS = TrainSettings(max_steps=6, batch_size=2, learning_rate=1e-2, warmup_fraction=0)


def trained(tuner, view, rows=None, steps=5):
    trainable = with_head(tuner.attach(view, total_steps=6), view.anatomy.task_head)
    loop = Loop(view, rows or rows_of(), trainable, Sft(), SETTINGS)
    for _ in range(steps):
        loop.step()
    view.module.eval()
    return loop


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "bert", "lfm2"])
@pytest.mark.parametrize(
    "tuner",
    [Lora(rank=2), Adapter(rank=2), Full(), Layerwise(freeze_blocks=1, reinit_blocks=1), Spiel(density=0.02),
     Lift(density=0.1, reselect_every=1), Peft(type="IA3")],
    ids=lambda t: t.key(),
)  # fmt: skip
def test_on_other_architectures(kind, tuner):
    view, batch = view_of(kind), batch_of((6, 9))
    base = states(view_of(kind), batch)
    trained(tuner, view)
    tuned = states(view, batch)
    with view.without_update():
        assert torch.equal(states(view, batch), base)
    assert torch.equal(states(view, batch), tuned) and not torch.equal(tuned, base)


OPTIONS = {
    "dora": Peft(options={"r": 4, "use_dora": True}), "saved": Peft(options={"r": 4, "modules_to_save": ["norm"]}),
    "ia3": Peft(type="IA3"), "loha": Peft(type="LOHA", options={"r": 4}), "lokr": Peft(type="LOKR", options={"r": 4}),
    "vera": Peft(type="VERA", options={"r": 8}, targets=("q_proj", "o_proj")),
    "oft": Peft(type="OFT", options={"oft_block_size": 4}), "hra": Peft(type="HRA", options={"r": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_without_each_of_pefts_adapters(name):
    view, plain, batch = view_of(), tiny(), batch_of((6, 9))
    base = states(view_of(), batch)
    trained(OPTIONS[name], view, steps=2)
    tuned, names = states(view, batch), [n for n, _ in view.module.named_parameters()]
    with view.without_update():
        assert torch.equal(states(view, batch), base)
        assert [n for n, _ in view.module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(states(view, batch), tuned) and [n for n, _ in view.module.named_parameters()] == names


def test_biases_that_peft_trains_are_the_bases_inside():
    view, batch = view_of("gpt2"), batch_of((6, 9))
    trained(Peft(options={"r": 2, "bias": "all"}), view, steps=2)
    tuned = states(view, batch)
    with view.without_update():
        assert torch.equal(states(view, batch), states(view_of("gpt2"), batch))
    assert torch.equal(states(view, batch), tuned)


@pytest.mark.parametrize("tuner", [Lora(rank=2), Full(), Lift(density=0.1)], ids=lambda t: t.key())
def test_a_task_head_is_the_fresh_one_inside(tuner):
    view = ModelView(tiny("bert-classifier").eval(), layout="padded")
    rows = [{**r, "labels": [-100] * len(r["ids"]), "row": {"label": i % 3}} for i, r in enumerate(rows_of())]
    batch = collate(rows)
    fresh = ModelView(tiny("bert-classifier").eval(), layout="padded")
    with torch.no_grad():
        logits = lambda v: v.class_logits(v.trace(batch).hidden[-1], batch)  # noqa: E731
        base = logits(fresh)
        loop = trained(tuner, view, rows)
        tuned = logits(view)
        with view.without_update():
            assert torch.equal(logits(view), base)
        assert torch.equal(logits(view), tuned)
    assert view.attached == [loop.trainable], "only the whole is attached, not its parts"
    with loop.trainable.base_view(), torch.no_grad():
        assert torch.equal(logits(view), base)


def test_features_that_are_cached_are_not_taken_for_the_base():
    """Cached outputs of frozen blocks came from other batches, which round differently, so the base must not use them."""
    view, batch = view_of(), batch_of((6, 9))
    loop = trained(Layerwise(freeze_blocks=2, cache_features=True), view, rows_of((6, 9)))
    kept = dict(loop.trainable.features.states)
    assert kept
    with loop.trainable.phase("train"), torch.no_grad():
        for v in kept.values():
            v.add_(1.0)
        tuned = states(view, batch)
        with view.without_update():
            assert torch.equal(states(view, batch), states(view_of(), batch))
        assert torch.equal(states(view, batch), tuned)
    assert loop.trainable.features.states == kept


def test_a_look_draws_no_random_number_and_leaves_every_mode():
    view = view_of(attention_dropout=0.5)
    Lora(rank=2, dropout=0.5).attach(view)
    view.module.train()
    view.block(1).eval()
    modes, before = [m.training for m in view.module.modules()], torch.get_rng_state()
    with view.without_update():
        states(view, batch_of())
    assert torch.equal(torch.get_rng_state(), before) and [m.training for m in view.module.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("tuner", [Full(), Spiel(density=0.05), Lora(rank=3), Hft()], ids=lambda t: t.key())
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_earlier_graph_has_the_same_gradients(tuner, checkpointing):
    """A forward pass, a use of the base, and only then the backward pass: the gradients are as without the use."""
    gradients = []
    for looks in (False, True):
        view = view_of("llama" if tuner.key() == "hft" else "gpt2")
        trainable = tuner.attach(view, total_steps=4)
        trainable.before_window(None, None)
        if checkpointing:
            view.checkpoint_blocks()
        view.module.train()
        loss = (view.trace(batch_of()).hidden[-1] * torch.arange(32)).sum()
        if looks:
            with view.without_update():
                states(view, batch_of())
        loss.backward()
        trainable.after_backward()
        gradients.append([p.grad.clone() for p in trainable.parameters() if p.grad is not None])
    assert len(gradients[0]) > 3 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_forward_keeps_base_and_tuned_states_apart():
    """Whichever is computed first, states of the base are never used for the tuned model, or the other way round."""
    view, batch = view_of(), batch_of()
    loop = trained(Full(), view)
    with torch.no_grad():
        tuned = Forward(batch, view).hidden()
        for ask in (lambda f: f.hidden(), lambda f: f.trace(0, -1).hidden[-1]):
            forward = Forward(batch, view)
            with view.without_update():
                base = ask(forward)
            assert torch.equal(ask(forward), tuned) and not torch.equal(base, tuned)
            with loop.trainable.base_view():
                assert torch.equal(ask(forward), base)
            with view.without_update():
                assert ask(forward) is base, "run once"
            with loop.trainable.update().bind(view):
                assert not torch.equal(ask(forward), tuned)
            assert torch.equal(ask(forward), tuned)


def test_gradients_of_the_base_can_be_taken_inside():
    view, batch, names = view_of(), batch_of(), ["model.layers.1.mlp.up_proj.weight"]
    trained(Full(), view)
    fresh = Probe(view_of(), Sft()).gradients([batch], names)
    with view.without_update():
        seen = Probe(view, Sft()).gradients([batch], names)
        trial = Probe(view, Sft()).trial_step([batch], names, lambda ps: torch.optim.SGD(ps, lr=1.0))
        assert torch.equal(states(view, batch), states(view_of(), batch))
    assert seen.loss == pytest.approx(fresh.loss, abs=1e-6) == trial.loss
    torch.testing.assert_close(seen.grads[names[0]], fresh.grads[names[0]], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "first", [Lora(rank=2), Adapter(rank=2), Full(), Peft(type="IA3"), Spiel(density=0.05)], ids=lambda t: t.key()
)
@pytest.mark.parametrize(
    "second",
    [Lora(rank=3, seed=1), Full(), Dept(budget_length=12, length=4, max_length=16), Lift(density=0.1)],
    ids=lambda t: t.key(),
)
def test_bound_updates_are_left_out_too_and_base_view_leaves_out_one_trainable(first, second):
    batch, origin = batch_of(), view_of()
    update = trained(first, origin).trainable.update()
    view = view_of()
    base = states(view, batch)
    with update.bind(view):
        start = states(view, batch)
        loop = trained(second, view)
        tuned = states(view, batch)
        with view.without_update():
            assert torch.equal(states(view, batch), base)
            with update.bind(view):  # onto the base, as nothing else is there
                torch.testing.assert_close(states(view, batch), start, atol=1e-6, rtol=1e-5)
                with view.without_update():
                    assert torch.equal(states(view, batch), base)
            assert torch.equal(states(view, batch), base)
        with loop.trainable.base_view():
            assert torch.equal(states(view, batch), start)
            with view.without_update():
                assert torch.equal(states(view, batch), base)
        assert torch.equal(states(view, batch), tuned) and not torch.equal(tuned, start)
        loop.trainable.detach()
        assert torch.equal(states(view, batch), start)
    assert torch.equal(states(view, batch), base) and not view.attached


@pytest.mark.parametrize("second", [Lora(rank=3), Full(), Spiel(density=0.05)], ids=lambda t: t.key())
def test_removed_structure_is_back_inside(second):
    view, batch = view_of(), batch_of()
    base, anatomy = states(view, batch), view.anatomy
    removed = Structure.removing(anatomy, heads={0: [1, 3], 2: [0, 2]}, neurons={1: [0, 5, 63]})
    with Update(view.base, (removed,)).bind(view):
        start, short = states(view, batch), view.anatomy
        loop = trained(second, view)
        tuned = states(view, batch)
        shapes = {n: tuple(p.shape) for n, p in view.module.named_parameters()}
        with view.without_update():
            assert torch.equal(states(view, batch), base) and view.anatomy is anatomy
            with view.without_update(), loop.trainable.base_view():
                assert torch.equal(states(view, batch), base)
        assert torch.equal(states(view, batch), tuned) and view.anatomy is short
        assert {n: tuple(p.shape) for n, p in view.module.named_parameters()} == shapes
        with loop.trainable.base_view():
            assert torch.equal(states(view, batch), start)
        loop.trainable.detach()
        assert torch.equal(states(view, batch), start) and not torch.equal(start, base)
    assert torch.equal(states(view, batch), base)


def test_the_plain_model_call_and_another_view_see_the_base():
    model = tiny().eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        base, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        trainable = Dept(budget_length=12, length=4, max_length=16).attach(model)
        for p in trainable.parameters():
            p.normal_()
        tuned = model(ids, prompt_mask=torch.ones_like(ids)).logits
        with ModelView(model).without_update():
            assert torch.equal(model(ids).logits, base)
            written = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert torch.equal(written, text)
        assert torch.equal(model(ids, prompt_mask=torch.ones_like(ids)).logits, tuned)


def test_the_ledger_counts_the_base_as_the_base():
    view, batch = view_of(), batch_of()
    spent = []
    for tuner in (None, Lora(rank=8), Adapter(rank=8)):
        trainable = None if tuner is None else tuner.attach(view)
        with view.meter.watching(view.module), view.without_update():
            before = view.meter.total
            states(view, batch)
            spent.append(view.meter.total - before)
        if trainable is not None:
            trainable.detach()
    assert spent[0] == spent[1] == spent[2] > 0


def test_base_view_is_refused_if_a_later_update_changed_the_same_weights():
    view, batch = view_of(), batch_of()
    loop, base = trained(Full(), view), states(view_of(), batch)
    change = Update(view.base, (Dense({"model.norm.weight": torch.full((32,), 0.5)}),))
    with change.bind(view):
        both = states(view, batch)
        with (
            pytest.raises(LuthierError, match="Bound came later and changed model.norm.weight too"),
            loop.trainable.base_view(),
        ):
            pass
        with view.without_update(), loop.trainable.base_view():
            assert torch.equal(states(view, batch), base)
        assert torch.equal(states(view, batch), both)


class Silent(Trainable):
    """Changes the model without `put`, so that nobody knows how to undo it."""

    def __init__(self, view):
        super().__init__(view)
        with torch.no_grad():
            view.weight("model.norm.weight").mul_(2)


def test_a_trainable_that_cannot_be_left_out_is_refused():
    view = view_of()
    Silent(view)
    with (
        pytest.raises(LuthierError, match=r"Silent does not say how the model computes without it: call put\(\)"),
        view.without_update(),
    ):
        pass
    assert not view.module.training


@pytest.mark.parametrize(
    ("tuner", "words"),
    [(Lora(targets=("no_such",)), "no_such"), (Peft(options={"r": 0}), "positive"), (Spiel(density=1.0), "asks for"),
     (Lift(density=0.1, block=4, targets=("lm_head",)), "whole blocks"), (Full(), "quantised"), (Layerwise(), "quantised"),
     (Spiel(num_weights=30), "quantised")],
)  # fmt: skip
def test_a_refused_tuner_leaves_nothing_behind(tuner, words):
    view = view_of()
    if words == "quantised":
        packed = torch.nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
        view.layer("model.layers.0.mlp.down_proj").weight = packed
    flags = {n: p.requires_grad for n, p in view.module.named_parameters()}
    with pytest.raises(LuthierError, match=words):
        tuner.attach(view, total_steps=6)
    assert not view.attached and {n: p.requires_grad for n, p in view.module.named_parameters()} == flags


def test_a_copied_model_has_nothing_attached():
    view = view_of()
    trained(Full(), view)
    twin = copy.deepcopy(view.module)
    assert not ModelView(twin).attached and len(view.attached) == 1
