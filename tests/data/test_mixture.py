"""Several sources: shares by hand, rows by seed, source and epoch."""

import json
from collections import Counter

import numpy as np
import pytest

from luthier import recipe
from luthier.data.mixture import Mix, Mixture, Origin, drawn, quotas, shares
from luthier.data.reading import ANSWERED
from luthier.run.rows import training_rows
from luthier.step.order import Order
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams


def keys(*sizes):
    return [f"f{i}:{n + 1}" for i, size in enumerate(sizes) for n in range(size)]


def mixture(sizes, weights=None, temperature=1.0):
    origins = tuple(Origin(f"s{i}", (f"f{i}",), w) for i, w in enumerate(weights or [1.0] * len(sizes)))
    return Mixture.of(keys(*sizes), Mix(origins, temperature))


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "expected"),
    [
        ([300, 100], [1, 1], 1.0, [0.75, 0.25]),
        ([300, 100], [1, 3], 1.0, [0.5, 0.5]),
        ([900, 100], [1, 1], 2.0, [0.75, 0.25]),  # 30 to 10
        ([800, 100], [1, 1], 3.0, [2 / 3, 1 / 3]),  # cube roots: 2 to 1 times that of 100
        ([100, 100], [4, 1], 2.0, [2 / 3, 1 / 3]),
        ([900, 100], [1, 1], 0.5, [81 / 82, 1 / 82]),
        ([1000, 999], [1, 1], 0.001, [1 / (1 + 0.999**1000), 1 / (1 + 0.999**-1000)]),  # 1000^1000 is no float
    ],
)
def test_shares_by_hand(sizes, weights, temperature, expected):
    assert shares(sizes, weights, temperature) == pytest.approx(expected)
    total = sum(sizes)
    mixed = mixture(sizes, weights, temperature)
    assert sum(mixed.draws) == total and np.abs(np.array(mixed.draws) - total * np.array(expected)).max() < 1
    assert [s["share"] for s in mixed.table()] == [n / total for n in mixed.draws]


def test_equal_weights_are_plain_concatenation_to_the_bit():
    for sizes in ((7,), (5, 3), (1, 1, 1), (40, 999, 3)):
        mixed = mixture(sizes)
        assert mixed.draws == sizes
        for epoch in range(3):
            assert np.array_equal(mixed.epoch(epoch, Streams(epoch)), np.arange(sum(sizes)))
    plain, mixed = (Order(8, 3, 2.0, None, 5, True, m) for m in (None, mixture((5, 3))))
    assert [plain.rows(s) for s in range(plain.total)] == [mixed.rows(s) for s in range(mixed.total)]


def test_an_epoch_has_as_many_rows_as_there_are_and_the_shares_asked_for():
    mixed = mixture((90, 10), (1.0, 9.0))
    rows = mixed.epoch(0, Streams(0))
    assert len(rows) == 100 and (rows < 90).sum() == 50 and (np.diff(rows) >= 0).all()
    counts = Counter(rows.tolist())
    assert (
        max(counts.values()) == 5
        and all(counts[i] == 5 for i in range(90, 100))
        and max(counts[i] for i in range(90)) == 1
    )


def test_no_row_comes_twice_before_all_have_come_once():
    """4 rows, 6 draws an epoch: two epochs are three passes. 5 rows, 2 draws: five epochs are two passes."""
    two = np.concatenate([drawn(4, 6, e, Streams(0), "s") for e in range(2)])
    assert Counter(two.tolist()) == dict.fromkeys(range(4), 3)
    assert set(drawn(4, 6, 0, Streams(0), "s").tolist()) == set(range(4))
    parts = [drawn(5, 2, e, Streams(0), "s") for e in range(5)]
    assert all(len(p) == 2 for p in parts) and Counter(np.concatenate(parts).tolist()) == dict.fromkeys(range(5), 2)
    assert len(set(np.concatenate(parts[:2]).tolist())) == 4


def test_draws_follow_seed_source_and_epoch_and_nothing_else():
    first = drawn(50, 20, 3, Streams(1), "a.jsonl").tolist()
    drawn(50, 20, 0, Streams(1), "a.jsonl")
    assert drawn(50, 20, 3, Streams(1), "a.jsonl").tolist() == first
    others = [
        drawn(50, 20, 3, Streams(2), "a.jsonl"),
        drawn(50, 20, 3, Streams(1), "b"),
        drawn(50, 20, 4, Streams(1), "a.jsonl"),
    ]
    assert all(o.tolist() != first for o in others)
    alone, beside = mixture((50, 50), (1.0, 1.0)), mixture((50, 50), (1.0, 3.0))
    assert alone.epoch(0, Streams(0)).tolist() == list(range(100)) != beside.epoch(0, Streams(0)).tolist()


