"""The exact checks of the sheet; numbers in names are the sheet's."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from luthier.curation.scdp import (
    Scdp,
    distances,
    farthest,
    geometric_median,
    squares,
    strata_of,
    stratified,
    water_fill,
)
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


def dense_step(x, y):
    """One step of the textbook iteration on a dense matrix."""
    d = np.linalg.norm(x - y, axis=1)
    away = x[d > 1e-12]
    if not len(away):
        return y
    w = 1 / d[d > 1e-12]
    t = (w[:, None] * away).sum(0) / w.sum()
    r = np.linalg.norm(((away - y) * w[:, None]).sum(0))
    c = (len(x) - len(away)) / r if r else 0.0
    return max(0, 1 - c) * t + min(1, c) * y


def dense_median(x, eps=1e-5):
    y = x.mean(0)
    while np.linalg.norm(y - (new := dense_step(x, y))) >= eps:
        y = new
    return y


def test_1_median():
    generator = np.random.default_rng(0)
    x = generator.random((40, 12)) * (generator.random((40, 12)) < 0.4)
    assert np.abs(geometric_median(csr_matrix(x))[0] - dense_median(x)).max() < 1e-9
    triangle = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
    assert geometric_median(csr_matrix(triangle))[0] == pytest.approx(triangle.mean(0), abs=1e-5)
    line = np.arange(5.0)[:, None]
    assert geometric_median(csr_matrix(line))[0] == pytest.approx([2.0], abs=0)


def test_1_the_median_on_rows_that_coincide():
    """Where the point is on a row of the set, it stays if they pull at least as strongly as all others together."""
    ends = [(1.0, 0.0)] * 2 + [(-1.0, 15**0.5), (-1.0, -(15**0.5))]  # unit vectors that sum to 1.5; their mean is 0
    for count, stays, at in ((n, n > 1, at) for n in (1, 2, 3) for at in ((0.0, 0.0), (8.0, -4.0))):
        x = np.array([(0.0, 0.0)] * count + ends) + at
        g, _ = geometric_median(csr_matrix(x), eps=1e-9, max_iter=5000)
        assert (np.abs(g - at).max() < (1e-12 if at == (0.0, 0.0) else 1e-6)) == stays, count
        one, _ = geometric_median(csr_matrix(x), eps=0.0, max_iter=1)
        np.testing.assert_allclose(one, dense_step(x, x.mean(0)), atol=1e-12)
        assert total(x, g) <= least(x) + 1e-7


def total(x, g):
    return np.linalg.norm(x - g, axis=1).sum()


def least(x):
    """The smallest sum of distances that another minimiser finds, from several starts; rows are candidates too."""
    starts = [x.mean(0), x.mean(0) + 0.1, np.median(x, 0)]
    found = [minimize(lambda g: total(x, g), s, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).fun
             for s in starts]  # fmt: skip
    return min(*found, *(total(x, row) for row in x))


def test_1_no_other_point_is_nearer_to_all_rows():
    generator = np.random.default_rng(3)
    for _ in range(5):
        x = generator.normal(size=(9, 3)) * (generator.random((9, 3)) < 0.7)
        x[:3] = x[0]  # rows that coincide
        assert total(x, geometric_median(csr_matrix(x), eps=1e-9, max_iter=5000)[0]) <= least(x) + 1e-6


def test_1_it_says_where_it_has_not_settled(caplog):
    x = np.random.default_rng(0).random((10, 4))
    _, iterations = geometric_median(csr_matrix(x), max_iter=1)
    assert iterations == 1 and "had not settled after 1 iterations" in caplog.text


def naive(texts):
    """([N, V] float64 TF-IDF rows of length 1, [V] their geometric median), by plain counting."""
    bags = [Counter(re.findall(r"\w\w+", t.lower())) for t in texts]
    words = sorted(set().union(*bags))
    df = np.array([sum(w in bag for bag in bags) for w in words])
    x = np.array([[bag[w] for w in words] for bag in bags]) * (np.log((1 + len(bags)) / (1 + df)) + 1)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    return x, dense_median(x)


def test_2_distances_are_those_of_plain_counting():
    """What a selection ranks by, made from texts in single precision, against dense double precision."""
    some = [*rows(200), Row("f:201", {"text": "a ! b"}), Row("f:202", {"text": "Alpha ALPHA alpha, beta"})]
    x, g = naive([r.values["text"] for r in some])
    d = Scdp(keep_fraction=0.5).select(some, Lab()).score
    assert np.abs(d - np.linalg.norm(x - g, axis=1)).max() < 2e-6
    worded = np.arange(len(some)) != 200
    assert d[200] == pytest.approx(np.linalg.norm(g), abs=2e-6), "a row without a word is as far as the median is long"
    assert np.abs(d**2 - (1 + g @ g - 2 * (x @ g)))[worded].max() < 5e-6
    order, near = np.argsort(d[worded], kind="stable"), (x @ g)[worded]
    assert (np.diff(near[order]) < 2e-6).all(), "the order of distances is the reverse of that of x g"


def test_the_ledger_counts_two_products_an_iteration():
    some = rows(60)
    x, _ = naive([r.values["text"] for r in some])
    _, iterations = geometric_median(csr_matrix(x.astype(np.float32)))
    assert iterations > 1
    lab = Lab()
    Scdp(keep_fraction=0.5).select(some, lab)
    assert lab.ledger.flops == {"curate": 2 * (x > 0).sum() * (2 * iterations + 3)}


def test_rows_are_squared_block_by_block():
    x = np.random.default_rng(0).normal(size=(11, 3))
    assert np.allclose(squares(csr_matrix(x), block=4), (x**2).sum(1))


def test_a_row_is_at_no_distance_from_itself_whatever_rounding_says():
    x = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    own = [distances(csr_matrix(r[None]), r.astype(np.float64))[0] for r in x]
    assert np.isfinite(own).all() and max(own) < 1e-3


def test_3_the_rule_switches_on_the_kept_count():
    many = rows(3000)
    far = Scdp(keep_fraction=0.5).select(many, Lab())
    spread = Scdp(keep_fraction=0.501).select(many, Lab())
    assert len(far.keep) == 1500 and "rule far" in far.reason[0]
    assert len(spread.keep) == 1503 and "rule stratified" in spread.reason[0]
    assert far.score[far.keep].min() >= np.delete(far.score, far.keep).max()
    inside = set(far.keep.tolist())
    assert [r.startswith("kept") for r in far.reason] == [i in inside for i in range(3000)]
    between = Scdp(keep_fraction=0.5002).select(many, Lab())  # 1500.6 rows: above the switch before it is cut
    assert len(between.keep) == 1500 and "rule stratified" in between.reason[0]
    assert len(Scdp(keep_fraction=0.5).select(many[:11], Lab()).keep) == 5


def test_an_even_draw_takes_rows_without_a_word_like_any_other():
    many = [*rows(3001), Row("f:0", {"text": "!"})]
    chosen = Scdp(keep_fraction=0.6).select(many, Lab())
    assert len(chosen.keep) == 1801 and "rule stratified" in chosen.reason[0]
    # It lies nearest to the median, alone in its stratum, and strata smaller than their share are taken whole.
    assert strata_of(chosen.score).tolist().count(0) == 1 and chosen.score.argmin() == 3001 and 3001 in chosen.keep


def test_only_the_commonest_words_are_counted_where_that_is_asked():
    some = rows(80)
    texts = [r.values["text"] for r in some]
    counted = Counter(" ".join(texts).split()).most_common()
    assert counted[4][1] > counted[5][1]
    kept = {w for w, _ in counted[:5]}
    x, g = naive([" ".join(w for w in t.split() if w in kept) for t in texts])
    d = Scdp(keep_fraction=0.5, max_features=5).select(some, Lab()).score
    assert np.abs(d - np.linalg.norm(x - g, axis=1)).max() < 2e-6


def test_4_water_filling():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        sizes = generator.integers(0, 30, size=int(generator.integers(1, 100)))
        total = int(generator.integers(0, sizes.sum() + 1))
        budgets = water_fill(sizes, total)
        assert budgets.sum() == total and (budgets >= 0).all() and (budgets <= sizes).all()
    scores = generator.random(500)
    assert strata_of(scores)[scores.argmax()] == 99 and strata_of(scores).min() == 0


def test_4_no_stratum_gets_more_than_another_that_has_rows_left():
    generator = np.random.default_rng(1)
    for _ in range(200):
        sizes = generator.integers(0, 30, size=int(generator.integers(2, 100)))
        budgets = water_fill(sizes, int(generator.integers(0, sizes.sum() + 1)))
        left = budgets < sizes
        if left.any():
            assert budgets.max() - budgets[left].min() <= 1, "those with rows left are level, and nobody is above them"


def test_4_what_does_not_divide_goes_to_the_strata_visited_last():
    assert water_fill(np.array([5, 5, 5]), 7).tolist() == [2, 2, 3]
    assert water_fill(np.array([9, 1, 9]), 10).tolist() == [4, 1, 5]


def test_the_farthest_of_equal_distance_are_the_first():
    scores = np.array([1.0, 3.0, 3.0, 2.0])
    assert [farthest(scores, n).tolist() for n in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]


def test_4_strata_are_of_equal_width_from_the_least_to_just_above_the_largest():
    generator = np.random.default_rng(2)
    for _ in range(200):
        scores = generator.normal(1.0, 0.05, size=int(generator.integers(1, 60)))
        low, step = min(scores), (1.0001 * max(scores) - min(scores)) / 100
        by_hand = [next(k for k in range(100) if s < low + (k + 1) * step) for s in scores]
        assert strata_of(scores).tolist() == by_hand
    assert strata_of(np.zeros(3)).tolist() == [0, 0, 0], "no width at all"


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
    labelled = rows(300, labels=["a", "a", "b"])
    selection = Scdp(keep_fraction=0.3, class_balanced=True).select(labelled, Lab())
    kept = [labelled[i].values["label"] for i in selection.keep]
    assert kept.count("a") == 60 and kept.count("b") == 30
    inside = np.isin(np.arange(300), selection.keep)
    for name in "ab":  # the farthest of each class
        mine = np.array([r.values["label"] == name for r in labelled])
        assert selection.score[mine & inside].min() >= selection.score[mine & ~inside].max()


def test_an_even_draw_within_each_class():
    labelled = rows(4000, labels=["a", "a", "a", "b"])
    selection = Scdp(keep_fraction=0.5, class_balanced=True).select(labelled, Lab())
    assert "rule stratified" in selection.reason[0]
    for name, quota in (("a", 1500), ("b", 500)):
        mine = np.array([i for i, r in enumerate(labelled) if r.values["label"] == name])
        strata, kept = strata_of(selection.score[mine]), np.isin(mine, selection.keep)
        wanted = water_fill(np.bincount(strata, minlength=100), quota)
        assert np.array_equal(np.bincount(strata[kept], minlength=100), wanted)


def test_a_class_without_a_quota_is_named(caplog):
    labelled = [*rows(20, labels=["a"]), Row("f:21", {"text": "odd one", "label": "b"})]
    kept = Scdp(keep_fraction=0.3, class_balanced=True).select(labelled, Lab()).keep
    assert 20 not in kept and "class 'b' keeps no row" in caplog.text


def test_bad_input():
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="keep_fraction"):
            Scdp(keep_fraction=value)
    with pytest.raises(RecipeError, match=r"scdp\.keep_fraction: 0.01 of 10 rows keeps none"):
        Scdp(keep_fraction=0.01).select(rows(10), Lab())
    with pytest.raises(RecipeError, match="hold no words"):
        Scdp(keep_fraction=0.5).select([Row("f:1", {"text": "a"}), Row("f:2", {"text": ""})], Lab())
    with pytest.raises(RecipeError, match="a row has no label"):
        Scdp(keep_fraction=0.5, class_balanced=True).select([*rows(10, labels=["a"]), *rows(1)], Lab())
    some = [*rows(20), Row("f:21", {"text": "x"})]
    assert 20 not in Scdp(keep_fraction=0.5).select(some, Lab()).keep
    alike = [*(Row(f"f:{i}", {"text": "alpha"}) for i in range(20)), Row("f:21", {"text": "x"})]
    chosen = Scdp(keep_fraction=0.05).select(alike, Lab())
    assert chosen.score.argmax() == 20 and chosen.keep.tolist() == [0], "the farthest has no direction"
