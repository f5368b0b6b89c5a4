"""The random baseline: how many, evenly, by seed and by the row's own key."""

import numpy as np
import pytest

from luthier.curation import Random
from luthier.data.store import Row
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError


def rows(n, start=0):
    return [Row(f"f:{i}", {"text": str(i)}) for i in range(start, start + n)]


def kept(count, share, seed=0, start=0):
    some = rows(count, start)
    return {some[i].key for i in Random(keep_fraction=share).select(some, Lab(seed=seed)).keep}


def test_the_count_is_the_share_rounded_down_and_the_order_is_kept():
    chosen = Random(keep_fraction=0.37).select(rows(100), Lab())
    assert len(chosen.keep) == 37 and (np.diff(chosen.keep) > 0).all()
    assert chosen.reason.count("drawn") == 37 and len(chosen.score) == 100
    assert kept(10, 1.0) == {f"f:{i}" for i in range(10)}


def test_same_seed_same_rows_another_seed_others():
    assert kept(200, 0.5) == kept(200, 0.5) != kept(200, 0.5, seed=1)


def test_smaller_shares_are_subsets_and_other_rows_do_not_reorder_these():
    assert kept(200, 0.2) < kept(200, 0.5)
    draws = Random(keep_fraction=0.5).select(rows(50), Lab()).score
    more = Random(keep_fraction=0.5).select(rows(80)[::-1], Lab()).score
    assert (draws == more[::-1][:50]).all()


def test_every_row_is_as_likely():
    counts = np.zeros(20)
    for seed in range(400):
        for key in kept(20, 0.25, seed):
            counts[int(key[2:])] += 1
    assert counts.min() > 65 and counts.max() < 135, "100 expected, within four standard deviations"


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_bad_shares_are_named(share):
    with pytest.raises(ValueError, match="keep_fraction"):
        Random(keep_fraction=share)


def test_a_share_that_keeps_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"random\.keep_fraction: 0.05 of 10 rows keeps none"):
        Random(keep_fraction=0.05).select(rows(10), Lab())
