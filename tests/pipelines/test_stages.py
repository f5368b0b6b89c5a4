"""Stages from the recipe: in order, handing on, taken up where they ended."""

from contextlib import ExitStack

import pytest
import torch

from luthier.method import Facts
from luthier.model.view import ModelView
from luthier.objectives.caft import Caft
from luthier.objectives.sft import Sft
from luthier.pipelines import Stages
from luthier.pipelines.base import run_pipeline
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Interrupted, Loop
from luthier.tuners import Frozen, Full, GreenTrainer, Hft, Layerwise, Lift, Lora, Peft, Spiel
from luthier.tuners.hft import draw_plan
from luthier.update.files import save_update, verify_update

BRISK = {
    "max_steps": 3,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup_fraction": 0.0,
    "lr_scheduler_type": "constant",
}


def stages(*items):
    return Stages(stages=[{**BRISK, **x} for x in items])


def two(first, second, **more):
    """A stage a, and a stage b that goes on from it."""
    return stages({"name": "a", "tuner": first, **more}, {"name": "b", "start": "a", "tuner": second, **more})


def carried_out(pipeline, view=None, folder=None, **loop):
    return run_pipeline(pipeline, view or view_of(), Lab({"train": rows_of()}), folder, **loop)


def weights_with(update):
    """Parameters of a fresh base with an update in them."""
    model = tiny().eval()
    update.merge_into(model)
    return {n: p.detach() for n, p in model.named_parameters()}


def trained_alone(tuner, model):
    """What a run of its own makes of this model."""
    view = ModelView(model, layout=view_of().layout)
    loop = Loop(view, rows_of(), tuner.attach(view, None, 3), Sft(), TrainSettings(**BRISK))
    loop.run()
    update = loop.trainable.update()
    loop.trainable.detach()
    update.merge_into(model)
    return model


def test_one_stage_is_a_plain_run():
    view, plain = view_of(), view_of()
    done = run_pipeline(stages({"name": "only", "tuner": Lora(rank=4)}), view, Lab({"train": rows_of()}))
    loop = Loop(plain, rows_of(), Lora(rank=4).attach(plain), Sft(), TrainSettings(**BRISK))
    loop.run()
    ours, theirs = done["only"].update.parts[0], loop.trainable.update().parts[0]
    assert all(torch.equal(ours.b[n], theirs.b[n]) for n in ours.b)


def test_a_later_stage_goes_on_from_an_earlier_one_or_from_the_base():
    lora = {"tuner": Lora(rank=4)}
    both = stages({"name": "a", **lora}, {"name": "b", "start": "a", **lora}, {"name": "c", **lora})
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    done = run_pipeline(both, view, Lab({"train": rows_of()}))
    size = {n: sum(float(t.square().sum()) for t in o.update.parts[0].b.values()) for n, o in done.items()}
    assert size["b"] > size["a"] and size["c"] == size["a"]
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


RING = (
    Lora(rank=4),
    Full(),
    Spiel(density=0.05, reselect_every=2, window=1),
    Lift(density=0.1, reselect_every=2),
    Hft(),
    GreenTrainer(flops_share=0.8),
    Layerwise(reinit_blocks=1),
    Lora(rank=2),
)


@pytest.mark.parametrize(("first", "second"), zip(RING, RING[1:] + RING[:1], strict=True), ids=lambda t: f"{t.key()}")
def test_another_tuner_goes_on_where_the_first_one_ended_and_the_result_holds_both(first, second):
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    done = carried_out(two(first, second), view)
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters()), "the base is left as it was"
    wanted = trained_alone(second, trained_alone(first, tiny().eval()))
    found = weights_with(done["b"].update)
    for n, p in wanted.named_parameters():
        torch.testing.assert_close(found[n], p.detach(), atol=3e-5, rtol=0, msg=lambda m, n=n: f"{n}: {m}")
    only = weights_with(done["a"].update)
    assert any(not torch.equal(only[n], found[n]) for n in only)


