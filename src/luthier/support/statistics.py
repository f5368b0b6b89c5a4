"""Is one arm better than another? Paired intervals over seeds and rows, and verdicts that say what could have been seen.

A difference D[s, r] of two arms under the same seed s and on the same row r has three sources of spread: the seed, the
row, and both together. Its grand mean gets the interval of a two-way layout with random rows and columns, so that five
seeds are not taken for five hundred, nor rows for seeds.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8  # with which the smallest visible effect would have been seen
Outcome = Literal["held", "not held", "inconclusive"]


class Estimate(NamedTuple):
    """A mean with its interval. Where nothing varies that could be sampled again, low = high = value and se = 0.

    se    standard error; df  degrees of freedom of its t distribution
    """

    value: float
    low: float
    high: float
    se: float
    df: float

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference; 1 where the value is 0, 0 where it is not and nothing varies."""
        if self.se == 0:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / self.se, self.df))

    @property
    def visible(self) -> float:
        """The smallest effect that a comparison of this size sees with a chance of 80%."""
        if self.se == 0:
            return 0.0
        return (_t(self.df) + float(stats.t.ppf(POWER, self.df))) * self.se


def estimate(values: np.ndarray) -> Estimate:
    """Mean of values [S, R] over seeds S and rows R, with a 95% interval for new seeds and new rows.

    One seed: the interval is over rows alone; one row (a measure without rows): over seeds alone; one number: an
    interval without bounds, since nothing is known of its spread.
    Raises ValueError for values that are not finite.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    seeds, rows = values.shape
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, -math.inf, math.inf, math.inf, 1.0)
    se, df = _one_way(values) if 1 in (seeds, rows) else _two_way(values)
    half = _t(df) * se if se else 0.0
    return Estimate(mean, mean - half, mean + half, se, df)


def _one_way(values: np.ndarray) -> tuple[float, float]:
    flat = values.ravel()
    return float(flat.std(ddof=1)) / math.sqrt(len(flat)), len(flat) - 1.0


def _two_way(values: np.ndarray) -> tuple[float, float]:
    """(standard error of the grand mean, effective degrees of freedom) under random seeds and random rows.

    Var = (MS_seed + MS_row - MS_both) / (S R), where each mean square is stretched by its own t quantile before they are
    put together (MOVER, Zou and Donner 2008). With Satterthwaite's degrees of freedom instead, intervals over three seeds
    covered 91.5% where 95% was said; so they cover 94.7% and more (tests/support/test_statistics.py).
    """
    s, r = values.shape
    grand, by_seed, by_row = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_row[None, :] + grand
    squares = (
        (r * float(((by_seed - grand) ** 2).sum()) / (s - 1), s - 1.0),
        (s * float(((by_row - grand) ** 2).sum()) / (r - 1), r - 1.0),
        (float((rest**2).sum()) / ((s - 1) * (r - 1)), math.inf),
    )
    plain, stretched = _together(*(ms for ms, _ in squares)), _together(*(ms * _t(df) ** 2 for ms, df in squares))
    if plain <= 1e-24 * max(grand**2, 1e-300) * s * r:  # rounding
        return 0.0, r - 1.0
    return math.sqrt(plain / (s * r)), _df_of(math.sqrt(stretched / plain))


def _together(seed: float, row: float, both: float) -> float:
    """Never below what one source alone explains."""
    return max(seed + row - both, seed, row)


@lru_cache(maxsize=4096)
def _t(df: float) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df))


@cache
def _quantiles() -> tuple[np.ndarray, np.ndarray]:
    """(97.5% points, ascending; their degrees of freedom)."""
    df = np.geomspace(1e6, 0.9, 2000)
    return stats.t.ppf((1 + CONFIDENCE) / 2, df), df


def _df_of(quantile: float) -> float:
    """The degrees of freedom whose 97.5% point this is, to 1%."""
    return float(np.interp(quantile, *_quantiles()))


def verdict(difference: Estimate, margin: float = 0.0) -> Outcome:
    """The verdict on the claim "larger by more than `margin`".

    Held where the whole interval lies above the margin, not held where it lies at or below.
    """
    if difference.low > margin:
        return "held"
    return "not held" if difference.high <= margin else "inconclusive"


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = worst
    return out


def wilson(right: float, of: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, p = float(stats.norm.ppf((1 + CONFIDENCE) / 2)), right / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
