"""Measures: values by hand, and rows' parts that add up to them."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from scipy import stats
from sklearn.metrics import f1_score

from luthier.evaluation.calibration import binned
from luthier.evaluation.measures import (
    AGGREGATES,
    Measure,
    beside_base,
    change,
    corpus_statistics,
    interval,
    mean,
    ratio,
)

SAID = ["the cat sat on the mat", "a b c d e", "nothing in common", "the dog ran"]
REFERENCES = [("the cat sat on a mat", "on the mat sat a cat"), ("a b c d e",), ("zzz yyy",), ("a dog ran fast",)]


def keys(n):
    return tuple(map(str, range(n)))


def every_kind():
    draw = np.random.default_rng(0)
    labels = np.stack([draw.integers(0, 4, 30), draw.integers(0, 5, 30)], 1)
    bins = np.stack([binned(draw.random(6), draw.integers(0, 2, 6)) for _ in range(20)])
    return {
        "mean": mean("m", draw.random(12), keys(12)),
        "ratio": ratio("r", draw.random(9), draw.integers(1, 9, 9), keys(9)),
        "macro_f1": Measure("f", labels, keys(30), "macro_f1"),
        "calibration": Measure("c", bins, keys(20), "calibration"),
        **{n: Measure(n, corpus_statistics(n, SAID, REFERENCES), keys(4), n) for n in ("bleu", "chrf")},
    }


def test_every_aggregate_has_its_case():
    assert set(every_kind()) == set(AGGREGATES)


@pytest.mark.parametrize("kind", list(AGGREGATES))
def test_a_rows_part_is_what_leaving_it_out_takes_away(kind):
    measure = every_kind()[kind]
    n, parts = len(measure.keys), measure.pseudo_values()
    for i in range(n):
        rest = np.delete(np.arange(n), i)
        without = Measure(kind, measure.stats[rest], keys(n - 1), kind)
        assert parts[i] == pytest.approx(n * measure.value - (n - 1) * without.value, abs=1e-9)


def test_parts_of_a_mean_are_the_values():
    values = [0.0, 1.0, 1.0, 0.5]
    measure = mean("m", values, keys(4))
    assert measure.pseudo_values() == pytest.approx(values) and measure.value == 0.625


def test_parts_of_a_ratio_average_to_it_for_many_rows():
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 50, 2000)
    measure = ratio("loss", tokens * draw.gamma(2.0, 1.0, 2000), tokens, keys(2000))
    assert measure.pseudo_values().mean() == pytest.approx(measure.value, rel=1e-4)


def test_corpus_scores_are_sacrebleus():
    streams = [[r[0] for r in REFERENCES], [r[1] if len(r) > 1 else None for r in REFERENCES]]
    found = every_kind()
    assert found["bleu"].value == pytest.approx(BLEU().corpus_score(SAID, streams).score)
    assert found["chrf"].value == pytest.approx(CHRF().corpus_score(SAID, streams).score)


def test_macro_f1_is_scikit_learns():
    measure = every_kind()["macro_f1"]
    right, chosen = measure.stats.astype(int).T
    assert measure.value == pytest.approx(f1_score(right, chosen, average="macro"))


def test_calibration_by_hand():
    """Two bins: confidence 0.95 twice, right once; 0.35 once, wrong: (|1.9 - 1| + 0.35) / 3."""
    stats = np.stack([binned(np.array([0.95, 0.95]), np.array([1, 0])), binned(np.array([0.35]), np.array([0]))])
    assert Measure("c", stats, keys(2), "calibration").value == pytest.approx((0.9 + 0.35) / 3)
    sure = Measure("c", binned(np.array([1.0, 1.0]), np.array([1, 1]))[None], keys(1), "calibration")
    assert sure.value == 0.0


def test_a_measure_survives_its_plain_form():
    for measure in every_kind().values():
        again = Measure.from_dict(measure.as_dict())
        assert again.value == measure.value and again.keys == measure.keys and (again.stats == measure.stats).all()


def test_of_no_rows_nothing_is_known():
    assert np.isnan(mean("m", [], ()).value)


def test_the_interval_of_a_mean_is_students_and_of_answers_wilsons():
    values = [1.0, 2.0, 4.0]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert interval(mean("m", values, keys(3))) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    found = stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert interval(mean("m", [1, 1, 0, 1], keys(4))) == pytest.approx((found.low, found.high))
    assert interval(mean("m", [1.0], keys(1))) is None and interval(mean("m", [1.0, np.inf], keys(2))) is None


def test_a_change_is_paired_by_row():
    before, after = mean("m", [1.0, 5.0, 9.0], keys(3)), mean("m", [0.5, 4.0, 8.5], keys(3))
    by = change(before, after)
    paired = stats.ttest_rel([0.5, 4.0, 8.5], [1.0, 5.0, 9.0]).confidence_interval()
    assert (by.value, by.low, by.high) == pytest.approx((-2 / 3, paired.low, paired.high))
    assert change(before, mean("m", [0.5, 4.0, 8.5], ("x", "y", "z"))) is None
    assert change(mean("m", [1.0], keys(1)), mean("m", [2.0], keys(1))) is None
    told = beside_base(after, before)
    assert (told["value"], told["base"], told["rows"]) == (pytest.approx(13 / 3), 5.0, 3)
    assert told["change"] == pytest.approx({"value": -2 / 3, "low": paired.low, "high": paired.high})
    assert told["low"] == pytest.approx(interval(after)[0])
    alone = beside_base(after)
    assert (alone["base"], alone["change"]) == (None, None)


def test_the_change_of_a_ratio_is_the_difference_of_its_values():
    tokens, nats = np.array([3.0, 1.0, 8.0]), np.array([[6.0, 5.0, 9.0], [2.0, 1.0, 3.0]])
    before, after = (ratio("loss", n, tokens, keys(3)) for n in nats)
    assert beside_base(after, before)["change"]["value"] == pytest.approx((6 - 20) / 12)
