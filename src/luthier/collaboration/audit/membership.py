"""Audit D: can an observer tell which rows the model was tuned on? And what is the smallest possible epsilon?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

FEW = 500  # with fewer rows of each kind, a bound says little
CONFIDENCE = 0.95


class Membership(NamedTuple):
    """auc        probability that a tuned row looks more like a tuned row than a held-out row does
    found       share of tuned rows found at a false-positive rate of 1%
    epsilon_low lower bound on epsilon with 95% confidence: no smaller epsilon can be claimed
    members, others  rows compared
    """

    auc: float
    found: float
    epsilon_low: float
    members: int
    others: int

    @property
    def weak(self) -> bool:
        """Whether there are too few rows to call anything safe."""
        return min(self.members, self.others) < FEW


def membership(members: np.ndarray, others: np.ndarray, delta: float = 0.0) -> Membership:
    """Compare scores that are larger for rows that were tuned on, for example how much the loss of each row fell.

    Raises ValueError for scores that are not finite, or if there are none.
    """
    members, others = np.asarray(members, float), np.asarray(others, float)
    if not len(members) or not len(others) or not np.isfinite(members).all() or not np.isfinite(others).all():
        raise ValueError("membership needs finite scores of rows that were tuned on, and of rows that were not")
    threshold = np.quantile(others, 0.99, method="higher")
    found = float((members > threshold).mean())
    return Membership(area(members, others), found, epsilon_low(members, others, delta), len(members), len(others))


def area(above: np.ndarray, below: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a score of `above` exceeds one of `below`; a tie counts half."""
    below = np.sort(below)
    beaten, not_above = (np.searchsorted(below, above, side) for side in ("left", "right"))
    return float((beaten + not_above).mean() / (2 * len(below)))


def epsilon_low(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray, delta: float) -> float:
    """max over thresholds of ln((TPR_low - delta) / FPR_high), with one-sided Clopper-Pearson bounds; never below 0.

    Each threshold is a test, so the confidence is shared among the thresholds (Bonferroni). Departs from the sheet, which
    gives every bound its whole 95%: then 8 to 10 in 100 uninformative scores had a bound above zero (measured).
    """
    members, others = np.sort(np.asarray(members, float)), np.sort(np.asarray(others, float))
    thresholds = np.unique(np.quantile(others, np.linspace(0, 1, 33)))
    error = (1 - CONFIDENCE) / (2 * len(thresholds))
    hits = len(members) - np.searchsorted(members, thresholds, "right")  # scores above each threshold
    false = len(others) - np.searchsorted(others, thresholds, "right")
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), len(members) - hits + 1, error), 0.0)
    high = np.where(false < len(others), betaincinv(false + 1, np.maximum(len(others) - false, 1), 1 - error), 1.0)
    best = float(((low - delta) / high).max())
    return math.log(best) if best > 1 else 0.0
