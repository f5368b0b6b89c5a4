"""The per-token view: losses, what an objective leaves out, how strongly it pulls."""

import json

import pytest
import torch

from helpers.commands import luthier, write
from luthier.data.batch import collate
from luthier.objectives import Caft, MaskedThought, Otr, QTuning, Sft
from luthier.objectives.base import Clock, Window
from luthier.report import token_view
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.tasks.causal_lm import CausalLm
from luthier.testing.models import byte_tokenizer, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Lora


class Texts:
    tokenizer = byte_tokenizer()


def viewed(objective, rows=None, batch_size=4):
    rows = rows or rows_of((14, 12, 9, 11), answer=5)
    view = view_of()
    settings = TrainSettings(max_steps=3, batch_size=batch_size)
    loop = Loop(view, rows, Lora(rank=2).attach(view, None, 3), objective, settings)
    tokens = token_view.tokens_of(Texts, rows, CausalLm(), ())
    token_view.note_losses(tokens, view, rows, "before")
    token_view.note_weights(tokens, loop.probe, rows, batch_size, 3)
    return rows, view, tokens


def on(tokens):
    return [t for row in tokens for t in row if t["on"]]


def test_losses_stand_at_the_tokens_they_are_of():
    rows, view, tokens = viewed(Sft())
    for row, mine in zip(rows, tokens, strict=False):
        states = view.trace(collate([row])).hidden[-1]
        p = torch.nn.functional.linear(states, view.head_weight).log_softmax(-1)
        for i, t in enumerate(mine):
            assert t["on"] == (row["labels"][i] != -100)
            if t["on"]:
                assert t["before"] == pytest.approx(-float(p[i - 1, row["ids"][i]]), abs=1e-3)


def test_plain_cross_entropy_pulls_at_every_token_alike():
    _, _, tokens = viewed(Sft())
    assert len(on(tokens)) == 15 and all(t["kept"] and t["weight"] == pytest.approx(1, abs=2e-3) for t in on(tokens))


def test_otr_pulls_less_at_tokens_the_model_does_not_believe_in():
    """In closed form the reward's gradient goes with the gold token's probability."""
    _, _, tokens = viewed(Otr(kappa=1.0, beta=0.0, reduction="token_mean"))
    ranked = sorted(on(tokens), key=lambda t: t["before"])
    weights = [t["weight"] for t in ranked]
    assert weights == sorted(weights, reverse=True) and 0 < weights[0] < 0.2


@pytest.mark.parametrize("pruned", ["mask", "drop"])
def test_what_q_tuning_leaves_out_is_marked(pruned):
    rows, view, tokens = viewed(QTuning(keep_rows=0.5, keep_tokens=0.6, pruned=pruned))
    objective = QTuning(keep_rows=0.5, keep_tokens=0.6, pruned=pruned)
    window, _ = objective.plan(Window([collate(rows)], Clock(0, 3)), Probe(view, objective))
    kept = {(b.keys[int(b.seq[i])], int(b.pos[i]) + 1) for b in window.micro for i in b.supervised.tolist()}
    for row, mine in zip(rows, tokens, strict=False):
        for i, t in enumerate(mine):
            assert t.get("kept", False) == ((row["key"], i) in kept)
    assert 0 < sum(t["kept"] for t in on(tokens)) < len(on(tokens))


@pytest.mark.parametrize("objective", [Caft(allow_untrained_heads=True, weight=0.5), MaskedThought(max_rate=0.4)])
def test_other_objectives_can_be_viewed(objective):
    _, _, tokens = viewed(objective)
    assert all(t["weight"] > 0 for t in on(tokens))


def test_nothing_is_left_on_the_model():
    rows = rows_of((14, 12, 9, 11), answer=5)
    runs = []
    for look in (False, True):
        view = view_of()
        loop = Loop(
            view, rows, Lora(rank=2).attach(view, None, 3), Otr(draws=8), TrainSettings(max_steps=3, batch_size=4)
        )
        if look:
            token_view.note_weights(token_view.tokens_of(Texts, rows, CausalLm(), ()), loop.probe, rows, 4, 3)
        runs.append([loop.step()["loss"] for _ in range(3)])
        assert all(p.grad is None for p in view.module.parameters())
    assert runs[0] == runs[1]


def test_a_run_keeps_it_and_its_report_shows_it(model_folder, tmp_path):
    path = write(tmp_path, model_folder, objective={"q-tuning": {"keep_rows": 0.5, "keep_tokens": 0.5}}, evaluate=[])
    done = luthier("run", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = json.loads((tmp_path / "out/tokens.json").read_text())
    marked = on(tokens)
    assert len(tokens) == 3 and all({"before", "after", "kept"} <= set(t) for t in marked)
    assert any(not t["kept"] for t in marked)
    page = (tmp_path / "out/report.html").read_text()
    first = next(t for t in marked if t["kept"])
    assert f"{first['before']:.2f} → {first['after']:.2f}" in page and 'class="one gone"' in page
