"""The result of a comparison: every arm's level, its paired difference to the baseline, and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.comparison.plan import Comparison
from luthier.comparison.steps import Done, over_budget, rates_tried, runs_of
from luthier.evaluation.measures import Measure
from luthier.support.statistics import Estimate, Outcome, estimate, holm, verdict


class Level(NamedTuple):
    """A measure of one arm over seeds and rows, and its difference to the baseline, with the sign that more is better.

    adjusted  p-value of the difference, with Holm's correction over the arms; None for the baseline
    """

    measure: str
    higher: bool
    unit: str
    base: float | None  # of the base model
    value: Estimate
    by_seed: list[float]
    better_by: Estimate | None = None
    adjusted: float | None = None
    outcome: Outcome | None = None


class Standing(NamedTuple):
    """One arm: its levels, its learning rate and its costs."""

    arm: str
    seeds: list[int]
    levels: dict[str, Level]
    learning_rate: float | None
    at_edge: bool  # the rate is the lowest or highest that was tried, so a better one may lie beyond
    spent: dict[str, float]  # mean of one run; "search_..." for the whole search
    errors: list[str]


def measures_of(folder: Path, which: str = "after") -> dict[str, Measure]:
    """The measures of a finished run, by name."""
    stored = json.loads((folder / f"{which}.json").read_text(encoding="utf-8"))
    return {m["name"]: Measure.from_dict(m) for m in stored["measures"]}


def matrix(runs: Sequence[Measure]) -> np.ndarray:
    """[S, R]: each row's part of a measure, one line for each seed, over the rows that all seeds share."""
    shared = _shared_keys(runs)
    return np.array([_in_order(m, shared) for m in runs])


def _shared_keys(runs: Sequence[Measure]) -> list[str]:
    """The keys of the rows that all runs measured, in the order of the first."""
    shared = set(runs[0].keys).intersection(*(m.keys for m in runs))
    return [k for k in runs[0].keys if k in shared]


def _in_order(measure: Measure, keys: Sequence[str]) -> np.ndarray:
    """[R]: the parts of these rows."""
    place = {k: i for i, k in enumerate(measure.keys)}
    return measure.pseudo_values()[[place[k] for k in keys]]


def difference(mine: Mapping[int, Measure], theirs: Mapping[int, Measure]) -> Estimate | None:
    """How much better mine is, paired by seed and row. None if no seed or row is shared."""
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return None
    a, b = [mine[s] for s in seeds], [theirs[s] for s in seeds]
    keys = _shared_keys([*a, *b])
    if not keys:
        return None
    sign = 1.0 if a[0].higher else -1.0
    return estimate(sign * np.array([_in_order(x, keys) - _in_order(y, keys) for x, y in zip(a, b, strict=True)]))


def judged(plan: Comparison, results: Mapping[str, dict[int, Path]], done: Mapping[str, Done]) -> list[Standing]:
    """Every arm's standing, the baseline first.

    results  arm -> seed -> folder of a finished run
    """
    found = {arm: {s: measures_of(f) for s, f in runs.items()} for arm, runs in results.items()}
    names = _shared_names(found)
    base = found.get(plan.base_arm, {})
    of_base = _of_base(results)
    out = []
    for arm in (plan.base_arm, *(a for a in plan.arms if a != plan.base_arm)):
        runs = found.get(arm, {})
        levels = {} if not runs else {n: _level(n, runs, base, arm == plan.base_arm, of_base, plan) for n in names}
        rate, at_edge = _rate(done, arm), plan.search is not None and _at_edge(done, arm)
        out.append(Standing(arm, sorted(runs), levels, rate, at_edge, _spent(done, arm), _errors(plan, done, arm)))
    return _adjusted(out, plan)


def _shared_names(found: Mapping[str, dict[int, dict[str, Measure]]]) -> list[str]:
    every = [m for runs in found.values() for m in runs.values()]
    return [n for n in every[0] if all(n in m for m in every)] if every else []


def _of_base(results: Mapping[str, dict[int, Path]]) -> dict[str, float]:
    """The measures of the base model, which are the same in every run."""
    first = next((folder for runs in results.values() for folder in runs.values()), None)
    return {} if first is None else {n: m.value for n, m in measures_of(first, "before").items()}


