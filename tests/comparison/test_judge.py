"""Standings from finished runs' rows: paired differences, verdicts, the frontier."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from luthier.comparison.judge import Level, Standing, difference, frontier, judged
from luthier.comparison.page import _forgotten, lead
from luthier.comparison.plan import checked
from luthier.comparison.steps import Done, Job
from luthier.evaluation.base import Results
from luthier.evaluation.measures import mean, ratio
from luthier.support.statistics import Estimate, estimate

ROWS = tuple(map(str, range(30)))


def run_of(folder, values, name="exact_match"):
    folder.mkdir(parents=True)
    for which, x in (("after", values), ("before", np.zeros(len(values)))):
        results = Results({name: mean(name, x, ROWS[: len(x)])}, [])
        (folder / f"{which}.json").write_text(json.dumps(results.as_dict()))
    return folder


def compared(tmp_path, arms, tried=(), **more):
    plan = checked({"recipe": {}, "arms": {a: {} for a in arms}, "primary": "exact_match", **more}, "p")
    results = {a: {s: run_of(tmp_path / a / str(s), v) for s, v in enumerate(seeds)} for a, seeds in arms.items()}
    done = {}
    for a, seeds in arms.items():
        for s in range(len(seeds)):
            job = Job(a, f"seed-{s}", 1e-3, s, 10)
            done[job.name] = Done(job, 100.0, 2.0, 10, 50.0, update_bytes=7.0)
    for i, rate in enumerate(tried):
        job = Job("base", f"trial-{i}", rate, 0, 4)
        done[job.name] = Done(job, 10.0, 0.5, 4, 20.0, value=-1.0)
    return judged(plan, results, done)


def draws(shift, seeds=5, spread=0.1, rows=30, seed=0):
    generator = np.random.default_rng(seed)
    hard = generator.normal(0, 1, rows)  # rows differ far more than arms do
    return [hard + shift + generator.normal(0, spread, rows) for _ in range(seeds)]


def test_pairing_sees_what_rows_would_hide(tmp_path):
    standings = compared(tmp_path, {"base": draws(0.0), "good": draws(0.3), "same": draws(0.0)})
    base, good, same = (s.levels["exact_match"] for s in standings)
    assert base.better_by is None and good.outcome == "held" and same.outcome == "inconclusive"
    assert good.better_by.value == pytest.approx(0.3, abs=0.05) and good.better_by.low > 0.2
    assert good.value.high - good.value.low > 3 * (good.better_by.high - good.better_by.low)
    assert good.adjusted >= good.better_by.p_value and base.base == 0.0


def test_the_answer_in_words_says_by_how_much_an_arm_is_worse(tmp_path):
    arms = {"base": draws(0.0), "poor": draws(-0.3), "good": draws(0.3)}
    plan = checked({"recipe": {}, "arms": {a: {} for a in arms}, "primary": "exact_match"}, "p")
    bench = SimpleNamespace(plan=plan, pending=lambda: [])
    first, second = lead(bench, compared(tmp_path, arms))
    assert re.fullmatch(r"good beats base in exact match by \+0\.\d+ \(0\.\d+ to 0\.\d+\)\.", first), first
    assert re.fullmatch(r"poor is worse by 0\.\d+ \(0\.\d+ to 0\.\d+\)\.", second), second


def test_a_margin_is_asked_for_in_the_primary_measure(tmp_path):
    arms = {"base": draws(0.0), "good": draws(0.3)}
    assert compared(tmp_path / "a", arms, margin=0.1)[1].levels["exact_match"].outcome == "held"
    assert compared(tmp_path / "b", arms, margin=0.6)[1].levels["exact_match"].outcome == "not held"


def test_the_same_arm_twice_differs_by_nothing(tmp_path):
    same = draws(0.0)
    level = compared(tmp_path, {"base": same, "again": same})[1].levels["exact_match"]
    assert level.better_by == Estimate(0, 0, 0, 0, level.better_by.df) and level.better_by.p_value == 1


def test_lower_is_better_where_the_measure_says_so():
    a = {0: ratio("loss", [1.0, 2.0, 4.0], [1, 1, 1], ROWS[:3], higher=False)}
    b = {0: ratio("loss", [2.0, 3.0, 5.0], [1, 1, 1], ROWS[:3], higher=False)}
    assert difference(a, b).value == 1.0 and difference(b, a).value == -1.0
    assert difference(a, {1: b[0]}) is None, "no seed in common"
    assert difference(a, {0: ratio("loss", [1.0], [1], ("x",))}) is None, "no row in common"


@pytest.mark.parametrize(
    ("tried", "search", "at_edge"),
    [((1e-3, 1e-4), {}, True), ((1e-2, 1e-3, 1e-4), {}, False), ((1e-3, 1e-4), None, False)],
)
def test_a_rate_is_at_the_edge_of_a_search_only(tried, search, at_edge, tmp_path):
    """Trials of an earlier search in the same folder say nothing about a rate that the recipe gives."""
    base, other = compared(tmp_path, {"base": draws(0.0), "other": draws(0.0)}, tried=tried, search=search)
    assert (base.at_edge, other.at_edge) == (at_edge, False)


@pytest.mark.parametrize(
    ("low", "high", "higher", "tone"),
    [(3.6, 3.8, False, "bad"), (3.4, 3.8, False, ""), (3.6, 3.8, True, ""), (3.2, 3.4, True, "bad")],
)
def test_what_was_forgotten_beyond_doubt_has_a_colour(low, high, higher, tone):
    value = estimate(np.array([[3.0]]))._replace(low=low, high=high)
    level = Level("general_loss", higher, "nats a token", 3.5, value, [3.0])
    told = _forgotten([Standing("a", [0], {"general_loss": level}, None, False, {}, [])])
    assert [cell["tone"] for cell in told["rows"][0]["cells"]] == [tone]


def test_only_shared_seeds_and_rows_are_compared():
    mine = {s: mean("m", np.arange(4.0) + s, ("a", "b", "c", "d")) for s in range(3)}
    theirs = {s: mean("m", np.arange(3.0), ("b", "c", "x")) for s in (1, 2)}
    found = difference(mine, theirs)
    by_hand = np.array([[(1 + s) - 0, (2 + s) - 1] for s in (1, 2)], dtype=float)
    assert found == estimate(by_hand)


def test_an_arm_that_never_finished_is_listed(tmp_path):
    plan = checked({"recipe": {}, "arms": {"a": {}, "b": {}}, "primary": "exact_match"}, "p")
    job = Job("b", "seed-0", 1e-3, 0, 5)
    results = {"a": {0: run_of(tmp_path / "a", np.ones(4))}}
    a, b = judged(plan, results, {job.name: Done(job, 0, 0, 0, 0, error="out of memory")})
    assert b.levels == {} and b.errors == ["seed-0: out of memory"] and a.levels


def test_the_frontier_is_what_nobody_beats_in_both():
    def standing(arm, value, seconds):
        level = Level("m", True, "", None, Estimate(value, value, value, 0, 1), [value])
        return Standing(arm, [0], {"m": level}, None, False, {"seconds": seconds}, [])

    arms = [
        standing("cheap", 1.0, 1.0),
        standing("good", 3.0, 9.0),
        standing("bad", 0.9, 2.0),
        standing("dear", 3.0, 10.0),
    ]
    assert frontier(arms, "m", "seconds") == {"cheap", "good"}
