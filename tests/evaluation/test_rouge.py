"""ROUGE by hand, and the best of several references."""

import pytest

from luthier.evaluation import Rouge


def test_by_hand_and_the_best_of_several(exam_of):
    rows = [{"prompt": "q", "completion": "the cat sat"}, {"prompt": "q", "completion": "a dog ran far"}]
    one, two, longest = Rouge().evaluate(exam_of(rows, {"q": "the cat ran"}))
    # against the first: two of three words, one of two pairs, a common sequence of two
    assert (one.value, two.value, longest.value) == pytest.approx((2 / 3, 1 / 2, 2 / 3))


def test_stems_count_where_asked_for(exam_of):
    rows = [{"prompt": "q", "completion": "running dogs"}]
    assert Rouge().evaluate(exam_of(rows, {"q": "run dog"}))[0].value == 0
    assert Rouge(stem=True).evaluate(exam_of(rows, {"q": "run dog"}))[0].value == 1
