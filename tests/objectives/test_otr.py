"""The exact checks of the sheet; numbers in names are the sheet's. 8 is a claim."""

import logging
from dataclasses import replace

import pytest
import torch

from luthier.data.batch import IGNORE, collate
from luthier.method import Facts
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.otr import Otr, draw, exact_loss, sampled_loss
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full

V, N = 50, 7


def problem(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, V, generator=g, dtype=dtype), torch.randint(V, (N,), generator=g)


def gradient(f, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(f(z).sum(), z)[0]


@pytest.mark.parametrize(("beta", "kappa"), [(-0.1, 1.0), (-0.1, 1.3), (0.0, 1.3), (-1.0, 1.3)])
def test_1_gradient_of_the_closed_form(beta, kappa):
    z, x = problem()
    p, drawn = z.softmax(-1), (z / kappa).softmax(-1)
    onehot = torch.nn.functional.one_hot(x, V).double()
    hit = drawn.gather(1, x[:, None])
    formula = -((1 - beta) * hit * (onehot - p) + beta * (drawn - p))
    assert (gradient(lambda z: exact_loss(z, x, beta, kappa), z) - formula).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [-0.5, -0.1, 0.7])
def test_2_at_kappa_one_it_is_dft_times_one_minus_beta(beta):
    z, x = problem()

    def dft(z):
        log_p = z.log_softmax(-1).gather(1, x[:, None])
        return -(log_p.detach().exp() * log_p)

    exact = gradient(lambda z: exact_loss(z, x, beta, 1.0), z)
    assert (exact - (1 - beta) * gradient(dft, z)).abs().max() < 1e-12


def test_3_without_a_difference_in_reward_there_is_no_signal():
    z, x = problem()
    assert gradient(lambda z: exact_loss(z, x, 1.0, 1.0), z).abs().max() < 1e-12


def test_4_draws_are_unbiased_and_their_variance_falls_with_their_number():
    z, x = problem(dtype=torch.float32)
    x = z.argmax(-1)  # tokens that are drawn now and then
    exact = gradient(lambda z: exact_loss(z, x, -0.1, 1.3), z)
    generator, found = torch.Generator().manual_seed(0), {}
    for k in (64, 256):
        many = [gradient(lambda z, k=k: sampled_loss(z, x, draw(z, k, 1.3, generator), -0.1), z) for _ in range(1000)]
        found[k] = torch.stack(many)
    assert (found[256].mean(0) - exact).norm() / exact.norm() < 0.05
    assert float(found[64].var(0).sum() / found[256].var(0).sum()) == pytest.approx(4, rel=0.25)


def test_5_at_beta_zero_only_hits_count():
    z, x = problem(dtype=torch.float32)
    x[0] = z[0].argmin()  # will hardly be drawn
    drawn = draw(z, 20, 1.3, torch.Generator().manual_seed(1))
    hits = (drawn == x[:, None]).sum(1)
    log_p = z.log_softmax(-1).gather(1, x[:, None]).squeeze(1)
    assert torch.allclose(sampled_loss(z, x, drawn, 0.0), -(hits / 20) * log_p, atol=1e-6)
    assert hits[0] == 0 and (gradient(lambda z: sampled_loss(z, x, drawn, 0.0), z)[0] == 0).all()


def loss_of(objective, rows, view=None, limit=10_000, steps=1):
    view = view or view_of()
    settings = TrainSettings(max_steps=3, batch_size=len(rows), tokens_per_forward=limit, shuffle=False, adam_eps=1e-5)
    loop = Loop(view, rows, Full().attach(view), objective, settings)
    return [loop.step() for _ in range(steps)]


class Given(Forward):
    """A forward whose final states are given."""

    def __init__(self, batch, view, states):
        super().__init__(batch, view)
        self.states = states

    def hidden(self, layer=-1, embeds=None, view=None):
        return self.states


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("draws", ["exact", 16])
def test_6_logits_and_tokens_without_a_label_do_not_enter(draws, reduction):
    view, objective = view_of(), Otr(draws=draws, reduction=reduction)
    batch = collate(rows_of((12, 9, 14), answer=5))
    window, _ = objective.plan(Window([batch], Clock(0, 3)), Probe(view, objective))
    (batch,) = window.micro
    silent = batch.labels == IGNORE
    assert silent.sum() == len(silent) - 15
    states = view.trace(batch).hidden[-1].detach()
    other = torch.where(silent[:, None], states + 3.0, states)
    prompts = silent & (torch.arange(len(silent)) != len(silent) - 1)  # the tokens that nobody is to predict
    ids = torch.where(prompts, (batch.ids + 1) % 90, batch.ids)
    found = []
    for h, changed in ((states, batch), (other, batch), (states, replace(batch, ids=ids))):
        h = h.clone().requires_grad_()
        value = objective.loss(Given(changed, view, h))["loss"].sums.sum()
        found.append((value.detach(), torch.autograd.grad(value, h)[0]))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])
    assert (found[0][1][silent] == 0).all() and (found[0][1][~silent].abs().sum(1) > 0).all()


