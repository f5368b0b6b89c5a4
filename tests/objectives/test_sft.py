"""Cross-entropy: a value by hand, its mean over the step, and classes."""

import math

import pytest
import torch
import torch.nn.functional as F

from luthier.data.batch import IGNORE, collate
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Lora


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "lfm2"])
def test_it_is_transformers_cross_entropy(kind):
    view, rows = view_of(kind), rows_of()
    term = Sft().loss(Forward(collate(rows), view))["loss"]
    by_hand = 0.0
    for r in rows:
        logits = view.module(torch.tensor([r["ids"]])).logits[0, :-1].float()
        by_hand += float(F.cross_entropy(logits, torch.tensor(r["labels"][1:]), reduction="sum", ignore_index=IGNORE))
    assert float(term.sums.sum()) == pytest.approx(by_hand, rel=1e-5) and term.over == "tokens"


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    view = view_of()
    with torch.no_grad():
        view.module.lm_head.weight.zero_()
    batch = batch_of()
    sums = Sft().loss(Forward(batch, view))["loss"].sums
    assert float(sums.sum()) == pytest.approx(len(batch.supervised) * math.log(97), rel=1e-6)


def test_the_mean_is_over_supervised_tokens_of_the_step_not_over_rows():
    view, rows = view_of(), [*rows_of((20,), answer=12), *rows_of((8,), seed=1, answer=2)]
    loop = Loop(view, rows, Lora(rank=2).attach(view), Sft(), TrainSettings(max_steps=1, batch_size=2))
    one_by_one = [float(Sft().loss(Forward(collate([r]), view))["loss"].sums.sum()) for r in rows]
    assert loop.step()["loss"] == pytest.approx(sum(one_by_one) / 14, rel=1e-5)


def test_rows_with_a_class_use_the_models_own_head():
    view = view_of("bert-classifier")
    rows = [{**r, "labels": [IGNORE] * len(r["ids"]), "row": {"label": i % 3}} for i, r in enumerate(rows_of())]
    term = Sft().loss(Forward(collate(rows), view))["loss"]
    logits = torch.cat([view.module(torch.tensor([r["ids"]])).logits for r in rows])
    wanted = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="sum")
    assert float(term.sums) == pytest.approx(float(wanted), rel=1e-5) and term.over == "sequences"
