"""Stages from the recipe: in order, handing on, taken up where they ended."""

from contextlib import ExitStack

import pytest
import torch

from luthier.objectives.sft import Sft
from luthier.pipelines import Stages
from luthier.pipelines.base import run_pipeline
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Full, Lora, Peft, Spiel
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


def test_finished_stages_are_taken_up_and_not_trained_again(tmp_path):
    items = ({"name": "a", "tuner": Full()}, {"name": "b", "start": "a", "tuner": Full()})
    first, again = [], []
    for seen in (first, again):
        lab = Lab({"train": rows_of()})
        done = run_pipeline(
            stages(*items), view_of(), lab, tmp_path, on_step=lambda e, p, t, seen=seen: seen.append(e["step"])
        )
        seen.append(done["b"].update.parts[0].changes)
    assert first[:-1] == [1, 2, 3, 1, 2, 3] and again[:-1] == []
    assert all(torch.equal(first[-1][n], again[-1][n]) for n in first[-1])


TUNERS = {
    "lora": Lora(rank=4),
    "full": Full(),
    "spiel": Spiel(density=0.05),
    "dora": Peft(options={"r": 2, "use_dora": True}),
}


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
        with outcome.update.bind(view):
            torch.testing.assert_close(view.trace(batch_of()).hidden[-1], seen[i], atol=1e-5, rtol=1e-5)
    save_update(outcome.update, tmp_path, view)
    with ExitStack() as live:
        live.enter_context(outcome.update.bind(view))
        assert verify_update(tmp_path, live.close, view, rows_of()[0]) < 1e-5


def test_a_killed_pipeline_of_two_tuners_ends_with_the_same_update(tmp_path):
    items = ({"name": "a", "tuner": Lora(rank=4)}, {"name": "b", "start": "a", "tuner": Full()})
    first = run_pipeline(stages(*items), view_of(), Lab({"train": rows_of()}), tmp_path)
    again = run_pipeline(stages(*items), view_of(), Lab({"train": rows_of()}), tmp_path)
    assert first["b"].update.digest() == again["b"].update.digest() != first["a"].update.digest()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (({"name": "a"}, {"name": "a"}), "two stages are called a"),
        (({"name": "a", "start": "b"}, {"name": "b"}), "start of a names 'b', which is no earlier stage"),
        (({"name": "a", "carry": "x"},), "carry of a names 'x'"),
        (({"name": "A B"},), "name"),
        ((), "stages"),
    ],
)
def test_bad_stages_are_named(items, words):
    with pytest.raises(ValueError, match=words):
        stages(*items)