@pytest.mark.parametrize("draws", ["exact", 16])
def test_6_padding_does_not_enter_and_a_seed_gives_its_draws(draws):
    rows = rows_of((12, 9, 14), answer=5)
    a = loss_of(Otr(draws=draws), rows)[0]["loss"]
    assert loss_of(Otr(draws=draws), rows)[0]["loss"] == a
    view = view_of()
    view.layout = "padded"
    assert loss_of(Otr(draws=draws), rows, view)[0]["loss"] == pytest.approx(a, abs=1e-5)
    if draws != "exact":
        assert loss_of(Otr(draws=draws, seed=1), rows)[0]["loss"] != a


@pytest.mark.parametrize(("beta", "kappa"), [(-0.1, 1.3), (0.4, 0.8)])
def test_6_the_loss_of_a_step_is_that_of_a_plain_softmax(beta, kappa):
    """-mean over rows of the mean over their tokens, K to infinity, in double precision one token at a time."""
    rows, view = rows_of((12, 9, 14), answer=5), view_of()
    rows[1]["labels"] = [IGNORE] * 7 + rows[1]["ids"][7:]  # two tokens, where the others have five
    each = []
    for r in rows:
        z, mine = view.module(torch.tensor([r["ids"]])).logits[0].double(), []
        for t, x in enumerate(r["labels"]):
            if x == IGNORE:
                continue
            log_p, drawn = z[t - 1].log_softmax(-1), (z[t - 1] / kappa).softmax(-1)
            reward = torch.full_like(drawn, beta)
            reward[x] = 1.0
            mine.append(-float((drawn * reward * log_p).sum()))
        each.append(mine)
    tokens = sum(map(len, each))
    wanted = {"sequence_mean": sum(sum(m) / len(m) for m in each) / 3, "token_mean": sum(map(sum, each)) / tokens}
    for reduction, value in wanted.items():
        objective = Otr(beta=beta, kappa=kappa, reduction=reduction)
        assert loss_of(objective, rows)[0]["loss"] == pytest.approx(value, abs=1e-5)


def test_5_draws_are_from_the_tempered_distribution():
    z = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = draw(z, 200_000, 2.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn[0], minlength=3) / 200_000
    torch.testing.assert_close(share, (z[0] / 2.0).softmax(-1), atol=5e-3, rtol=0)


def test_draws_differ_by_step_row_and_place():
    """Rows of the same tokens under other keys, and the same row in another step, draw anew."""
    row = rows_of((12,), answer=6)[0]
    rows = [row, {**row, "key": "1"}]
    view, objective = view_of(), Otr(draws=4)
    seen = {}
    for step in (0, 1):
        window, _ = objective.plan(Window([collate(rows)], Clock(step, 3)), Probe(view, objective))
        losses = []
        for i in range(2):
            alone = window.micro[0].select(torch.tensor([i]))
            losses.append(float(objective.loss(Forward(alone, view))["loss"].sums.sum()))
        seen[step] = losses
    assert len({*seen[0], *seen[1]}) == 4


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("draws", ["exact", 16])
def test_7_chunks_and_micro_batches_change_nothing(draws, reduction, monkeypatch):
    rows, objective = rows_of((40, 9, 14, 20), answer=30), lambda: Otr(draws=draws, reduction=reduction)
    whole = [e["loss"] for e in loss_of(objective(), rows, steps=3)]
    apart = [e["loss"] for e in loss_of(objective(), rows, limit=1, steps=3)]
    assert whole == pytest.approx(apart, abs=1e-5)
    if draws == "exact":  # a run's draws are keyed by where it begins
        monkeypatch.setattr("luthier.objectives.otr.CHUNK", 4)
        assert [e["loss"] for e in loss_of(objective(), rows, steps=3)] == pytest.approx(whole, abs=1e-6)


def test_reductions_by_hand():
    rows = rows_of((20, 9), answer=8)
    rows[1]["labels"] = [IGNORE] * 7 + rows[1]["ids"][7:]  # 8 and 2 tokens
    view, batch = view_of(), collate(rows)
    z = Forward(batch, view).logits(batch.supervised).detach()
    each = exact_loss(z, batch.labels[batch.supervised], -0.1, 1.3)
    a, b = each[:8], each[8:]
    assert len(b) == 2
    means = {"sequence_mean": (a.mean() + b.mean()) / 2, "token_mean": each.mean()}
    for reduction, wanted in means.items():
        assert loss_of(Otr(reduction=reduction), rows)[0]["loss"] == pytest.approx(float(wanted), abs=1e-5)


