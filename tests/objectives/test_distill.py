"""Soft labels: the divergence by hand, equal weights first, helpful rows later (study checks: tests/pipelines)."""

import pytest
import torch

from helpers.cloze import cloze, with_soft
from luthier.data.batch import collate
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.distill import Distill, helpful_weights, soft_loss
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of


def test_the_divergence_by_hand():
    soft = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    q = logits.softmax(-1)
    first = 0.25 * (0.25 / q[0, 0]).log() + 0.75 * (0.75 / q[0, 1]).log()
    torch.testing.assert_close(soft_loss(logits, soft), torch.stack([first, -q[1, 0].log()]))
    assert float(soft_loss(soft.log(), soft)[0]) == pytest.approx(0.0, abs=1e-6)


def test_weights_are_positive_parts_that_sum_to_one_or_nothing():
    assert helpful_weights(torch.tensor([3.0, -5.0, 1.0])).tolist() == [0.75, 0.0, 0.25]
    assert helpful_weights(torch.tensor([-1.0, 0.0])).tolist() == [0.0, 0.0]


def test_the_warm_up_ends_strictly_after_its_share():
    d = Distill(warmup_share=0.6)
    assert [d.reweights(s, 10) for s in (5, 6, 7)] == [False, False, True]
    assert not Distill(reweight=False).reweights(9, 10)


def test_in_the_warm_up_rows_weigh_the_same_and_confidence_can_silence_them():
    view, rows = view_of(), with_soft(cloze(4, 0))
    window = Window([collate(rows)], Clock(0, 10), Lab({"labelled": cloze(6, 5)}))
    for limit in (0.0, 0.99):
        planned, counts = Distill(min_confidence=limit).plan(window, Probe(view, Distill()))
        confident = sum(float(max(r["row"]["soft"])) > limit for r in rows)
        assert planned.micro[0].row["weight"].sum() == confident == counts["weight"]
        term = Distill().loss(Forward(planned.micro[0], view))["loss"]
        assert term.over == "weight"


def test_rows_without_soft_labels_are_refused():
    view = view_of()
    with pytest.raises(LuthierError, match="a row has no soft label"):
        Distill().plan(Window([collate(cloze(2, 0))], Clock(0, 2)), Probe(view, Distill()))
