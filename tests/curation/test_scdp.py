"""The exact checks of the sheet; numbers in names are the sheet's."""

import random

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from luthier.curation.random import Random
from luthier.curation.scdp import (
    Scdp,
    distances,
    geometric_median,
    strata_of,
    stratified,
    water_fill,
)
from luthier.data.mixture import quotas
from luthier.data.store import Row
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError

WORDS = "alpha beta gamma delta river stone cloud field green paper metal seven night glass horse table".split()  # noqa: SIM905


def rows(n, seed=0, labels=None):
    generator = random.Random(seed)
    out = []
    for i in range(n):
        text = " ".join(generator.choices(WORDS, k=generator.randint(2, 9)))
        out.append(Row(f"f:{i + 1}", {"text": text, **({"label": labels[i % len(labels)]} if labels else {})}))
    return out


def dense_median(x, eps=1e-5):
    """The textbook iteration on a dense matrix."""
    y = x.mean(0)
    while True:
        d = np.linalg.norm(x - y, axis=1)
        on = d == 0
        if on.all():
            return y
        w = np.where(on, 0, 1 / np.where(on, 1, d))
        t = (w[:, None] * x).sum(0) / w.sum()
        r = np.linalg.norm((t - y) * w.sum())
        c = on.sum() / r if r and on.any() else 0.0
        new = max(0, 1 - c) * t + min(1, c) * y
        if np.linalg.norm(y - new) < eps:
            return y
        y = new


def test_1_median():
    generator = np.random.default_rng(0)
    x = generator.random((40, 12)) * (generator.random((40, 12)) < 0.4)
    assert np.abs(geometric_median(csr_matrix(x)) - dense_median(x)).max() < 1e-9
    triangle = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    assert geometric_median(csr_matrix(triangle)) == pytest.approx(triangle.mean(0), abs=1e-5)
    line = np.arange(5.0)[:, None]
    assert geometric_median(csr_matrix(line)) == pytest.approx([2.0], abs=0)


def test_2_distance_identity_and_order():
    from sklearn.feature_extraction.text import TfidfVectorizer

    x = TfidfVectorizer().fit_transform([r.values["text"] for r in rows(200)])
    g = geometric_median(x)
    d = distances(x, g)
    assert np.abs(d**2 - (1 + g @ g - 2 * (x @ g))).max() < 1e-12
    assert (np.argsort(d, kind="stable") == np.argsort(-(x @ g), kind="stable")).mean() > 0.99


def test_3_the_rule_switches_on_the_kept_count():
    many = rows(3000)
    far = Scdp(keep_fraction=0.5).select(many, Lab())
    spread = Scdp(keep_fraction=0.501).select(many, Lab())
    assert len(far.keep) == 1500 and "rule far" in far.reason[0]
    assert len(spread.keep) == 1503 and "rule stratified" in spread.reason[0]
    assert far.score[far.keep].min() >= np.delete(far.score, far.keep).max()


def test_4_water_filling():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        sizes = generator.integers(0, 30, size=int(generator.integers(1, 100)))
        total = int(generator.integers(0, sizes.sum() + 1))
        budgets = water_fill(sizes, total)
        assert budgets.sum() == total and (budgets >= 0).all() and (budgets <= sizes).all()
    scores = generator.random(500)
    assert strata_of(scores)[scores.argmax()] == 99 and strata_of(scores).min() == 0


def test_5_stratified_draws_are_seeded_and_meet_their_budgets():
    scores = np.random.default_rng(1).normal(1, 0.1, 5000)
    a, b, c = (stratified(scores, 2000, np.random.default_rng(s)) for s in (0, 0, 1))
    assert len(a) == len(set(a.tolist())) == 2000 and np.array_equal(a, b) and not np.array_equal(a, c)
    sizes = np.bincount(strata_of(scores), minlength=100)
    for draw in (a, c):
        assert np.array_equal(np.bincount(strata_of(scores)[draw], minlength=100), water_fill(sizes, 2000))


def test_6_far_follows_its_rows():
    generator = random.Random(7)
    words = lambda: [f"w{int(generator.paretovariate(0.8))}" for _ in range(generator.randint(5, 30))]  # noqa: E731
    some = [Row(f"f:{i}", {"text": " ".join(words())}) for i in range(60)]
    kept = {some[i].key for i in Scdp(keep_fraction=0.3).select(some, Lab()).keep}
    order = random.Random(3).sample(range(60), 60)
    mixed = [some[i] for i in order]
    selection = Scdp(keep_fraction=0.3).select(mixed, Lab())
    scores = np.sort(selection.score)
    assert len(np.unique(scores.round(9))) == 60, "the check needs scores without ties"
    assert {mixed[i].key for i in selection.keep} == kept


def test_7_the_spread_of_distances_is_wider_than_a_random_subsets():
    generator = random.Random(0)
    some = []
    for i in range(6000):  # Zipf-like words, so that distances differ
        words = [f"w{int(generator.paretovariate(0.8))}" for _ in range(generator.randint(3, 40))]
        some.append(Row(f"f:{i}", {"text": " ".join(words)}))
    selection = Scdp(keep_fraction=0.3).select(some, Lab())

    def entropy(index):
        p = np.bincount(strata_of(selection.score)[index], minlength=100) / len(index)
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    for seed in range(3):
        uniform = np.random.default_rng(seed).choice(6000, 1800, replace=False)
        assert entropy(selection.keep) >= entropy(uniform) + 0.15


def test_class_balance_meets_largest_remainder_quotas():
    assert quotas(np.array([5, 3, 2]), 7).tolist() == [4, 2, 1]
    labelled = rows(300, labels=["a", "a", "b"])
    selection = Scdp(keep_fraction=0.3, class_balanced=True).select(labelled, Lab())
    kept = [labelled[i].values["label"] for i in selection.keep]
    assert kept.count("a") == 60 and kept.count("b") == 30


def test_bad_input():
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="keep_fraction"):
            Scdp(keep_fraction=value)
    with pytest.raises(RecipeError, match="keeps no example"):
        Scdp(keep_fraction=0.01).select(rows(10), Lab())
    with pytest.raises(RecipeError, match="hold no words"):
        Scdp(keep_fraction=0.5).select([Row("f:1", {"text": "a"}), Row("f:2", {"text": ""})], Lab())
    with pytest.raises(RecipeError, match="a row has no label"):
        Scdp(keep_fraction=0.5, class_balanced=True).select(rows(10), Lab())
    some = [*rows(20), Row("f:21", {"text": "x"})]
    assert 20 not in Scdp(keep_fraction=0.5).select(some, Lab()).keep


def test_random_keeps_its_share_by_key():
    some = rows(100)
    a, b = (Random(keep_fraction=0.3).select(some, Lab(seed=s)) for s in (0, 1))
    assert len(a.keep) == 30 and not np.array_equal(a.keep, b.keep)
    assert np.array_equal(a.keep, Random(keep_fraction=0.3).select(some, Lab()).keep)
    shuffled = random.Random(1).sample(some, 100)
    again = Random(keep_fraction=0.3).select(shuffled, Lab())
    assert {shuffled[i].key for i in again.keep} == {some[i].key for i in a.keep}
    assert len(Random(keep_fraction=1.0).select(some, Lab()).keep) == 100
    with pytest.raises(RecipeError, match="keeps none"):
        Random(keep_fraction=0.001).select(some, Lab())