def _level(
    name: str, runs: dict[int, dict[str, Measure]], base: dict[int, dict[str, Measure]], is_base: bool,
    of_base: dict[str, float], plan: Comparison,
) -> Level:  # fmt: skip
    mine = {s: m[name] for s, m in runs.items()}
    first = next(iter(mine.values()))
    ordered = [mine[s] for s in sorted(mine)]
    value = estimate(matrix(ordered)) if len(first.keys) else Estimate(math.nan, math.nan, math.nan, math.nan, 1.0)
    better = None if is_base or not base else difference(mine, {s: m[name] for s, m in base.items()})
    margin = plan.margin if name == plan.primary else 0.0
    outcome = None if better is None else verdict(better, margin)
    by_seed = [m.value for m in ordered]
    return Level(name, first.higher, first.unit, of_base.get(name), value, by_seed, better, None, outcome)


def _adjusted(standings: list[Standing], plan: Comparison) -> list[Standing]:
    """Verdicts of the primary measure after Holm's correction for the number of arms."""
    at = [
        i for i, s in enumerate(standings) if plan.primary in s.levels and s.levels[plan.primary].better_by is not None
    ]
    levels = [standings[i].levels[plan.primary] for i in at]
    p = holm([x.better_by.p_value for x in levels if x.better_by is not None])
    for i, level, adjusted in zip(at, levels, p, strict=True):
        sure = adjusted < 0.05 or plan.margin > 0
        outcome = level.outcome if sure else "inconclusive"
        changed = {**standings[i].levels, plan.primary: level._replace(adjusted=adjusted, outcome=outcome)}
        standings[i] = standings[i]._replace(levels=changed)
    return standings


def _rate(done: Mapping[str, Done], arm: str) -> float | None:
    rates = {d.job.learning_rate for d in runs_of(done, arm) if d.job.purpose.startswith("seed-")}
    return rates.pop() if len(rates) == 1 else None


def _at_edge(done: Mapping[str, Done], arm: str) -> bool:
    tried, rate = rates_tried(done, arm), _rate(done, arm)
    return len(tried) > 1 and rate is not None and rate in (min(tried), max(tried))


def _errors(plan: Comparison, done: Mapping[str, Done], arm: str) -> list[str]:
    too_large = over_budget(plan, done, arm)
    failed = [f"{d.job.purpose}: {d.error}" for d in runs_of(done, arm) if d.error is not None]
    return failed if too_large is None else [too_large, *failed]


def _spent(done: Mapping[str, Done], arm: str) -> dict[str, float]:
    """Means over the runs with seeds, and sums over the search for a learning rate."""
    runs = [d for d in runs_of(done, arm) if d.job.purpose.startswith("seed-") and d.error is None]
    search = [d for d in runs_of(done, arm) if not d.job.purpose.startswith("seed-")]

    def mean(pick: Callable[[Done], float]) -> float:
        return float(np.mean([pick(d) for d in runs])) if runs else math.nan

    return {
        "flops": mean(lambda d: d.flops + d.once_flops), "seconds": mean(lambda d: d.seconds + d.once_seconds),
        "tokens": mean(lambda d: d.row_tokens), "steps": mean(lambda d: d.steps), "bytes": mean(lambda d: d.update_bytes),
        "peak_bytes": mean(lambda d: d.peak_bytes), "evaluation_seconds": mean(lambda d: d.evaluation_seconds),
        "search_flops": sum(d.flops + d.once_flops for d in search),
        "search_seconds": sum(d.seconds + d.once_seconds for d in search), "search_runs": float(len(search)),
    }  # fmt: skip


def frontier(standings: Sequence[Standing], primary: str, cost: str) -> set[str]:
    """Arms that no other arm beats in both the primary measure and this cost."""
    points = {}
    for s in standings:
        level = s.levels.get(primary)
        if level is not None and math.isfinite(s.spent[cost]):
            points[s.arm] = (level.value.value * (1 if level.higher else -1), -s.spent[cost])
    return {
        a for a, p in points.items()
        if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for b, q in points.items() if b != a)
    }  # fmt: skip


def as_dict(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """The standings as plain values."""
    out = []
    for s in standings:
        levels = {
            n: {
                **x._asdict(),
                "value": x.value._asdict(),
                "better_by": None if x.better_by is None else x.better_by._asdict(),
            }
            for n, x in s.levels.items()
        }
        out.append({**s._asdict(), "levels": levels})
    return out
