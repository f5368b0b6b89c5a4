"""Frozen: nothing of the model moves, what an objective adds beside it does."""

import pytest
import torch

from luthier.compute.lemo import Lemo
from luthier.method import Facts
from luthier.objectives.caft import Caft
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Frozen

SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2)


def test_only_the_heads_train():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    loop = Loop(view, rows_of(), Frozen().attach(view), Caft(stage="heads", ahead=2), SETTINGS)
    heads = [p.detach().clone() for p in loop.extra.parameters()]
    losses = [loop.step()["loss"] for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in view.module.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(heads, loop.extra.parameters(), strict=True))
    assert loop.trainable.update().parts == ()


def test_a_run_in_which_nothing_trains_is_refused():
    view = view_of()
    with pytest.raises(LuthierError, match="nothing trains: sft adds no trained modules to the frozen model"):
        Loop(view, rows_of(), Frozen().attach(view), Sft(), SETTINGS)


def test_a_recipe_in_which_nothing_trains_is_refused_before_it_starts():
    frozen, lm, head = Frozen(), view_of().anatomy, view_of("llama-classifier").anatomy
    cases = (
        (lm, (frozen, Sft(), Lemo()), ["nothing trains: sft and lemo add no trained modules to the frozen model"]),
        (lm, (frozen,), ["nothing trains: no other method adds no trained modules to the frozen model"]),
        (lm, (frozen, Caft(stage="heads"), Lemo()), []),
        (lm, (), []),  # asked alone
        (head, (frozen, Sft()), []),  # every tuner trains a task head
        (None, (frozen, Sft()), []),
    )
    for anatomy, others, wanted in cases:
        problems = frozen.check(Facts(anatomy=anatomy, others=others))
        assert [p.what for p in problems] == wanted
        assert {p.remedy for p in problems} <= {"choose another tuner"}
