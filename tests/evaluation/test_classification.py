"""Accuracy and macro F1 of chosen classes."""

import pytest

from luthier import tasks
from luthier.evaluation import Calibration, Classification
from luthier.evaluation.base import Exam
from luthier.step.lab import RowScore


class Chosen(Exam):
    @property
    def scored(self):
        return [RowScore(0.1, 1.0, (c,)) for c in (0, 0, 1, 1, 2)]


def test_by_hand():
    rows = [{"key": f"x:{i}", "row": {"label": y}} for i, y in enumerate([0, 1, 1, 1, 2])]
    accuracy, f1 = Classification().evaluate(Chosen(None, None, tasks.Classification(), rows))
    assert accuracy.value == 0.8 and accuracy.judges
    assert f1.value == pytest.approx((2 / 3 + 0.8 + 1) / 3)  # 2 * 1 / (1 + 2), 2 * 2 / (3 + 2), 1


def test_of_no_rows_nothing_is_measured():
    exam = Exam(None, None, tasks.Classification())
    assert Classification().evaluate(exam) == Calibration().evaluate(exam) == []
