"""BLEU and chrF are sacrebleu's own, over the set."""

import pytest
from sacrebleu import corpus_bleu, corpus_chrf

from luthier.evaluation import Bleu


def test_equal_to_sacrebleu_with_several_references(exam_of):
    rows = [
        {"prompt": "x", "completion": "the cat sat on the mat today"},
        {"prompt": "x", "completion": "a cat was sitting on the mat"},
        {"prompt": "y", "completion": "dogs run in the big park"},
    ]
    said = {"x": "the cat sat on a mat", "y": "dogs run in a big park"}
    bleu, chrf = Bleu().evaluate(exam_of(rows, said))
    streams = [[rows[0]["completion"], rows[2]["completion"]], [rows[1]["completion"], None]]
    assert bleu.value == pytest.approx(corpus_bleu(list(said.values()), streams).score) and bleu.value > 10
    assert chrf.value == pytest.approx(corpus_chrf(list(said.values()), streams).score)


def test_the_right_answer_scores_a_hundred(exam_of):
    rows = [{"prompt": "x", "completion": "a long enough right answer"}]
    assert [m.value for m in Bleu().evaluate(exam_of(rows, {"x": rows[0]["completion"]}))] == pytest.approx([100, 100])