def test_an_order_draws_every_epoch_anew_and_resumes_by_asking():
    order = Order(20, 6, 3.0, None, 0, True, mixture((16, 4), (1.0, 4.0)))
    steps = [order.rows(s) for s in range(order.total)]
    assert order.total == 12 and [len(s) for s in steps] == [6, 6, 6, 2] * 3
    epochs = [sum(steps[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sum(i < 16 for i in e) == 10 for e in epochs)
    assert len({tuple(sorted(e)) for e in epochs}) == 3
    assert Order(20, 6, 3.0, None, 0, True, mixture((16, 4), (1.0, 4.0))).rows(9) == steps[9]
    straight = Order(20, 6, 1.0, None, 0, False, mixture((16, 4), (1.0, 4.0)))
    assert sum((straight.rows(s) for s in range(4)), []) == sorted(epochs[0])


def test_rows_that_curators_made_are_a_source_of_their_own():
    origins = (Origin("a", ("f0",), 1.0), Origin("b", ("f1",), 2.0))
    mixed = Mixture.of([*keys(4, 2), "s3ft:1", "s3ft:2"], Mix(origins))
    assert mixed.names == ("a", "b", "made while curating") and [len(m) for m in mixed.members] == [4, 2, 2]
    assert mixed.draws == (3, 3, 2)  # 4 to 4 to 2 of 8 rows: 3.2, 3.2, 1.6
    gone = Mixture.of(keys(0, 3), Mix(origins))
    assert gone.names == ("b",) and gone.draws == (3,)


def test_quotas_go_by_largest_remainder():
    assert quotas(np.array([5, 3, 2]), 7).tolist() == [4, 2, 1]


def test_a_source_that_would_not_be_drawn_is_refused():
    with pytest.raises(RecipeError, match=r"data\.train: s1 would not be drawn from"):
        mixture((100, 10), (1.0, 0.001))


# --- from a recipe ---


def put(folder, name, n, **more):
    lines = [{"prompt": f"{name} {i}", "completion": "x", **more} for i in range(n)]
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in lines))


def test_sources_are_read_with_their_own_settings_and_named_by_file_and_line(tmp_path):
    put(tmp_path, "a.jsonl", 6)
    (tmp_path / "b.csv").write_text("q,completion\none,1\ntwo,2\n")
    loaded = recipe.load(
        "model: a/b\ndata:\n  limit: 5\n  train:\n    - {path: a.jsonl, weight: 2}\n"
        "    - {path: b.csv, columns: {prompt: q}, limit: 1}\n"
    )
    rows, skipped, mix = training_rows(loaded.data, tmp_path, ANSWERED)
    assert [r.key.removeprefix(f"{tmp_path}/") for r in rows] == [*(f"a.jsonl:{i}" for i in range(1, 6)), "b.csv:2"]
    assert rows[5].values["prompt"] == "one" and not skipped
    assert [(o.name, o.weight) for o in mix.origins] == [("a.jsonl", 2.0), ("b.csv", 1.0)]
    assert recipe.load(json.dumps(loaded.as_dict())) == loaded
    one = recipe.load("model: a/b\ndata: {train: a.jsonl}")
    rows, _, mix = training_rows(one.data, tmp_path, ANSWERED)
    assert mix is None and len(rows) == 6 and len(rows.parts) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "train: [{path: a.jsonl, wieght: 2}]",
            r":2: data\.train\.0\.wieght: there is no such key; did you mean weight\?",
        ),
        ("train: [{path: a.jsonl}, {weight: 2}]", r"data\.train\.1\.path: is missing"),
        ("train: [{path: a.jsonl, weight: 0}]", r"data\.train\.0\.weight: 0: input should be greater than 0"),
        ("train: []", r"data\.train: \[\]: "),
        ("train: 3", r"data\.train: 3: input should be a valid string"),
        ("train: [a.jsonl]", r"data\.train\.0: is 'a\.jsonl', where keys belong; write \{path: a\.jsonl\}"),
        ("train: a.jsonl, temperature: 2", r"data\.temperature: mixes several sources; list them in data\.train"),
    ],
)
def test_a_bad_list_of_sources_is_named(data, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(f"model: a/b\ndata: {{{data}}}")


def test_the_same_rows_twice_are_refused(tmp_path):
    put(tmp_path, "a.jsonl", 2)
    loaded = recipe.load("model: a/b\ndata: {train: [{path: a.jsonl}, {path: a.jsonl, weight: 2}]}")
    with pytest.raises(RecipeError, match=r"data\.train\.1: a\.jsonl is named twice"):
        training_rows(loaded.data, tmp_path, ANSWERED)
