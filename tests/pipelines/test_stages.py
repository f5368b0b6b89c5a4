"""Stages from the recipe: in order, handing on, taken up where they ended."""

import pytest
import torch

from luthier.objectives.sft import Sft
from luthier.pipelines import Stages
from luthier.pipelines.base import run_pipeline
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Full, Lora

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


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (({"name": "a"}, {"name": "a"}), "two stages are called a"),
        (({"name": "a", "start": "b"}, {"name": "b"}), "start of a names 'b', which is no earlier stage"),
        (({"name": "a", "carry": "x"},), "carry of a names 'x'"),
        (({"name": "a"}, {"name": "b", "start": "a", "tuner": Full()}), "with another tuner; its update would lack"),
        (({"name": "A B"},), "name"),
        ((), "stages"),
    ],
)
def test_bad_stages_are_named(items, words):
    with pytest.raises(ValueError, match=words):
        stages(*items)