def test_the_log_is_means_over_the_positions():
    rows = rows_of((12, 9), answer=4)
    view = view_of()
    z = torch.cat([view.module(torch.tensor([r["ids"]])).logits[0, -5:-1] for r in rows])
    x = torch.tensor([y for r in rows for y in r["ids"][-4:]])
    p, drawn = z.softmax(-1), (z / 1.3).softmax(-1)
    hit = drawn.gather(1, x[:, None]).squeeze(1)
    (entry,) = loss_of(Otr(), rows)
    wanted = {
        "hits": hit.mean(), "gold": p.gather(1, x[:, None]).mean(), "no_hit": (hit < 1 / 256).float().mean(),
        "entropy": -(p * p.log()).sum(-1).mean(),
    }  # fmt: skip
    assert {k: entry[f"otr/{k}"] for k in wanted} == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-4)


def test_the_log_says_how_often_the_gold_token_is_drawn(caplog):
    rows = rows_of((20, 20), answer=10)
    entries = loss_of(Otr(draws=64), rows, steps=2)
    assert 0 <= entries[0]["otr/hits"] < 0.2 and 0 < entries[0]["otr/entropy"] < 5
    caplog.clear()
    loss_of(Otr(draws=1), rows, steps=3)
    assert caplog.text.count("hardly ever drawn") == 1


def test_a_step_that_draws_is_what_its_draws_say(monkeypatch):
    """Every draw is kept, and the loss and the log computed from them by hand; runs of a row draw apart."""
    kept, seeds = [], []

    def note(z, draws, kappa, generator):
        assert kappa == 2.0
        seeds.append(generator.initial_seed())
        kept.append(draw(z, draws, kappa, generator))
        return kept[-1]

    monkeypatch.setattr("luthier.objectives.otr.draw", note)
    monkeypatch.setattr("luthier.objectives.otr.CHUNK", 2)
    rows, view = rows_of((12, 9), answer=4), view_of()
    z = torch.cat([view.module(torch.tensor([r["ids"]])).logits[0, -5:-1] for r in rows])
    x = torch.tensor([y for r in rows for y in r["ids"][-4:]])
    (entry,) = loss_of(Otr(draws=64, kappa=2.0, beta=-0.3), rows, view)
    assert len(set(seeds)) == 4, "two runs of two rows, each computed again in the backward"
    drawn = torch.cat(kept[:4])
    hit = drawn == x[:, None]
    log_p = z.log_softmax(-1).gather(1, drawn)
    each = -(torch.where(hit, 1.0, -0.3) * log_p).mean(-1)
    assert entry["loss"] == pytest.approx(float(each.view(2, 4).mean(1).mean()), abs=1e-5)
    share = hit.float().mean(-1)
    assert entry["otr/hits"] == pytest.approx(float(share.mean()))
    assert entry["otr/no_hit"] == pytest.approx(float((share == 0).float().mean())) and (share == 1 / 64).any()


def test_the_log_is_of_one_step_and_counts_a_token_once():
    rows, view = rows_of((12, 9, 14), answer=5), view_of()
    settings = TrainSettings(max_steps=3, batch_size=3)
    loop = Loop(view, rows, Full().attach(view), Otr(), settings)
    for _ in range(2):
        loop.step()
        assert loop.objective._seen["tokens"] == 15


@pytest.mark.parametrize(("draws", "least"), [("exact", 1 / 256), (10, 1 / 20)])
def test_a_token_has_no_hit_below_the_share_of_one_draw(draws, least):
    """With draws: not one of them. In the limit: fewer than one in 256, the source's number of draws."""
    objective, z = Otr(draws=draws), torch.zeros(5, 3)
    hits = torch.tensor([0.0, least * 0.997, least, least * 1.002, 2 * least])
    objective._note(z, torch.zeros(5, dtype=torch.long), hits)
    assert objective.report()["otr/no_hit"] == pytest.approx(2 / 5)


def test_what_is_only_computed_forward_is_in_the_log():
    view, objective = view_of(), Otr()
    window, _ = objective.plan(Window([collate(rows_of((12, 9), answer=4))], Clock(0, 3)), Probe(view, objective))
    assert not objective.report() and not objective._told, "nothing was seen before"
    objective.loss(Forward(window.micro[0], view))
    assert objective._seen["tokens"] == 8


@pytest.mark.parametrize(("no_hit", "warns"), [(5.0, False), (6.0, True)])
def test_it_warns_where_more_than_half_of_the_gold_tokens_are_not_drawn(caplog, no_hit, warns):
    objective = Otr()
    objective.load_state_dict({"told": False, "tokens": 10.0, "no_hit": no_hit})
    objective._warn_once()
    assert ("hardly ever drawn" in caplog.text) == warns == objective._told


def test_what_it_is_not_is_refused_or_warned_of(caplog):
    assert [p.key for p in Otr(draws=0).check(Facts())] == ["draws"]
    assert not Otr(draws=1, kappa=1.0, beta=0.0).check(Facts()) and not caplog.text
    for wrong in ({"kappa": 0}, {"beta": 1.0}, {"draws": "some"}, {"kappa": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Otr(**wrong)
    with caplog.at_level(logging.WARNING):
        assert not Otr(kappa=0.5, beta=0.2).check(Facts())
    assert "sharpens" in caplog.text and "rewards wrong tokens" in caplog.text
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.tensor([[0.0, float("nan")]]), 2, 1.0)
