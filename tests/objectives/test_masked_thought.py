"""The exact checks of the sheet; numbers in names are the sheet's. 8 is a claim."""

import numpy as np
import pytest
import torch
from scipy import stats

from luthier.data.batch import IGNORE, collate
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward, Window, count
from luthier.objectives.masked_thought import MaskedThought, allowed_ids, masking_rate, solution
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import VOCABULARY, byte_tokenizer, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full

LATE = Clock(90, 100)  # past the warm-up


def planned(objective, rows, clock=LATE, view=None):
    view = view or view_of()
    extra = objective.extend(view)
    window, counts = objective.plan(Window([collate(rows)], clock), Probe(view, objective, extra))
    return window.micro[0], counts


def long_rows(n=50, answer=40):
    return rows_of(tuple([60] * n), answer=answer)


def test_1_at_rate_zero_it_is_sft_to_the_bit():
    results = []
    for objective in (Sft(), MaskedThought(max_rate=0.0, random_share=0.5)):
        view = view_of()
        loop = Loop(view, rows_of(), Full().attach(view), objective, TrainSettings(max_steps=3, batch_size=4))
        losses = [loop.step()["loss"] for _ in range(3)]
        results.append((losses, {n: p.detach().clone() for n, p in view.module.named_parameters()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


def turns():
    """Rows of several turns: what is asked stands between what is answered; one answer begins the row."""
    rows = rows_of((12, 9, 14))
    spans = {0: [(3, 5), (8, 12)], 1: [(0, 2), (4, 6)], 2: [(13, 14)]}
    out = []
    for i, row in enumerate(rows):
        answered = {t for a, b in spans[i] for t in range(a, b)}
        labels = [y if t in answered else IGNORE for t, y in enumerate(row["ids"])]
        prompt = [int(t not in answered) for t in range(len(labels))]
        out.append({**row, "labels": labels, "token": {"prompt": prompt}})
    return out


def test_2_what_may_be_hidden_are_the_tokens_that_something_before_them_is_to_predict():
    rows = turns()
    by_hand = [y != IGNORE and t > 0 for r in rows for t, y in enumerate(r["labels"])]
    assert solution(collate(rows)).tolist() == by_hand and sum(by_hand) == 10
    always = MaskedThought(max_rate=1 - 1e-12, warmup_share=1e-9)
    noisy, counts = planned(always, rows)
    assert noisy.token["masked"].tolist() == by_hand and counts["tokens"] == 10
    assert torch.equal(noisy.labels, collate(rows).labels)


def test_words_that_may_stand_in_are_all_but_the_special_ones():
    assert allowed_ids(6, {0, 4, 9}).tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize("random_share", [0.0, 0.5, 1.0])
def test_2_labels_stay_and_the_question_is_never_touched(random_share):
    rows = long_rows(5)
    clean, (noisy, _) = collate(rows), planned(MaskedThought(max_rate=0.9, random_share=random_share), rows)
    assert (
        torch.equal(noisy.labels, clean.labels) and noisy.lengths == clean.lengths and torch.equal(noisy.pos, clean.pos)
    )
    question = ~solution(clean)
    assert torch.equal(noisy.ids[question], clean.ids[question]) and not noisy.token["masked"][question].any()
    assert solution(clean).sum() == 5 * 40, "what is predicted, the end token included"


def test_3_rate_fresh_draws_and_reproducible_ones():
    rows, method = long_rows(), MaskedThought(max_rate=0.4)
    one, again, later = (planned(method, rows, c)[0].token["masked"] for c in (LATE, LATE, Clock(91, 100)))
    assert float(one.sum()) / 2000 == pytest.approx(0.4, abs=0.033)
    assert torch.equal(one, again) and not torch.equal(one, later)
    other = planned(MaskedThought(max_rate=0.4, seed=1), rows)[0].token["masked"]
    assert not torch.equal(one, other)
    alone = planned(method, rows[3:4])[0].token["masked"]
    assert torch.equal(alone, one[180:240]), "keyed by row, not by batch"


def test_4_the_rate_rises_in_a_line_and_stays():
    rate = lambda s: masking_rate(s, 300, 0.4, 2 / 3)  # noqa: E731
    assert rate(0) == 0 and rate(100) == pytest.approx(0.2, rel=0.01)
    assert (
        rate(200) == pytest.approx(0.4 * 200 / 201)
        and rate(201) == pytest.approx(0.4)
        and all(rate(s) == 0.4 for s in range(202, 300))
    )


@pytest.mark.parametrize(("step", "warmup_share", "wanted"), [(0, 2 / 3, 0.0), (50, 1.0, 0.3), (50, 0.1, 0.6)])
def test_4_the_rate_of_a_step_is_that_of_its_clock(step, warmup_share, wanted):
    noisy, _ = planned(MaskedThought(max_rate=0.6, warmup_share=warmup_share), long_rows(), Clock(step, 100))
    assert float(noisy.token["masked"].sum()) / 2000 == pytest.approx(wanted, abs=0.035)


def test_4_before_anything_is_hidden_it_is_sft_and_the_vector_stays():
    view, rows, method = view_of(), rows_of((20, 20)), MaskedThought(max_rate=0.6, random_share=0.5)
    noisy, _ = planned(method, rows, Clock(0, 100), view)
    extra = method.extend(view)
    term = method.loss(Forward(noisy, view, extra))["loss"]
    assert (
        float(term.sums) == float(Sft().loss(Forward(collate(rows), view))["loss"].sums.sum()) and term.over == "tokens"
    )
    assert (torch.autograd.grad(term.sums, extra.vector)[0] == 0).all()


def test_only_those_that_use_a_vector_train_one():
    view = view_of()
    assert MaskedThought().extend(view) is None and MaskedThought(max_rate=0.0, random_share=0.5).extend(view) is None
    assert MaskedThought(random_share=0.99).extend(view) is not None


def test_5_what_stands_in():
    rows, clean = long_rows(60), collate(long_rows(60))
    masked, _ = planned(MaskedThought(max_rate=0.5, random_share=0.0), rows)
    assert torch.equal(masked.ids, clean.ids) and torch.equal(masked.token["vector"], masked.token["masked"])
    words, _ = planned(MaskedThought(max_rate=0.9), rows)
    drawn = words.ids[words.token["masked"]].numpy()
    assert not words.token["vector"].any() and not set(drawn) & {0, 1, 2}, "no special ids"
    assert stats.chisquare(np.bincount(drawn, minlength=VOCABULARY)[3:]).pvalue > 0.001
    half, _ = planned(MaskedThought(max_rate=0.5, random_share=0.5), rows)
    share = float(half.token["vector"].sum() / half.token["masked"].sum())
    assert share == pytest.approx(0.5, abs=3 * (0.25 / float(half.token["masked"].sum())) ** 0.5)


def test_5_special_tokens_of_a_tokenizer_are_never_words():
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=270)  # more rows than the tokenizer has words
    rows = [{**r, "ids": [i + 3 for i in r["ids"]]} for r in long_rows(30)]
    noisy, _ = planned(MaskedThought(max_rate=0.9), rows, view=ModelView(model, tokenizer))
    drawn = set(noisy.ids[noisy.token["masked"]].tolist())
    assert not drawn & set(tokenizer.all_special_ids) and max(drawn) < len(tokenizer)


def test_6_the_loss_covers_all_solution_tokens_or_the_clean_ones():
    rows = long_rows(5)
    clean = count([collate(rows)])["tokens"]
    noisy, counts = planned(MaskedThought(max_rate=0.4), rows)
    assert counts["tokens"] == clean == 200
    fewer, counts = planned(MaskedThought(max_rate=0.4, loss_on="clean"), rows)
    hidden = int(fewer.token["masked"].sum())
    assert counts["tokens"] == clean - hidden and hidden == int(noisy.token["masked"].sum()) > 0
    gone = (collate(rows).labels != IGNORE) & (fewer.labels == IGNORE)
    assert torch.equal(gone[:-1], fewer.token["masked"][1:]), "the labels that go are those of the replaced tokens"


def test_7_the_vector_starts_at_the_mean_and_the_vocabulary_stays():
    view = view_of()
    before = view.embedding.weight.detach().clone()
    loop = Loop(view, rows_of((20, 20)), Full(train_embeddings=False).attach(view), MaskedThought(max_rate=0.5, random_share=0.0),
                TrainSettings(max_steps=8, batch_size=2, learning_rate=1e-2))  # fmt: skip
    assert torch.allclose(loop.extra.vector, before.mean(0), atol=1e-6)
    for _ in range(8):
        loop.step()
    assert not torch.allclose(loop.extra.vector, before.mean(0), atol=1e-3), "it is trained"
    assert torch.equal(view.embedding.weight, before)
    update = loop.trainable.update()
    assert "vector" not in str(list(update.parts[0].tensors())), "nothing of it is left in the tuned model"


def test_7_a_resumed_run_goes_on_with_the_same_vector(tmp_path):
    def loop(folder, steps):
        view = view_of()
        settings = TrainSettings(max_steps=6, batch_size=2, learning_rate=1e-2, save_steps=3)
        out = Loop(
            view,
            rows_of((20, 20)),
            Full().attach(view),
            MaskedThought(max_rate=0.5, random_share=0.3),
            settings,
            folder=folder,
        )
        out.resume()
        for _ in range(steps):
            out.step()
        return out

    whole = loop(None, 6)
    first = loop(tmp_path, 3)
    first.save()
    again = loop(tmp_path, 3)
    assert again.progress.step == 6 and torch.equal(again.extra.vector, whole.extra.vector)


def test_hidden_tokens_are_seen_as_the_vector():
    """The states are those of a model whose embedding of these tokens is the vector."""
    view, method = view_of(), MaskedThought(max_rate=0.6, random_share=0.0)
    noisy, _ = planned(method, rows_of((20, 20)), view=view)
    extra = method.extend(view)
    fwd = Forward(noisy, view, extra)
    loss, over, _ = method.loss(fwd)["loss"]
    assert over == "tokens"
    embeds = view.embedding(noisy.ids).clone()
    embeds[noisy.token["masked"]] = extra.vector
    assert torch.allclose(loss, Forward(noisy, view).nll(view.trace(noisy, embeds=embeds).hidden[-1]).sum(), atol=1e-5)


def test_a_row_without_a_question_is_named():
    row = rows_of((10,))[0]
    row["labels"], row["token"] = list(row["ids"]), {"prompt": [0] * 10}
    with pytest.raises(LuthierError, match="row 0 has no question"):
        planned(MaskedThought(), [row])
    with pytest.raises(LuthierError, match="row b has no question"):
        planned(
            MaskedThought(),
            [{**row, "key": "a", "token": {"prompt": [1] * 5 + [0] * 5}}, *({**row, "key": k} for k in "bc")],
        )
    bare = {**row, "token": {}}  # nothing says what was asked: the first token, which nothing predicts, is no question
    with pytest.raises(LuthierError, match="row 0 has no question"):
        planned(MaskedThought(), [bare])
    asked = {**bare, "labels": [IGNORE, IGNORE, *row["ids"][2:]]}
    assert planned(MaskedThought(), [asked])[1]["tokens"] == 8


@pytest.mark.parametrize("wrong", [{"max_rate": 1.0}, {"max_rate": -0.1}, {"warmup_share": 0.0}, {"random_share": 2}])
def test_rates_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaskedThought(**wrong)


@pytest.mark.parametrize(
    "share, rate, trains",
    [(0.0, 0.2, True), (0.5, 1e-3, True), (0.99, 0.2, True), (1.0, 0.2, False), (0.5, 0.0, False), (1.0, 0.0, False)],
)
def test_a_vector_trains_beside_the_model_where_some_tokens_become_it(share, rate, trains):
    objective = MaskedThought(random_share=share, max_rate=rate)
    assert objective.trains_beside is trains is (objective.extend(view_of(layers=1)) is not None)
