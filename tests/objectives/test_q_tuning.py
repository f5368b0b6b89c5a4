"""The exact checks of the sheet; numbers in names are the sheet's."""

import itertools
import math

import numpy as np
import pytest
import torch

from luthier.data.batch import IGNORE, collate
from luthier.data.quadrants import Rows, _scaled, choose_rows, kept_share, named
from luthier.kernels.head import token_scores
from luthier.method import Facts
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.q_tuning import QTuning, _bad_rows, keep_tokens, neighbour_score
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora


def test_1_uniform_logits_give_log_v():
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
    for _ in range(100):
        b = int(generator.integers(1, 20))
        ppl, ent = generator.exponential(size=b), generator.random(b)
        if generator.random() < 0.3:
            ppl, ent = np.round(ppl), np.round(ent)  # ties
        if generator.random() < 0.1:
            ppl = np.ones(b)
        share = float(generator.uniform(0.05, 1.0))
        rows = choose_rows(ppl, ent, share, 10)
        assert len(rows.keep) == max(1, int(share * b)) == len(set(rows.keep.tolist()))
        shares = [kept_share(ppl, ent, a) for a in np.linspace(0, 0.49, 15)]
        assert all(x <= y for x, y in itertools.pairwise(shares))


def slow_choice(ppl, entropy, share, steps):
    """The sheet's algorithm in loops: (kept rows, those of them whose tokens are pruned, topped-up rows, alpha)."""
    rows = range(len(ppl))

    def quantile(values, g):  # the smallest value with at least a share g at or below it
        return next(q for q in sorted(values) if sum(v <= q for v in values) >= g * len(values) - 1e-9)

    def corners(alpha):
        p_lo, p_hi, e_lo, e_hi = (quantile(v, g) for v in (ppl, entropy) for g in (alpha, 1 - alpha))
        second = {i for i in rows if ppl[i] >= p_hi and entropy[i] <= e_lo}
        return second, {i for i in rows if ppl[i] <= p_lo and entropy[i] >= e_hi} - second

    lo, hi, alpha = 0.0, 0.49, 0.49
    for _ in range(steps):
        middle = (lo + hi) / 2
        second, fourth = corners(middle)
        if len(second | fourth) < share * len(ppl):
            lo = middle
        else:
            hi = alpha = middle
    second, fourth = corners(alpha)
    scale = lambda v: [(x - min(v)) / ((max(v) - min(v)) or 1.0) for x in v]  # noqa: E731
    p, e = scale(ppl), scale(entropy)
    inside = lambda i: i in second or i in fourth  # noqa: E731
    best = sorted(rows, key=lambda i: (not inside(i), -abs(p[i] - e[i]), -ppl[i], i))
    kept = sorted(best[: max(1, int(share * len(ppl)))])
    pruned = [i for i in kept if i in second or (not inside(i) and p[i] >= e[i])]
    return kept, pruned, [i for i in kept if not inside(i)], alpha


def test_3_the_choice_is_the_algorithm_written_out():
    generator, seen = np.random.default_rng(1), {"pruned": 0, "whole": 0, "topped": 0}
    for trial in range(100):
        b = int(generator.integers(2, 24))
        ppl, entropy = generator.exponential(size=b), generator.random(b)
        if trial % 4 == 0:  # ties
            ppl, entropy = np.round(ppl, 1), np.round(entropy, 1)
        share = float(generator.choice([0.125, 0.25, 0.5, 0.9]))
        rows = choose_rows(ppl, entropy, share, 10)
        kept, pruned, topped, alpha = slow_choice(ppl.tolist(), entropy.tolist(), share, 10)
        assert rows.keep.tolist() == kept and rows.alpha == alpha
        assert rows.keep[rows.prune_tokens].tolist() == pruned and rows.keep[rows.topped_up].tolist() == topped
        seen = {
            "pruned": seen["pruned"] + len(set(pruned) - set(topped)), "topped": seen["topped"] + len(topped),
            "whole": seen["whole"] + len(set(kept) - set(pruned)),
        }  # fmt: skip
    assert min(seen.values()) > 50, "the draws reach every kind of row"


