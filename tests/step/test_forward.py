"""What every objective asks a forward for, against the model's own logits; and what a step counts."""

import pytest
import torch
import torch.nn.functional as F

from helpers.cloze import WORDS, cloze
from luthier.data.batch import IGNORE, collate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward, Term, count, mean_of, sequence_sum
from luthier.step.lab import Lab
from luthier.testing.models import batch_of, rows_of, view_of


def altered(bias, cap):
    """A Gemma whose head has a bias, whose logits are capped, or both."""
    view = view_of("gemma3")
    if bias:
        values = torch.randn(97, generator=torch.Generator().manual_seed(0))
        view.module.lm_head.bias = torch.nn.Parameter(values)
    if cap:
        view.module.config.final_logit_softcapping = 0.5
    fresh = ModelView(view.module)
    fresh.layout = view.layout
    return fresh


def all_logits(view, row):
    """[T, V] float64, from the model's own call."""
    return view.module(torch.tensor([row["ids"]])).logits[0].double()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("bias", "cap"), [(False, False), (True, False), (False, True), (True, True)])
def test_losses_scores_and_logits_are_those_of_the_models_logits(bias, cap, grad):
    view, rows = altered(bias, cap), rows_of()
    batch = collate(rows)
    fwd, rest = Forward(batch, view), []
    for r in rows:
        z, at = all_logits(view, r), [t for t, y in enumerate(r["labels"]) if y != IGNORE]
        rest.append((z[[t - 1 for t in at]], torch.tensor([r["ids"][t] for t in at])))
    z, y = (torch.cat(x) for x in zip(*rest, strict=True))
    p = z.softmax(-1)
    nll = -p.gather(1, y[:, None]).squeeze(1).log()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fwd.nll().double(), nll, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fwd.logits(batch.supervised).double(), z, atol=1e-5, rtol=1e-5)
        scores = fwd.scores()
        torch.testing.assert_close(scores.nll.double(), nll, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
        runs = [(s, 0, 4) for s in range(4)]
        found = fwd.map_logits(lambda part, run: part.logsumexp(-1) + run[0], runs)
        wanted = z.logsumexp(-1) + torch.arange(4).repeat_interleave(4)
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bias", "cap"), [(False, False), (True, False), (True, True)])
def test_classes_are_the_label_words_at_the_answer_slot(bias, cap):
    view, rows = altered(bias, cap), cloze(5, 0)
    found = Forward(collate(rows), view).logits()
    for i, r in enumerate(rows):
        torch.testing.assert_close(found[i].double(), all_logits(view, r)[5, WORDS], atol=1e-5, rtol=1e-5)
    assert Lab({"labelled": rows}).batch("labelled", 3).keys == ("0", "1", "2")


def test_gradients_of_mapped_logits_are_those_of_the_whole_matrix():
    view, batch = altered(True, True), batch_of()
    found = []
    for whole in (False, True):
        fwd = Forward(batch, view)
        if whole:
            value = fwd.logits(batch.supervised).log_softmax(-1)[:, 3].sum()
        else:
            runs = [(0, 0, 3), (0, 3, 1), (1, 0, 4), (2, 0, 4), (3, 0, 4)]
            value = fwd.map_logits(lambda z, run: z.log_softmax(-1)[:, 3], runs).sum()
        found.append(torch.autograd.grad(value, list(view.module.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_trunk_runs_once_for_all_that_is_asked_of_it():
    view, calls = view_of(), []
    view.trunk.register_forward_hook(lambda *_: calls.append(1))
    fwd = Forward(batch_of(), view)
    trace = fwd.trace(1, -1)
    assert fwd.hidden() is trace.hidden[-1] and fwd.hidden(1) is trace.hidden[1] and len(calls) == 1
    fwd.nll(), fwd.scores(), fwd.trace(1, -1)
    assert len(calls) == 1
    fwd.hidden(2)
    fwd.hidden(embeds=view.embedding(fwd.batch.ids))
    assert len(calls) == 3
    other = view_of(seed=1)
    assert not torch.allclose(fwd.hidden(view=other), fwd.hidden())


def test_nothing_is_asked_of_a_model_without_targets():
    view, calls = view_of(), []
    view.trunk.register_forward_hook(lambda *_: calls.append(1))
    silent = [{**r, "labels": [IGNORE] * len(r["ids"])} for r in rows_of()]
    scores = Forward(collate(silent), view).scores()
    assert len(scores.nll) == len(scores.entropy) == len(calls) == 0


def test_a_step_counts_tokens_and_rows_that_have_any():
    rows = rows_of((9, 5, 12, 7), answer=4)
    rows[1] = {**rows[1], "labels": [IGNORE] * 5}
    rows[2] = {**rows[2], "labels": [rows[2]["ids"][0]] + [IGNORE] * 11}  # nothing predicts a row's first token
    assert count([collate(rows[:2]), collate(rows[2:])]) == {"tokens": 8.0, "sequences": 2.0}
    classes = [{**r, "row": {"label": 1}} for r in rows]
    assert count([collate(classes)])["sequences"] == 4.0
    soft = [{**r, "labels": [IGNORE] * len(r["ids"]), "row": {"soft": torch.ones(2)}} for r in rows]
    assert count([collate(soft)]) == {"tokens": 0.0, "sequences": 4.0}


def test_sums_by_row_and_means_of_terms():
    batch = batch_of((9, 5, 12, 7), answer=4)
    values = torch.arange(16.0)
    assert sequence_sum(values, batch).tolist() == [6.0, 22.0, 38.0, 54.0]
    assert float(mean_of(Term(values, "rows", 0.5), {"rows": 4.0})) == 30.0
    assert float(mean_of(Term(values * 1e-12, "rows"), {"rows": 1e-12})) == pytest.approx(120.0)
    assert float(mean_of(Term(values[:0], "rows"), {"rows": 0.0})) == 0.0


def test_other_labels_and_states_can_be_given():
    view, batch = view_of(), batch_of()
    fwd = Forward(batch, view)
    labels = torch.full_like(batch.labels, IGNORE)
    labels[[2, 7]] = torch.tensor([5, 6])
    states = torch.randn(batch.num_tokens, 32, generator=torch.Generator().manual_seed(0))
    wanted = F.cross_entropy(states[[2, 7]] @ view.head_weight.T, torch.tensor([5, 6]), reduction="none")
    torch.testing.assert_close(fwd.nll(states, labels), wanted)
