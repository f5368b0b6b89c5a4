"""Membership and the bound on epsilon, on scores whose truth is known."""

import math

import numpy as np
import pytest

from luthier.collaboration.audit.membership import area, epsilon_low, membership


def responses(epsilon, count, seed=0):
    """Randomised response: each row's bit is told rightly with probability e^eps / (1 + e^eps); exactly eps-private."""
    generator, right = np.random.default_rng(seed), math.exp(epsilon) / (1 + math.exp(epsilon))
    member, other = generator.random(count) < right, generator.random(count) < 1 - right
    jitter = lambda x: x + 0.01 * generator.random(count)  # noqa: E731
    return jitter(member.astype(float)), jitter(other.astype(float))


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_the_bound_stays_under_the_true_epsilon_and_comes_near_with_many_rows(epsilon):
    bounds = [epsilon_low(*responses(epsilon, 500, seed), 0.0) for seed in range(200)]
    assert np.mean(np.array(bounds) > epsilon) <= 0.05
    assert epsilon_low(*responses(epsilon, 200_000), 0.0) == pytest.approx(epsilon, abs=0.1)


def test_looking_at_many_thresholds_is_paid_for():
    """Scores of nobody's: a bound above zero is an error, and must not come more often than one time in twenty."""
    generator = np.random.default_rng(0)
    above = [epsilon_low(*generator.normal(size=(2, 300)), 0.0) > 0 for _ in range(300)]
    assert np.mean(above) <= 0.05


def test_scores_that_tell_nothing_bound_nothing():
    generator = np.random.default_rng(0)
    found = membership(generator.normal(size=1000), generator.normal(size=1000))
    assert found.auc == pytest.approx(0.5, abs=0.03) and found.found < 0.03 and found.epsilon_low == 0.0
    assert not found.weak and membership(np.arange(499.0), np.arange(600.0)).weak


def test_the_area_counts_pairs_and_half_of_the_ties():
    """Four of the six pairs (1, 2, 3 above 0, 2) are in order and one is tied: 4.5 / 6."""
    assert area(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0])) == pytest.approx(4.5 / 6)


def test_scores_that_tell_all_are_found():
    found = membership(np.linspace(1, 2, 600), np.linspace(0, 0.9, 600))
    assert found.auc == 1.0 and found.found == 1.0 and found.epsilon_low > math.log(50)


def test_delta_is_taken_off():
    members, others = responses(2.0, 2000)
    bounds = [epsilon_low(members, others, d) for d in (0.0, 0.1, 0.5, 1.0)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[1] and bounds[-1] == 0.0


def test_scores_that_are_none_are_refused():
    for members, others in (([], [1.0]), ([1.0], [float("nan")])):
        with pytest.raises(ValueError, match="finite scores"):
            membership(np.array(members), np.array(others))