def test_3_corners_come_first_then_the_largest_gaps_by_hand():
    ppl, entropy = np.array([9.0, 1.0, 9.0, 1.0, 6.0, 4.0]), np.array([1.0, 9.0, 9.0, 1.0, 4.0, 7.0])
    two = choose_rows(ppl, entropy, 0.34, 10)
    assert two.keep.tolist() == [0, 1] and two.prune_tokens.tolist() == [True, False] and not two.topped_up.any()
    # Sure where it is right and unsure where it is wrong: no row is in a corner. Scaled, row 1 lies 1/6 below, row 2
    # 1/15 above, the others on the diagonal.
    level = choose_rows(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.5, 1.8, 3.0]), 0.5, 10)
    assert level.keep.tolist() == [1, 2] and level.topped_up.all() and level.alpha == 0.49
    assert level.prune_tokens.tolist() == [False, True], "2 is more surprising than unsure, 1 is not"


def test_3_rows_that_are_all_alike_count_as_misconceptions():
    rows = choose_rows(np.ones(4), np.ones(4), 0.5, 10)
    assert rows.prune_tokens.all() and not rows.topped_up.any() and len(rows.keep) == 2
    assert named(np.ones(4), np.ones(4), 0.2) == ["Q2 misconception"] * 4


def test_ties_go_to_the_more_surprising_row_wherever_it_stands():
    ppl, entropy = np.array([1.0, 5.0]), np.array([5.0, 1.0])
    for order in ([0, 1], [1, 0]):
        rows = choose_rows(ppl[order], entropy[order], 0.5, 10)
        assert ppl[order][rows.keep].tolist() == [5.0] and rows.prune_tokens.tolist() == [True]


def planned(batch, objective, view):
    window = Window([batch], Clock(0, 10))
    return objective.plan(window, Probe(view, objective))[0].micro[0]


def row_values(view, row):
    """(perplexity, mean entropy, [n] loss of each answer token) by a plain softmax."""
    z = view.module(torch.tensor([row["ids"]])).logits[0].double()
    at = [t for t, y in enumerate(row["labels"]) if y != IGNORE]
    log_p = z.log_softmax(-1)[[t - 1 for t in at]]
    nll = -log_p.gather(1, torch.tensor([row["ids"][t] for t in at])[:, None]).squeeze(1)
    return float(nll.mean().exp()), float(-(log_p.exp() * log_p).sum(-1).mean()), nll


def kept_by_hand(view, rows, keep_rows, keep_fraction, weight, log_domain=False):
    """key -> unshifted labels of the rows that stay."""
    values = [row_values(view, r) for r in rows]
    kept, pruned, _, _ = slow_choice([v[0] for v in values], [v[1] for v in values], keep_rows, 10)
    out = {}
    for i in kept:
        ppl, labels = (values[i][2] if log_domain else values[i][2].exp()).tolist(), list(rows[i]["labels"])
        at = [t for t, y in enumerate(labels) if y != IGNORE]
        score = [
            (1 - weight) * ppl[j] + weight * (ppl[max(j - 1, 0)] + ppl[min(j + 1, len(ppl) - 1)]) for j in range(len(ppl))
        ]  # fmt: skip
        stay = sorted(range(len(ppl)), key=lambda j: (score[j], j))[: max(1, int(keep_fraction * len(ppl)))]
        gone = [at[j] for j in range(len(ppl)) if j not in stay] if i in pruned else []
        out[rows[i]["key"]] = ([IGNORE if t in gone else y for t, y in enumerate(labels)], i in pruned)
    return out


def uneven():
    """Answers of different lengths: a mean is no sum."""
    lengths = ((14, 7), (12, 3), (13, 9), (15, 2), (11, 5), (16, 12), (12, 4), (13, 6))
    return [{**rows_of((n,), seed=i, answer=k)[0], "key": str(i)} for i, (n, k) in enumerate(lengths)]


def opinionated(by=40.0):
    """A model that is surer of itself than random weights are: perplexities differ by orders of magnitude."""
    view = view_of()
    with torch.no_grad():
        view.weight("lm_head.weight").mul_(by)
    return view


