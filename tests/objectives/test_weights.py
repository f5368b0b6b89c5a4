"""Weights of rows: 1 changes no bit, 2 is the row twice, 0 is the row left out; in every objective."""

import pytest
import torch

from luthier.objectives.caft import Caft
from luthier.objectives.distill import Distill
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.otr import Otr
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.adapter import Adapter

OBJECTIVES = [
    Sft(),
    Caft(allow_untrained_heads=True, weight=0.5, schedule="constant"),
    MaskedThought(max_rate=0.5, random_share=0.5, warmup_share=0.01),
    Otr(),
    Otr(reduction="token_mean"),
    Otr(draws=8),
    QTuning(keep_rows=1.0, keep_tokens=1.0),
]
NAMES = [f"{o.key()}-{i}" for i, o in enumerate(OBJECTIVES)]


def rows():
    return rows_of((14, 12, 9, 11), answer=5)


def weighing(items, weights):
    return [{**r, "row": {**r.get("row", {}), "weight": w}} for r, w in zip(items, weights, strict=True)]


def run(objective, items, steps=3, **more):
    """Losses and trained numbers after a few steps over all rows."""
    view = view_of()
    settings = TrainSettings(max_steps=steps, batch_size=len(items), learning_rate=1e-2, shuffle=False, **more)
    loop = Loop(view, items, Adapter(rank=2, init_std=0.05).attach(view), objective, settings)
    losses = [loop.step()["loss"] for _ in range(steps)]
    return losses, torch.cat([p.detach().flatten() for p in loop.trainable.parameters()]), loop.progress


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_weight_one_changes_no_bit(objective):
    plain, ones = (run(objective, items) for items in (rows(), weighing(rows(), [1.0] * 4)))
    assert plain[0] == ones[0] and torch.equal(plain[1], ones[1])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_weight_two_is_the_row_twice_and_weight_zero_is_none(objective):
    some = rows()
    whole = weighing(some[:3], [1, 2, 0.5])
    twice = weighing([some[0], some[1], some[1], some[2]], [1, 1, 1, 0.5])
    assert run(objective, whole)[0] == pytest.approx(run(objective, twice)[0], rel=1e-4)
    without = run(objective, weighing(some, [1.0, 1.0, 0.0, 1.0]))[0]
    assert without == pytest.approx(run(objective, [some[0], some[1], some[3]])[0], rel=1e-4)


@pytest.mark.parametrize("objective", [Sft(), Otr()], ids=["sft", "otr"])
def test_weights_do_not_depend_on_how_a_step_is_cut(objective):
    heavy = weighing(rows(), [0.3, 2.0, 1.0, 0.0])
    assert run(objective, heavy)[0] == pytest.approx(run(objective, heavy, tokens_per_forward=1)[0], abs=1e-5)
    assert run(objective, heavy)[0] != pytest.approx(run(objective, rows())[0], rel=1e-4)


def test_the_log_counts_tokens_and_not_weights():
    assert run(Sft(), weighing(rows(), [0.3, 2.0, 1.0, 0.0]))[2].supervised == 3 * 20


def classified(weights=None):
    """Rows of a cloze task: a slot, words for the classes, and soft labels."""
    out = []
    for i, item in enumerate(rows()):
        row = {"slot": torch.tensor(3), "words": torch.tensor([7, 8, 9]), "label": i % 3}
        soft = torch.nn.functional.one_hot(torch.tensor(i % 3), 3) * 0.7 + 0.1
        out.append({**item, "labels": [-100] * len(item["ids"]), "row": {**row, "soft": soft}})
    return out if weights is None else weighing(out, weights)


@pytest.mark.parametrize("objective", [Sft(), Distill(reweight=False)], ids=["sft", "distill"])
def test_rows_with_classes_have_weights_too(objective):
    plain, ones = run(objective, classified()), run(objective, classified([1.0] * 4))
    assert plain[0] == ones[0] and torch.equal(plain[1], ones[1])
    some = classified([1.0, 2.0, 1.0, 0.0])
    assert run(objective, some)[0] == pytest.approx(
        run(objective, [some[0], *[{**some[1], "row": {**some[1]["row"], "weight": 1.0}}] * 2, some[2]])[0], rel=1e-4
    )