def test_the_result_of_stages_bound_to_the_base_is_what_they_trained():
    """A dense, a low-rank and a sparse part in one update, beside each other."""
    three = stages(
        {"name": "a", "tuner": Hft()},
        {"name": "b", "start": "a", "tuner": Lora(rank=2)},
        {"name": "c", "start": "b", "tuner": Lift(density=0.1)},
    )
    update, view, batch = carried_out(three)["c"].update, view_of(), batch_of()
    assert {p.kind for p in update.parts} == {"dense", "lowrank", "sparse"}
    model = tiny().eval()
    update.merge_into(model)
    with update.bind(view):
        bound = view.trace(batch).hidden[-1]
    torch.testing.assert_close(bound, ModelView(model, layout=view.layout).trace(batch).hidden[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tuner", [Full(), Lora(rank=2), Lift(density=0.1, reselect_every=0)], ids=lambda t: t.key())
def test_a_third_stage_with_the_tuner_of_the_second_keeps_what_lies_below_both(tuner):
    below, same = {"tuner": Lora(rank=4)}, {"tuner": tuner}
    three = stages({"name": "a", **below}, {"name": "b", "start": "a", **same}, {"name": "c", "start": "b", **same})
    done = carried_out(three)
    model = trained_alone(Lora(rank=4), tiny().eval())
    view = ModelView(model, layout=view_of().layout)
    trainable = tuner.attach(view, None, 3)
    for _ in range(2):  # each stage has an optimiser of its own
        Loop(view, rows_of(), trainable, Sft(), TrainSettings(**BRISK)).run()
    update = trainable.update()
    trainable.detach()
    update.merge_into(model)
    found = weights_with(done["c"].update)
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.detach(), atol=3e-5, rtol=0)


def test_small_differences_of_an_earlier_stage_survive_low_precision():
    """Differences below half a step of bf16: rounded to nearest they would be gone from what the next stage trains on."""
    view = view_of()
    view.module.to(torch.bfloat16)
    done = carried_out(stages({"name": "a", "tuner": Lora(rank=4), "learning_rate": 1e-5, "max_steps": 1}), view)
    update = done["a"].update
    before = {n: p.detach().float() for n, p in view.module.named_parameters()}
    wanted, seen, nearest = 0.0, 0.0, 0.0
    with update.in_place(view):
        for n, d in update.deltas():
            wanted += float((d * d).sum())
            seen += float(((view.weight(n).float() - before[n]) * d).sum())
            nearest += float((((before[n] + d).bfloat16().float() - before[n]) * d).sum())
    assert nearest < 0.7 * wanted and seen == pytest.approx(wanted, rel=0.1)
    assert all(torch.equal(p.float(), before[n]) for n, p in view.module.named_parameters())


def test_hft_draws_anew_for_each_of_its_stages():
    view = view_of()
    done = carried_out(
        stages({"name": "a", "tuner": Hft()}, {"name": "x"}, {"name": "b", "start": "a", "tuner": Hft()})
    )
    moved = {}
    for name, start in (("a", None), ("b", "a")):
        now = weights_with(done[name].update)
        base = weights_with(done[start].update) if start else {n: p.detach() for n, p in tiny().named_parameters()}
        moved[name] = {n for n in now if not torch.equal(now[n], base[n])}
    assert moved["a"] == draw_plan(view.anatomy, stage=0) and moved["b"] == draw_plan(view.anatomy, stage=1)
    assert moved["a"] != moved["b"] and moved["b"] - moved["a"], "other tensors get their turn"


@pytest.mark.parametrize(("stage", "drawn"), [(0, 0), (1, 1), (5, 5)])
def test_a_stage_number_in_the_recipe_is_the_one_that_is_drawn_for(stage, drawn):
    pipeline = two(Hft(stage=0), Hft(stage=stage))
    done = carried_out(pipeline)
    a, b = (weights_with(done[n].update) for n in "ab")
    moved = {n for n in a if not torch.equal(a[n], b[n])}
    assert moved == draw_plan(view_of().anatomy, stage=drawn)


def test_spiel_goes_on_with_one_schedule_over_both_stages():
    tuner = Spiel(density=0.05, reselect_every=3, window=1)
    done = carried_out(two(tuner, tuner, max_steps=8))
    a, b = done["a"].state, done["b"].state
    assert int(b["steps"]) == 16
    names = [k for k in a if k.startswith("indices.")]
    moved = [~torch.isin(b[k], a[k]) for k in names]
    share = float(torch.cat(moved).float().mean())
    # Events after steps 10 and 13 replace 0.2 * (1 - 10 / 16) and 0.2 * (1 - 13 / 16) of the entries at most.
    assert 0 < share <= 0.2 * (6 / 16 + 3 / 16)


def test_lift_chooses_again_in_a_stage_that_goes_on():
    tuner = Lift(density=0.1, reselect_every=2)
    done = carried_out(two(tuner, tuner, max_steps=10, learning_rate=0.03))
    a, b = done["a"].state, done["b"].state
    assert any(not torch.equal(a[k], b[k]) for k in a if k.startswith("indices."))


def test_finished_stages_are_taken_up_and_not_trained_again(tmp_path):
    items = ({"name": "a", "tuner": Lora(rank=4)}, {"name": "b", "start": "a", "tuner": Full()})
    first, again = [], []
    for seen in (first, again):
        lab = Lab({"train": rows_of()})
        done = run_pipeline(
            stages(*items), view_of(), lab, tmp_path, on_step=lambda e, p, t, seen=seen: seen.append(e["step"])
        )
        seen.append(done["b"].update.digest())
    assert first[:-1] == [1, 2, 3, 1, 2, 3] and again == [first[-1]]


TUNERS = {
    "lora": Lora(rank=4),
    "full": Full(),
    "spiel": Spiel(density=0.05),
    "dora": Peft(options={"r": 2, "use_dora": True}),
}

FORM = {"lora": "lowrank", "full": "dense", "spiel": "sparse", "dora": "peft"}


def live_states(view, monkeypatch):
    """The model's states at the end of each stage, while the stage is still attached."""
    seen = []
    loop_run = Loop.run

    def run(loop, deadline=None):
        progress = loop_run(loop, deadline)
        view.module.eval()
        seen.append(view.trace(batch_of()).hidden[-1].detach())
        return progress

    monkeypatch.setattr(Loop, "run", run)
    return seen


@pytest.mark.parametrize(
    "tuners",
    [
        ("lora", "full"),
        ("full", "lora"),
        ("lora", "spiel"),
        ("full", "lora", "lora"),
        ("lora", "full", "full"),
        ("lora", "dora"),
    ],
)
def test_what_another_tuner_goes_on_with_gives_one_update_that_is_the_live_model(tuners, monkeypatch, tmp_path):
    view, names = view_of(), "abc"[: len(tuners)]
    base = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    seen = live_states(view, monkeypatch)
    items = [
        {"name": n, "tuner": TUNERS[t], **({"start": names[i - 1]} if i else {})}
        for i, (n, t) in enumerate(zip(names, tuners, strict=True))
    ]
    done = run_pipeline(stages(*items), view, Lab({"train": rows_of()}))
    assert all(torch.equal(p, base[n]) for n, p in view.module.named_parameters())
    for i, outcome in enumerate(done.values()):
        assert i == 0 or float((seen[i] - seen[i - 1]).abs().max()) > 1e-4
        assert {p.kind for p in outcome.update.parts} == {FORM[t] for t in tuners[: i + 1]}
        with outcome.update.bind(view):
            torch.testing.assert_close(view.trace(batch_of()).hidden[-1], seen[i], atol=1e-5, rtol=1e-5)
    save_update(outcome.update, tmp_path, view)
    with ExitStack() as live:
        live.enter_context(outcome.update.bind(view))
        assert verify_update(tmp_path, live.close, view, rows_of()[0]) < 1e-5


@pytest.mark.parametrize(
    ("first", "second"),
    [(Lora(rank=4), Lift(density=0.1, reselect_every=1)), (Hft(), Hft()), (RING[2], RING[2])],
    ids=["lora-lift", "hft-hft", "spiel-spiel"],
)
def test_killed_in_its_second_stage_it_ends_where_an_uninterrupted_one_does(first, second, tmp_path):
    pipeline = two(first, second, max_steps=6)
    whole = carried_out(pipeline)["b"].update
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        carried_out(pipeline, folder=tmp_path, stop=lambda: next(asked) >= 8)
    again = carried_out(pipeline, folder=tmp_path)["b"].update
    assert again.digest() == whole.digest()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (({"name": "a"}, {"name": "a"}), "two stages are called a"),
        (({"name": "a", "start": "b"}, {"name": "b"}), "start of a names 'b', which is no earlier stage"),
        (({"name": "a", "carry": "x"},), "carry of a names 'x'"),
        (({"name": "base"},), "a stage is called base"),
        (({"name": "A B"},), "name"),
        ((), "stages"),
    ],
)
def test_bad_stages_are_named(items, words):
    with pytest.raises(ValueError, match=words):
        stages(*items)