@pytest.mark.parametrize(("weight", "log_domain"), [(0.0, False), (0.5, False), (0.5, True)])
def test_4_every_row_and_token_that_stays_is_the_one_chosen_by_hand(weight, log_domain):
    view, rows = opinionated(), uneven()
    wanted = kept_by_hand(view, rows, 0.5, 0.7, weight, log_domain)
    assert wanted != kept_by_hand(view, rows, 0.5, 0.7, 0.5 - weight, log_domain), "the weight matters here"
    assert weight == 0 or wanted != kept_by_hand(view, rows, 0.5, 0.7, weight, not log_domain), "and the domain"
    objective = QTuning(keep_rows=0.5, keep_tokens=0.7, neighbour_weight=weight, log_domain=log_domain)
    kept = planned(collate(rows), objective, view)
    assert list(kept.keys) == list(wanted)
    assert {pruned for _, pruned in wanted.values()} == {True, False}, "both kinds of row are among them"
    for i, (key, (labels, pruned)) in enumerate(wanted.items()):
        found, whole = kept.labels[kept.seq == i].tolist(), [*rows[int(key)]["labels"][1:], IGNORE]
        assert found == [*labels[1:], IGNORE]
        n = sum(y != IGNORE for y in whole)
        assert sum(y != IGNORE for y in found) == (max(1, int(0.7 * n)) if pruned else n)
        assert pruned or found == whole, "rows of the fourth quadrant are unchanged"


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_3_the_report_is_of_the_search_as_it_was_asked(steps):
    view, rows, objective = view_of(), uneven(), QTuning(keep_rows=0.25, bisection_steps=steps)
    kept = planned(collate(rows), objective, view)
    values = [row_values(view, r) for r in rows]
    choice = lambda n: slow_choice([v[0] for v in values], [v[1] for v in values], 0.25, n)  # noqa: E731
    chosen, _, topped, alpha = choice(steps)
    assert len({choice(n)[3] for n in (1, 2, 10)}) == 3, "each goes further"
    before, after = sum(y != IGNORE for r in rows for y in r["labels"]), int((kept.labels != IGNORE).sum())
    assert objective.report() == {
        "q_tuning/alpha": alpha,
        "q_tuning/topped_up": len(topped) / len(chosen),
        "q_tuning/kept_tokens": after / before,
    }


def test_losses_beyond_what_exp_can_hold_count_as_the_largest():
    view, rows = opinionated(1e4), uneven()
    assert max(float(row_values(view, r)[2].mean()) for r in rows) > 200
    kept = planned(collate(rows), QTuning(keep_rows=0.5), view)
    assert kept.num_sequences == 4
    (values,) = (
        QTuning()._row_values(b, s.nll, s.entropy) for b in [collate(rows)] for s in [Forward(b, view).scores()]
    )
    assert values[:, 0].tolist() == pytest.approx(
        [math.exp(min(80.0, float(row_values(view, r)[2].mean()))) for r in rows], rel=1e-2
    )
    ten = QTuning()._row_values(collate(rows[:1]), torch.full((7,), 10.0), torch.zeros(7))
    assert float(ten[0, 0]) == pytest.approx(math.exp(10), rel=1e-5)
    assert QTuning()._token_scores(torch.tensor([500.0, 10.0]), torch.tensor([3, 4])).isfinite().all()


@pytest.mark.parametrize("pruned", ["mask", "drop"])
def test_dropped_tokens_leave_the_input_as_well(pruned):
    view, rows = view_of(), uneven()
    kept = planned(collate(rows), QTuning(keep_rows=0.5, keep_tokens=0.5, pruned=pruned), view)
    wanted = kept_by_hand(view, rows, 0.5, 0.5, 0.5)
    gone = {
        k: sum(y != IGNORE for y in rows[int(k)]["labels"]) - sum(y != IGNORE for y in v)
        for k, (v, _) in wanted.items()
    }
    lengths = [len(rows[int(k)]["ids"]) - (gone[k] if pruned == "drop" else 0) for k in kept.keys]
    assert sum(gone.values()) > 0 and list(kept.lengths) == lengths


