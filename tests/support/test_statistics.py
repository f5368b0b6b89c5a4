"""Intervals cover what they say they cover; verdicts follow from them."""

import math

import numpy as np
import pytest
from scipy import stats

from luthier.support.statistics import Estimate, estimate, holm, verdict, wilson


@pytest.mark.parametrize(
    ("seed_sd", "row_sd", "both_sd"), [(1.0, 1.0, 1.0), (1.0, 0.1, 0.5), (0.05, 1.0, 0.5), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("shape", [(5, 60), (3, 40)])
def test_intervals_cover_the_truth_for_new_seeds_and_rows(seed_sd, row_sd, both_sd, shape):
    generator, truth, trials, hits = np.random.default_rng(0), 0.7, 4000, 0
    for _ in range(trials):
        seed = generator.normal(0, seed_sd, (shape[0], 1)) if seed_sd else 0.0
        row = generator.normal(0, row_sd, (1, shape[1])) if row_sd else 0.0
        found = estimate(truth + seed + row + generator.normal(0, both_sd, shape))
        hits += found.low <= truth <= found.high
    assert 0.94 < hits / trials < 0.995, "five seeds are not five hundred"


def test_one_way_is_the_textbook_t_interval():
    values = np.array([1.0, 2.0, 4.0, 4.5])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    for shape in ((1, 4), (4, 1)):
        found = estimate(values.reshape(shape))
        assert (found.low, found.high) == pytest.approx((low, high))
        assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_two_way_against_sums_of_squares_by_hand():
    d = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]])
    # grand 2.5; seed means 2, 3; row means 1.5, 3, 3: MS_seed 3 * 0.5 / 1, MS_row 2 * 1.5 / 2, MS_both 1 / 2
    found = estimate(d)
    assert found.se == pytest.approx(math.sqrt((1.5 + 1.5 - 0.5) / 6))
    half = math.sqrt((1.5 * stats.t.ppf(0.975, 1) ** 2 + 1.5 * stats.t.ppf(0.975, 2) ** 2 - 0.5 * 1.96**2) / 6)
    assert found.high - found.value == pytest.approx(half, rel=1e-3)


def test_equal_arms_have_an_interval_of_nothing():
    found = estimate(np.zeros((5, 20)))
    assert found[:3] == (0, 0, 0) and found.p_value == 1 and found.visible == 0
    assert estimate(np.full((5, 20), 0.1)).p_value == 0


def test_a_single_number_bounds_nothing():
    found = estimate(np.array([[0.3]]))
    assert found.low == -math.inf and found.high == math.inf and verdict(found) == "inconclusive"


@pytest.mark.parametrize(
    ("low", "high", "margin", "wanted"),
    [(0.01, 0.2, 0.0, "held"), (-0.1, 0.2, 0.0, "inconclusive"), (-0.3, -0.1, 0.0, "not held"), (0.1, 0.3, 0.2, "inconclusive"),
     (0.05, 0.2, 0.2, "not held"), (-0.1, 0.0, 0.0, "not held")],
)  # fmt: skip
def test_verdicts(low, high, margin, wanted):
    assert verdict(Estimate((low + high) / 2, low, high, 0.1, 4), margin) == wanted


def test_the_visible_effect_is_seen_four_times_in_five():
    generator, seeds, rows = np.random.default_rng(1), 5, 80
    draw = lambda mean: mean + generator.normal(0, 0.3, (seeds, 1)) + generator.normal(0, 1, (seeds, rows))  # noqa: E731
    effect = float(np.mean([estimate(draw(0.0)).visible for _ in range(300)]))
    seen = np.mean([verdict(estimate(draw(effect))) == "held" for _ in range(800)])
    assert 0.7 < seen < 0.92


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5] and holm([]) == []


def test_wilson_by_the_sheet():
    assert wilson(45, 50) == pytest.approx((0.786, 0.957), abs=1e-3)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        estimate(np.array([[1.0, math.nan]]))