def test_only_where_something_lies_in_the_weights_is_another_tuner_refused_on_a_quantised_base():
    found = {
        name: [p.key for p in pipeline.check(Facts(quantized=True))]
        for name, pipeline in {
            "same": two(Lora(rank=4), Lora(rank=4)),
            "other": two(Lora(rank=4), Lora(rank=2)),
            "heads": two(Lora(rank=4), Frozen()),
            "after heads": two(Frozen(), Lora(rank=4)),
            "through heads": stages(
                {"name": "a", "tuner": Lora(rank=4)},
                {"name": "b", "start": "a", "tuner": Frozen()},
                {"name": "c", "start": "b", "tuner": Lora(rank=2)},
            ),
        }.items()
    }
    assert found == {
        "same": [], "other": ["stages.1.start"], "heads": [], "after heads": [], "through heads": ["stages.2.start"],
    }  # fmt: skip


def test_what_is_carried_must_be_there_and_the_last_stage_must_change_the_model():
    heads = {"name": "a", "tuner": Frozen(), "objective": Caft(stage="heads")}
    tune = {"name": "b", "tuner": Lora(rank=4), "objective": Caft(stage="tune"), "carry": "a"}
    plain = {"name": "a", "tuner": Lora(rank=4)}

    def problems(*items, **facts):
        return [p.key for p in stages(*items).check(Facts(**facts))]

    assert problems(plain, tune) == ["stages.1.carry"] and problems(heads, tune) == []
    anatomy = view_of().anatomy
    assert problems(heads, anatomy=anatomy) == ["stages.0.tuner"] and problems(heads, tune, anatomy=anatomy) == []
    assert problems(plain, {**heads, "name": "b"}, anatomy=anatomy) == ["stages.1.tuner"]
    assert problems(plain, {**heads, "name": "b", "start": "a"}, anatomy=anatomy) == []
    assert problems(heads) == [], "before the model is known, it may have a head that every tuner trains"