def test_rows_without_a_target_are_left_out_and_the_others_chosen_as_if_they_were_not_there():
    view, rows = view_of(), uneven()
    silent = {**rows[0], "labels": [IGNORE] * 14, "key": "silent"}
    kept = planned(collate([silent, *rows]), QTuning(keep_rows=0.5), view)
    assert kept.keys == planned(collate(rows), QTuning(keep_rows=0.5), view).keys and len(kept.keys) == 4
    none = Window([collate([silent])], Clock(0, 10))
    two = Window([collate([silent])], Clock(0, 10), gather=lambda x: torch.cat([x, x]), rank=1)
    assert QTuning().plan(two, Probe(view, QTuning())) == (two, {"tokens": 0.0, "sequences": 0.0})
    assert QTuning().plan(none, Probe(view, QTuning())) == (none, {"tokens": 0.0, "sequences": 0.0})


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_keeps_its_part_of_the_common_choice(rank):
    """Two ranks of five and three rows, the other one's values handed in by gather."""
    view, rows = view_of(), uneven()
    parts = [rows[:5], rows[5:]]
    whole = planned(collate(rows), QTuning(keep_rows=0.5), view)
    found = [planned_values(view, part) for part in parts]

    def gather(x):
        if x.ndim == 1:
            return torch.tensor([5, 3])
        padded = [torch.cat([v, v.new_zeros(len(x) - len(v), 2)]) for v in found]
        torch.testing.assert_close(x, padded[rank])
        return torch.cat(padded)

    objective = QTuning(keep_rows=0.5)
    window = Window([collate(parts[rank])], Clock(0, 10), gather=gather, rank=rank)
    (mine,) = objective.plan(window, Probe(view, objective))[0].micro
    keys = [k for k in whole.keys if k in {r["key"] for r in parts[rank]}]
    assert list(mine.keys) == keys and 0 < len(keys) < 4
    for i, key in enumerate(keys):
        assert torch.equal(mine.labels[mine.seq == i], whole.labels[whole.seq == whole.keys.index(key)])


def planned_values(view, rows):
    batch = collate(rows)
    scores = Forward(batch, view).scores()
    return QTuning()._row_values(batch, scores.nll, scores.entropy)


def test_4_gradients_match_a_hand_made_batch():
    view, rows = view_of(), uneven()
    wanted = kept_by_hand(view, rows, 0.5, 0.7, 0.5)
    kept = planned(collate(rows), QTuning(keep_rows=0.5, keep_tokens=0.7), view)
    by_hand = [{**rows[int(key)], "labels": labels} for key, (labels, _) in wanted.items()]
    trainable = Lora(rank=2).attach(view)
    with torch.no_grad():
        for p in trainable.b.values():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    grads = []
    for b in (kept, collate(by_hand)):
        QTuning().loss(Forward(b, view))["loss"].sums.backward()
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
    assert neighbour_score(x, torch.tensor([0, 1, 1]), 0.5).tolist() == [1.5, 4.5 + 7.0, 2.5 + 7.0]


def test_turns_are_told_apart_by_gaps_between_answer_tokens():
    objective, nll = QTuning(neighbour_weight=0.5, log_domain=True), torch.tensor([1.0, 9.0, 5.0, 2.0, 4.0])
    found = objective._token_scores(nll, torch.tensor([3, 4, 8, 9, 15]))
    assert found.tolist() == neighbour_score(nll, torch.tensor([0, 0, 1, 1, 2]), 0.5).tolist()


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
    assert not QTuning(keep_rows=1.0).check(Facts(batch_size=1)) and not QTuning().check(Facts(batch_size=2))


def test_up_to_five_rows_are_named_and_one_number_that_is_not_finite_is_enough():
    batch = batch_of((5,) * 7)
    values = torch.tensor([[1.0, float("nan")], [1.0, 2.0], *[[float("inf"), 1.0]] * 5])
    assert (
        _bad_rows([batch], [values]) == "0, 2, 3, 4, 5"
        and _bad_rows([batch], [torch.ones_like(values)]) == "on another process"
    )


def test_the_share_that_filled_up_is_reported():
    objective, batch = QTuning(), batch_of((5,) * 4)
    rows = Rows(np.array([0, 1, 3, 2]), np.zeros(4, dtype=bool), np.array([True, False, False, False]), 0.25)
    objective._note(rows, [batch.select(torch.tensor([0, 1]))], [batch])
    assert objective.report() == {"q_tuning/alpha": 0.25, "q_tuning/topped_up": 0.25, "q_tuning/kept_tokens": 0.5}


def test_values_are_scaled_to_0_and_1_and_equal_ones_to_0():
    assert (
        _scaled(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
        and _scaled(np.full(3, 7.0)).tolist() == [0.0] * 3
    )


def test_a_loss_that_is_not_finite_names_its_row():
    view, rows = view_of(), uneven()
    (word, *_) = set(rows[3]["ids"]) - {i for r in rows if r is not rows[3] for i in r["ids"]}
    with torch.no_grad():
        view.weight("model.embed_tokens.weight")[word] = float("nan")
    with pytest.raises(LuthierError, match=r"not finite: 3; lower"):
        planned(collate(rows), QTuning(), view)
