"""The exact checks of the sheet; numbers in names are the sheet's."""

import itertools
import math

import numpy as np
import pytest
import torch

from luthier.data.batch import IGNORE, collate
from luthier.data.quadrants import choose_rows, kept_share
from luthier.method import Facts
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.q_tuning import QTuning, keep_tokens, neighbour_score
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora


def test_1_scores_equal_a_plain_softmax_loop(view, batch):
    scores = Forward(batch, view).scores()
    hidden = view.trace(batch).hidden[-1]
    for n, t in enumerate(batch.supervised.tolist()):
        logits = (hidden[t] @ view.head_weight.T).double()
        p = logits.softmax(-1)
        assert float(scores.nll[n]) == pytest.approx(float(-p[batch.labels[t]].log()), abs=1e-5)
        assert float(scores.entropy[n]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


def test_1_uniform_logits_give_log_v():
    from luthier.kernels.head import token_scores

    s = token_scores(torch.zeros(3, 4), torch.randn(11, 4), torch.tensor([0, 5, 10]))
    assert s.entropy.tolist() == pytest.approx([math.log(11)] * 3)
    assert s.nll.exp().tolist() == pytest.approx([11.0] * 3, rel=1e-5)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_2_keeping_everything_is_plain_sft_to_the_bit(layout):
    weights = []
    for objective in (Sft(), QTuning(keep_rows=1.0, keep_tokens=1.0)):
        view = view_of()
        view.layout = layout
        loop = Loop(view, rows_of(), Full().attach(view), objective, TrainSettings(max_steps=3, batch_size=4))
        losses = [loop.step()["loss"] for _ in range(3)]
        weights.append((losses, {n: p.detach().clone() for n, p in view.module.named_parameters()}))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(weights[0][1][n], weights[1][1][n]) for n in weights[0][1])


def test_3_exact_count_for_any_values_and_monotone_share():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        b = int(generator.integers(1, 20))
        ppl, ent = generator.exponential(size=b), generator.random(b)
        if generator.random() < 0.3:
            ppl, ent = np.round(ppl), np.round(ent)  # ties
        if generator.random() < 0.1:
            ppl = np.ones(b)
        share = float(generator.uniform(0.05, 1.0))
        rows = choose_rows(ppl, ent, share, 10)
        assert len(rows.keep) == max(1, int(share * b)) == len(set(rows.keep.tolist()))
        shares = [kept_share(ppl, ent, a) for a in np.linspace(0, 0.49, 50)]
        assert all(x <= y for x, y in itertools.pairwise(shares))


def planned(batch, objective, view):
    window = Window([batch], Clock(0, 10))
    return objective.plan(window, Probe(view, objective))[0].micro[0]


def test_4_pruned_rows_keep_exactly_their_share_and_gradients_match_a_hand_made_batch():
    view, batch = view_of(), batch_of((14, 12, 13, 15, 11, 16, 12, 13), answer=7)
    objective = QTuning(keep_rows=0.5, keep_tokens=0.7)
    kept = planned(batch, objective, view)
    assert kept.num_sequences == 4
    counts = torch.bincount(kept.seq[kept.supervised], minlength=4).tolist()
    assert set(counts) <= {7, max(1, int(0.7 * 7))} and 4 in counts
    original = {key: i for i, key in enumerate(batch.keys)}
    rows = []
    for i, key in enumerate(kept.keys):
        source = batch.seq == original[key]
        mine = kept.seq == i
        assert torch.equal(batch.ids[source], kept.ids[mine])
        assert bool(((kept.labels[mine] == IGNORE) | (kept.labels[mine] == batch.labels[source])).all())
        labels = [IGNORE, *kept.labels[mine][:-1].tolist()]
        rows.append({"ids": kept.ids[mine].tolist(), "labels": labels})
    trainable = Lora(rank=2).attach(view)
    with torch.no_grad():
        for p in trainable.b.values():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    grads = []
    for b in (kept, collate(rows)):
        Sft().loss(Forward(b, view))["loss"].sums.backward()
        grads.append([p.grad.clone() for p in trainable.parameters()])
        for p in trainable.parameters():
            p.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_4_dropped_tokens_leave_the_input_and_keep_the_others_positions():
    batch = batch_of((8,), answer=5)
    keep = torch.ones_like(batch.labels, dtype=torch.bool)
    keep[4] = False  # prunes the token at position 5
    out = batch.select(torch.tensor([0]), keep, drop=True)
    assert out.pos.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert out.ids.tolist() == batch.ids[[0, 1, 2, 3, 4, 6, 7]].tolist()
    assert out.labels[4] == batch.ids[6] and out.labels[3] == batch.ids[4]


def test_5_neighbour_scores():
    turn = torch.zeros(6, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, generator=generator)
    assert neighbour_score(x, turn, 0.0).argsort().tolist() == x.argsort().tolist()
    lam = 0.5
    other = 2 * lam / (1 + lam)
    before, after = torch.cat([x[:1], x[:-1]]), torch.cat([x[1:], x[-1:]])
    averaged = (1 - other) * x + other * (before + after) / 2
    assert neighbour_score(x, turn, lam).argsort().tolist() == averaged.argsort().tolist()
    spike = torch.zeros(7)
    spike[3] = 1.0
    run = torch.zeros(7)
    run[2:5] = 1.0
    turn = torch.zeros(7, dtype=torch.long)
    assert float(neighbour_score(spike, turn, 0.5)[3]) == pytest.approx(0.5)
    assert float(neighbour_score(run, turn, 0.5)[3]) == pytest.approx(1.5)


def test_neighbours_do_not_cross_turns():
    x = torch.tensor([1.0, 9.0, 5.0])
    alone = neighbour_score(x[:2], torch.tensor([0, 0]), 0.5)
    assert neighbour_score(x, torch.tensor([0, 0, 1]), 0.5)[:2].tolist() == alone.tolist()


def test_6_the_smallest_scores_stay():
    assert keep_tokens(torch.tensor([5.0, 1.0, 3.0, 2.0]), 0.5).tolist() == [False, True, False, True]
    assert int(keep_tokens(torch.rand(10), 0.01).sum()) == 1


def test_rows_are_chosen_from_the_whole_window_whatever_its_micro_batches():
    rows = rows_of((14, 12, 13, 15, 11, 16, 12, 13), answer=7)
    losses = []
    for limit in (1000, 30, 1):
        view = view_of()
        loop = Loop(
            view,
            rows,
            Lora(rank=2).attach(view),
            QTuning(keep_rows=0.5),
            TrainSettings(max_steps=4, batch_size=8, tokens_per_forward=limit),
        )
        losses.append([loop.step()["loss"] for _ in range(4)])
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, abs=1e-5)


def test_bad_input():
    for fields in (
        {"keep_rows": 0.0},
        {"keep_tokens": 1.5},
        {"neighbour_weight": -0.1},
        {"bisection_steps": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            QTuning(**fields)
    assert QTuning().check(Facts(batch_size=1))[0].key == "keep_rows"


def test_a_loss_that_is_not_finite_names_its_row():
    view, batch = view_of(), batch_of()
    with torch.no_grad():
        view.weight("lm_head.weight").fill_(float("nan"))
    with pytest.raises(Exception, match="not finite: 0"):
        planned(batch, QTuning(), view)
