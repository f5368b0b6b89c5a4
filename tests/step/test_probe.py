"""A probe asks what the step itself will do: the same rows and tokens, the same loss and gradient, and leaves no trace."""

import random

import numpy as np
import pytest
import torch

from helpers.cloze import cloze, with_soft
from luthier.objectives.base import Clock
from luthier.objectives.caft import Caft
from luthier.objectives.distill import Distill
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.otr import Otr
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.rng import generator_states
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.green_trainer import GreenTrainer

SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2, max_grad_norm=1e9, tokens_per_forward=20)
OBJECTIVES = {
    "sft": Sft(),
    "otr": Otr(draws=8),
    "caft": Caft(allow_untrained_heads=True, weight=0.5),
    "q-tuning": QTuning(keep_rows=0.5),
    "masked-thought": MaskedThought(max_rate=0.5, random_share=0.5),
    "distill": Distill(warmup_share=0.0),
}


def loop_of(name, tuner):
    view = view_of()
    rows = with_soft(cloze(4, 0)) if name == "distill" else rows_of()
    trainable = tuner.attach(view, total_steps=3)
    return Loop(view, rows, trainable, OBJECTIVES[name], SETTINGS, lab=Lab({"labelled": cloze(6, 8)}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_step(name):
    loop = loop_of(name, Full())
    loop.step()
    state, names = dict(loop.objective.state_dict()), list(loop.view.anatomy.parameters)
    seen = loop.probe.gradients(loop.window(1), names)
    assert loop.objective.state_dict() == state and all(p.grad is None for p in loop.view.module.parameters())
    found = {}

    def note(stats):
        found.update({n: loop.view.weight(n).grad.clone() for n in names})
        return True

    loop.trainable.before_step = note
    assert loop.step()["loss"] == pytest.approx(seen.loss, rel=1e-5)
    for n in names:
        torch.testing.assert_close(seen.grads[n], found[n], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_tuner_that_tries_a_step_first_trains_with_every_objective(name):
    loop = loop_of(name, GreenTrainer(flops_share=0.7))
    start = {n: p.detach().clone() for n, p in loop.view.module.named_parameters()}
    loop.step()
    assert any(not torch.equal(start[n], p) for n, p in loop.view.module.named_parameters())


def test_no_generator_is_left_elsewhere():
    loop = loop_of("sft", Full())
    before = generator_states()
    with loop.probe.quiet():
        random.random(), np.random.rand(), torch.rand(1)
    after = generator_states()
    assert before["python"] == after["python"] and torch.equal(before["cpu"], after["cpu"])
    assert torch.equal(before["numpy"]["key"], after["numpy"]["key"])
    assert before["numpy"]["pos"] == after["numpy"]["pos"]


def test_a_window_is_planned_by_its_own_clock():
    """Masked thought hides nothing in the first step, and CAFT's weight falls from step to step."""
    loop = loop_of("caft", Full())
    first, last = (loop.probe.planned(loop.window(step)) for step in (0, 2))
    assert [float(p.batches[0].row["caft"][0]) for p in (first, last)] == pytest.approx([0.5, 0.25])
    assert loop.window(2).clock == Clock(2, 3, 2.0)
