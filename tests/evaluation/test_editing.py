"""Editing: token accuracy against a plain forward pass."""

import pytest
import torch

from luthier.data.batch import IGNORE
from luthier.evaluation import Editing
from luthier.support.errors import LuthierError

ROWS = [
    {"prompt": f"Where is {n}?", "completion": c, "rephrase": f"The place of {n} is", "locality_prompt": f"Who is {n}?",
     "locality_answer": "nobody"}
    for n, c in (("Bo", "Oslo"), ("Al", "Rome"))
]  # fmt: skip


def test_against_a_plain_forward_pass(exam_of):
    exam = exam_of(ROWS)
    found = {m.name: m for m in Editing().evaluate(exam)}
    asked = {
        "efficacy": ("prompt", "completion"),
        "generalisation": ("rephrase", "completion"),
        "specificity": ("locality_prompt", "locality_answer"),
    }
    for name, (prompt, answer) in asked.items():
        for i, row in enumerate(ROWS):
            item = exam.renderer.render({"prompt": row[prompt], "completion": row[answer]}, "x")
            choice = exam.view.module(input_ids=torch.tensor([item["ids"]])).logits[0].argmax(-1)
            at = [t for t, y in enumerate(item["labels"]) if y != IGNORE and y not in exam.renderer.stop_ids]
            by_hand = sum(int(choice[t - 1]) == item["ids"][t] for t in at) / len(at)
            assert len(at) == len(row[answer]) and found[name].stats[i, 0] == pytest.approx(by_hand)
    assert found["efficacy"].keys == ("1", "2")


def test_the_end_token_does_not_count(exam_of, monkeypatch):
    exam = exam_of(ROWS[:1])
    import numpy as np

    from luthier.inference.scoring import Scoring

    stop = exam.renderer.stop_ids[-1]
    hits = [(np.zeros(3), np.array([1.0, 0.0, 1.0]), np.array([7, 8, stop]))]
    monkeypatch.setattr(Scoring, "choices", lambda *a: iter(hits))
    assert [m.value for m in Editing().evaluate(exam)] == [0.5, 0.5, 0.5]


def test_a_missing_column_is_named(exam_of):
    with pytest.raises(LuthierError, match="has no text in column rephrase"):
        Editing().evaluate(exam_of([{"prompt": "a", "completion": "b"}]))
