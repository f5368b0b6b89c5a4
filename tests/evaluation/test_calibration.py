"""Calibration of tokens against a plain softmax over all logits."""

import numpy as np
import pytest
import torch

from luthier.data.batch import IGNORE
from luthier.evaluation import Calibration
from luthier.evaluation.measures import BINS


def test_tokens_against_a_plain_softmax(exam_of):
    exam = exam_of([{"prompt": f"p{i}", "completion": "answer " * (i + 1)} for i in range(5)])
    (measure,) = Calibration().evaluate(exam)
    gaps, count = np.zeros((BINS, 2)), 0
    for row in exam.rows:
        with torch.no_grad():
            logits = exam.view.module(input_ids=torch.tensor([row["ids"]])).logits[0, :-1].softmax(-1)
        for p, y in zip(logits, row["labels"][1:], strict=True):
            if y != IGNORE:
                top, best = p.max(-1)
                gaps[min(int(float(top) * BINS), BINS - 1)] += (float(top), float(best == y))
                count += 1
    assert measure.value == pytest.approx(np.abs(gaps[:, 0] - gaps[:, 1]).sum() / count, abs=1e-6)
    assert measure.stats[:, :BINS].sum() == count and not measure.higher
