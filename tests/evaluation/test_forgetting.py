"""Forgetting: what is asked, what it gives, what it refuses."""

import math

import pytest
import torch

from luthier.evaluation import Forgetting
from luthier.evaluation.forgetting import built_in, texts_of
from luthier.method import Facts
from luthier.support.errors import RecipeError


def test_the_built_in_sets_are_what_the_page_says():
    general, canaries = built_in("general"), built_in("canaries")
    assert len(general) == 24 and len({r["topic"] for r in general}) == 24
    assert len(canaries) == 60 == len({c["question"] for c in canaries})
    assert all(len({c["right"], *c["wrong"]}) == 4 for c in canaries)


def test_general_loss_is_the_models_own(exam_of, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "some words of text"}\n{"text": "and others"}\n')
    exam = exam_of([])
    (measure,) = Forgetting(general=str(tmp_path / "t.jsonl"), canaries=False).evaluate(exam)
    nats = tokens = 0.0
    for text in ("some words of text", "and others"):
        ids = torch.tensor([exam.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]])
        nats += float(exam.view.module(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert measure.value == pytest.approx(nats / tokens, rel=1e-5) and not measure.higher


def test_a_canary_is_right_if_its_answer_is_the_most_likely(exam_of, monkeypatch):
    from luthier.step.lab import RowScore

    exam = exam_of([])
    monkeypatch.setattr(exam, "losses", lambda rows: [RowScore(1.0 + (r["key"][-2:] != ".0"), 2.0) for r in rows])
    right, loss = Forgetting(general="none").evaluate(exam)
    assert right.value == 1 and loss.value == 0.5
    monkeypatch.setattr(exam, "losses", lambda rows: [RowScore(1.0 + (r["key"][-2:] != ".2"), 2.0) for r in rows])
    assert Forgetting(general="none").evaluate(exam)[0].value == 0


def test_a_model_that_knows_nothing_is_right_by_chance(exam_of):
    measures = {m.name: m.value for m in Forgetting().evaluate(exam_of([]))}
    assert 0.1 < measures["canaries"] < 0.5 and measures["general_loss"] == pytest.approx(math.log(260), abs=0.5)
    assert set(measures) == set(Forgetting().names())


def test_files_that_are_no_text_are_refused_by_line(tmp_path):
    assert [p.key for p in Forgetting(general="no/such.jsonl").check(Facts())] == ["general"]
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(RecipeError, match=r"x\.jsonl:2: has no text"):
        texts_of(tmp_path / "x.jsonl")


def test_another_file_is_another_question(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n')
    one = Forgetting(general=str(file)).content()
    file.write_text('{"text": "b"}\n')
    assert Forgetting(general=str(file)).content() != one


def test_turned_off_it_asks_nothing(exam_of):
    assert Forgetting(general="none", canaries=False).evaluate(exam_of([])) == []
