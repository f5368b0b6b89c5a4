"""Soft labels: the divergence by hand, equal weights first, helpful rows later (study checks: tests/pipelines)."""

import pytest
import torch
import torch.nn.functional as F

from helpers.cloze import cloze, with_soft
from luthier.data.batch import collate
from luthier.method import Facts
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.distill import Distill, helpful_weights, soft_loss
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.training.loop import Loop
from luthier.tuners.adapter import Adapter


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


@pytest.mark.parametrize(("rows", "helpful"), [(0, 0.0), (1, 1.0), (2, 1.0)])
def test_the_share_that_helps_is_of_the_rows_that_this_process_has(rows, helpful):
    view, objective = view_of(), Distill()
    micro = [collate(with_soft(cloze(rows, 0)))] if rows else []
    _, counts = objective.plan(Window(micro, Clock(0, 10)), Probe(view, objective))
    assert counts == {"weight": rows} and objective.report() == {"distill/helpful": helpful}


def test_rows_without_soft_labels_are_refused():
    view = view_of()
    with pytest.raises(LuthierError, match="a row has no soft label"):
        Distill().plan(Window([collate(cloze(2, 0))], Clock(0, 2)), Probe(view, Distill()))
    with pytest.raises(LuthierError, match="a row has no soft label"):
        Distill().plan(
            Window([collate(with_soft(cloze(2, 0))), collate(cloze(2, 1))], Clock(0, 2)), Probe(view, Distill())
        )


def look_ahead(limit=10_000, meta_rows=32):
    """A loop past its warm-up, over rows of which some help on the labelled ones and some do not."""
    view, rows = view_of(), with_soft(cloze(6, 2))
    trainable = Adapter(rank=4, init_std=0.1).attach(view)
    settings = TrainSettings(max_steps=10, batch_size=6, tokens_per_forward=limit, shuffle=False)
    objective = Distill(warmup_share=0.0, meta_rows=meta_rows)
    loop = Loop(view, rows, trainable, objective, settings, lab=Lab({"labelled": cloze(7, 2)}))
    loop.progress.step = 5
    return loop, rows


def helpfulness_by_hand(loop, rows, labelled):
    """[S] <gradient of the labelled loss, gradient of a row's own>, one row at a time."""
    names = [n for n, p in loop.view.module.named_parameters() if p.requires_grad]
    params = [loop.view.module.get_parameter(n) for n in names]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    def logits(row):
        return Forward(collate([row]), loop.view).logits()[0]

    meta = torch.stack([F.cross_entropy(logits(r), r["row"]["label"]) for r in labelled]).mean()
    g = gradient(meta)
    return torch.stack([g @ gradient(soft_loss(logits(r)[None], r["row"]["soft"][None])[0]) for r in rows])


@pytest.mark.parametrize("limit", [10_000, 1], ids=["one micro-batch", "six"])
@pytest.mark.parametrize("meta_rows", [32, 2])
def test_after_the_warm_up_rows_weigh_what_they_help(limit, meta_rows):
    loop, rows = look_ahead(limit, meta_rows)
    u = helpfulness_by_hand(loop, rows, cloze(7, 2)[:meta_rows])
    assert (u > 0).any() and (u < 0).any()
    wanted = u.clamp_min(0) / u.clamp_min(0).sum()
    planned, counts = loop.objective.plan(loop.window(5), loop.probe)
    found = torch.cat([b.row["weight"] for b in planned.micro])
    order = [int(key) for b in planned.micro for key in b.keys]
    torch.testing.assert_close(found, wanted[order], atol=1e-5, rtol=1e-4)
    assert counts == {"weight": pytest.approx(1.0)}
    assert loop.objective.report() == {"distill/helpful": pytest.approx(float((u > 0).float().mean()))}
    each = torch.stack([soft_loss(Forward(collate([r]), loop.view).logits(), r["row"]["soft"][None])[0] for r in rows])
    assert loop.step()["loss"] == pytest.approx(float((wanted * each).sum()), rel=1e-4)


def test_weights_do_not_shrink_with_the_gradients():
    """The official code adds 1e-6 to their sum, which silences rows that help by less."""
    tiny = torch.tensor([3e-12, -1e-12, 1e-12])
    assert helpful_weights(tiny).tolist() == pytest.approx([0.75, 0.0, 0.25])


def test_weights_are_scaled_over_all_ranks():
    assert helpful_weights(torch.tensor([3.0, -1.0]), lambda x: 4 * x).tolist() == [0.25, 0.0]


def test_in_the_warm_up_the_loss_is_the_plain_mean_over_confident_rows():
    view, rows = view_of(), with_soft(cloze(5, 0))
    limit = sorted(float(r["row"]["soft"].max()) for r in rows)[1]  # not above itself: two rows are silent
    settings = TrainSettings(max_steps=2, batch_size=5, tokens_per_forward=1)
    loop = Loop(view, rows, Adapter(rank=2).attach(view), Distill(min_confidence=limit), settings)
    each = [float(soft_loss(Forward(collate([r]), view).logits(), r["row"]["soft"][None])) for r in rows]
    loud = [x for x, r in zip(each, rows, strict=True) if float(r["row"]["soft"].max()) > limit]
    assert len(loud) == 3 and loop.step()["loss"] == pytest.approx(sum(loud) / 3, rel=1e-4)


def test_rows_without_soft_labels_are_refused_where_it_is_known_what_reaches_the_objective():
    known = [
        Distill().check(Facts(task="classification", kept=k)) for k in (frozenset({"soft"}), frozenset({"note"}), None)
    ]
    assert [[p.what for p in problems] for problems in known] == [[], ["the rows have no soft labels"], []]
