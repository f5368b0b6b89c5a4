"""Calibration: is the model right as often as it is sure?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import BINS, Measure
from luthier.method import Source


def binned(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n] confidences in [0, 1] and [n] hits -> [3 BINS]: how many, summed confidence, summed hits in ten equal bins."""
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    columns = [np.bincount(place, weights=w, minlength=BINS) for w in (np.ones(len(place)), confidence, right)]
    return np.concatenate(columns)


class Calibration(Evaluator):
    """Expected calibration error in ten equal bins: of classes, or of every supervised token's most likely word.

    It is 0 if the model is right as often as its own probability says. A model that is always unsure also has low values, so
    read it together with accuracy.
    Cost: one more forward pass over the rows.
    """

    source: ClassVar[Source] = Source("On Calibration of Modern Neural Networks", 2017, "arXiv:1706.04599", "eq. 3")

    def names(self) -> tuple[str, ...]:
        return ("calibration_error",)

    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        stats = np.stack([binned(confidence, right) for confidence, right in exam.confidences(exam.rows)])
        return [Measure("calibration_error", stats, exam.row_keys, aggregate="calibration", higher=False, unit="share")]
