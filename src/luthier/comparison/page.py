"""report.html of a comparison: which arm is better, how sure that is, costs, forgetting, and how to repeat it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.comparison.execute import Bench
from luthier.comparison.judge import Level, Standing, as_dict, frontier
from luthier.comparison.plan import Foreign
from luthier.comparison.steps import budget_of
from luthier.evaluation.base import Results
from luthier.evaluation.measures import SIDE
from luthier.recipe.text import as_yaml
from luthier.report.curve import Point, Range, Series, interval_chart, line_chart, point_chart
from luthier.report.page import gates_shown, template
from luthier.support.environment import environment
from luthier.support.files import write_text
from luthier.support.statistics import Estimate
from luthier.support.units import in_bytes, in_flops, in_time
from luthier.support.version import __version__

FORGOTTEN = ("general_loss", "canaries", "canary_loss")
COSTS = (
    ("seconds", "seconds of training"),
    ("flops", "FLOP of training"),
    ("peak_bytes", "bytes of memory"),
    ("bytes", "bytes of the update"),
)
SHOWN = 8  # samples
WORDS = {"held": "better", "not held": "not better", "inconclusive": "inconclusive"}


def write_comparison(bench: Bench, standings: Sequence[Standing], command: Sequence[str]) -> Path:
    """Write the report from the comparison's folder."""
    plan = bench.plan
    finished = [s for s in standings if s.levels]
    base = next((s for s in finished if s.arm == plan.base_arm), None)
    primary = base.levels[plan.primary] if base else None
    page = template("compare.html").render(
        name=bench.folder.name, version=__version__, budget=_budget(bench), baseline=plan.base_arm,
        seeds=f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed",
        primary=_name(plan.primary), better="higher" if primary and primary.higher else "lower",
        lead=lead(bench, standings), differences=_differences(finished, plan.primary),
        arms=[shown(s, plan.primary) for s in standings],
        how_sure=_how_sure(bench), failed=[{"name": s.arm, "why": "; ".join(s.errors)} for s in standings if s.errors],
        costs=_costs(finished, plan.primary, _unit(bench)), forgotten=_forgotten(finished), every=_every(finished, standings),
        curves=_curves(bench), gates=_gates(bench), samples=_samples(bench),
        again=shlex.join(command), at_edge=" and ".join(s.arm for s in standings if s.at_edge),
        plan=as_yaml(plan.model_dump(mode="json")),
        recipes=[{"name": a, "text": as_yaml(r.as_dict())} for a, r in bench.recipes.items()], env=environment(),
    )  # fmt: skip
    told = {"primary": plan.primary, "baseline": plan.base_arm, "arms": as_dict(standings)}
    write_text(bench.folder / "standings.json", json.dumps(told))
    target = bench.folder / "report.html"
    write_text(target, page)
    return target


def _name(measure: str) -> str:
    return measure.replace("_", " ")


def _budget(bench: Bench) -> str:
    found = budget_of(bench.plan, bench.arms, bench.done)
    if found is None:
        return "no common budget"
    unit, amount = found
    return f"{in_flops(amount)} a run" if unit == "flops" else f"{amount:,.0f} {unit} a run"


def lead(bench: Bench, standings: Sequence[Standing]) -> list[str]:
    """The result in words."""
    plan = bench.plan
    rivals = [s for s in standings if s.arm != plan.base_arm and plan.primary in s.levels]
    judged = [(s, s.levels[plan.primary]) for s in rivals if s.levels[plan.primary].better_by is not None]
    if not judged:
        return [
            "Nothing can be said yet: the baseline has no finished run, or no other arm has one.",
            *_open(bench, standings),
        ]
    winners = sorted((x for x in judged if x[1].outcome == "held"), key=lambda x: -_by(x[1]).value)
    name = _name(plan.primary)
    if winners:
        s, level = winners[0]
        out = [f"{s.arm} beats {plan.base_arm} in {name} by {_signed(_by(level))}."]
        out += [f"{w.arm} does too, by {_signed(_by(x))}." for w, x in winners[1:]]
    else:
        out = [f"No arm was found to beat {plan.base_arm} in {name}."]
    for s, level in judged:
        if level.outcome == "inconclusive":
            seen = _short(_by(level).visible)
            out.append(
                f"{s.arm}: no difference seen ({_signed(_by(level))}); a difference of {seen} would most likely have been seen."
            )
        elif level.outcome == "not held":
            e = _by(level)
            worse = f"is worse by {-e.value:.3g} ({_short(-e.high)} to {_short(-e.low)})"
            enough = f"is not better by the margin; the difference is {_signed(e)}"
            out.append(f"{s.arm} {worse if e.high < 0 else enough}.")
    return [*out, *_open(bench, standings)]


def _open(bench: Bench, standings: Sequence[Standing]) -> list[str]:
    """What is left to run."""
    wanted = len(bench.plan.seeds)
    some = [f"{s.arm} has {len(s.seeds)} of {wanted} seeds" for s in standings if len(s.seeds) < wanted]
    return [f"Not finished: {', '.join(some)}."] if bench.pending() else []


def _by(level: Level) -> Estimate:
    assert level.better_by is not None
    return level.better_by


def _short(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else "any size"


def _signed(e: Estimate) -> str:
    return f"{e.value:+.3g} ({_short(e.low)} to {_short(e.high)})"


def _plain(level: Level) -> str:
    """The level with its interval. A share stays between 0 and 1."""
    e = level.value
    low, high = (max(0.0, e.low), min(1.0, e.high)) if level.unit.startswith("share of") else (e.low, e.high)
    return f"{e.value:.4g} ({_short(low)} to {_short(high)})" if math.isfinite(e.low) else f"{e.value:.4g}"


def shown(s: Standing, primary: str) -> dict[str, str]:
    """An arm's row of the table, as texts."""
    level, spent = s.levels.get(primary), s.spent
    out = {
        "name": s.arm, "value": "failed" if level is None else _plain(level), "better_by": "", "verdict": "",
        "tone": "", "visible": "", "p": "", "rate": _rate(s),
        "steps": f"{spent['steps']:.0f}", "flops": in_flops(spent["flops"]), "seconds": _seconds(spent["seconds"]),
        "search": f"{spent['search_runs']:.0f} runs, {in_flops(spent['search_flops'])}, {_seconds(spent['search_seconds'])}",
        "peak": _bytes(spent["peak_bytes"]), "bytes": _bytes(spent["bytes"]),
    }  # fmt: skip
    if level is not None and level.better_by is None:
        out["verdict"] = "baseline"
    if level is not None and level.better_by is not None and level.outcome is not None:
        worse = level.outcome == "not held" and level.better_by.high < 0
        out |= {
            "better_by": _signed(level.better_by), "verdict": "worse" if worse else WORDS[level.outcome],
            "tone": {"held": "good", "not held": "bad"}.get(level.outcome, ""), "visible": _short(level.better_by.visible),
            "p": "" if level.adjusted is None else f"{level.adjusted:.2g}",
        }  # fmt: skip
    return out


def _rate(s: Standing) -> str:
    if s.learning_rate is None:
        return ""
    return f"{s.learning_rate:.2g} (edge)" if s.at_edge else f"{s.learning_rate:.2g}"


def _seconds(x: float) -> str:
    return in_time(x) if math.isfinite(x) else ""


def _bytes(x: float) -> str:
    return in_bytes(x) if math.isfinite(x) and x else ""


def _how_sure(bench: Bench) -> str:
    plan = bench.plan
    if len(plan.seeds) < 3:
        return "With fewer than three seeds, little is known about other seeds. So the intervals are wide."
    return (
        "Differences are paired: the same seed, the same row. Verdicts of several arms are corrected for their number "
        "(Holm). Inconclusive does not mean equal."
    )


def _differences(finished: Sequence[Standing], primary: str) -> Any:
    found = [(i, s.arm, s.levels[primary].better_by) for i, s in enumerate(finished)]
    ranges = [Range(a, e.value, e.low, e.high, i) for i, a, e in found if e is not None]
    return interval_chart(ranges, f"difference in {_name(primary)}", "differences to the baseline")


def _unit(bench: Bench) -> str:
    found = budget_of(bench.plan, bench.arms, bench.done)
    return "" if found is None else found[0]


def _costs(finished: Sequence[Standing], primary: str, unit: str) -> list[dict[str, Any]]:
    """Charts of quality against every cost, except the cost that the budget makes equal."""
    out = []
    for key, title in COSTS:
        if key == unit:
            continue
        best = frontier(finished, primary, key)
        points = [
            Point(s.arm, s.spent[key], s.levels[primary].value.value, s.arm in best, i)
            for i, s in enumerate(finished)
            if s.spent[key]
        ]
        if len({round(p.x, 9) for p in points}) > 1:
            out.append(
                {
                    "svg": point_chart(points, title, _name(primary), f"{_name(primary)} against {title}"),
                    "title": f"{_name(primary)} against {title}",
                }
            )
    return out


def _forgotten(finished: Sequence[Standing]) -> dict[str, Any] | None:
    names = [n for n in FORGOTTEN if finished and n in finished[0].levels]
    if not names:
        return None
    first = finished[0].levels
    return {
        "names": [f"{_name(n)} ({'higher' if first[n].higher else 'lower'} is better)" for n in names],
        "before": [_level(first[n].base) for n in names],
        "rows": [
            {
                "name": s.arm,
                "cells": [
                    {"text": _plain(x), "tone": "bad" if _is_worse(x) else ""} for x in map(s.levels.get, names) if x
                ],
            }
            for s in finished
        ],
    }


def _is_worse(level: Level) -> bool:
    """Whether the whole interval is worse than the base model's value."""
    if level.base is None:
        return False
    return level.value.high < level.base if level.higher else level.value.low > level.base


def _level(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _every(finished: Sequence[Standing], standings: Sequence[Standing]) -> list[dict[str, Any]]:
    if not finished:
        return []
    first = finished[0].levels
    return [
        {
            "name": _name(n), "unit": x.unit, "before": _level(x.base),
            "better": "" if n in SIDE else "higher is better" if x.higher else "lower is better",
            "cells": [_plain(s.levels[n]) if n in s.levels else "" for s in standings],
        }
        for n, x in first.items()
    ]  # fmt: skip


def _curves(bench: Bench) -> list[dict[str, Any]]:
    """Training loss of the first seed of each arm, against FLOPs."""
    by_work, held = [], []
    for arm, runs in bench.results().items():
        log = runs[min(runs)] / "log.jsonl"
        if isinstance(bench.plan.arms[arm], Foreign) or not log.exists():
            continue
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        by_work.append(Series(arm, [(e.get("flops", e["step"]), e["loss"]) for e in entries if "loss" in e]))
        held.append(Series(arm, [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]))
    out = []
    for series, x, title in (
        (by_work, "FLOP of training", "Training loss against FLOPs, first seed"),
        (held, "step", "Held-out loss, first seed"),
    ):
        if any(s.points for s in series):
            out.append({"svg": line_chart(series, x, "loss", title), "title": title})
    return out


def _gates(bench: Bench) -> list[dict[str, str]]:
    """The release gate of every arm, compared with the base model."""
    out: list[dict[str, str]] = []
    for arm, runs in bench.results().items():
        before = _results(runs[min(runs)], "before")
        after = [_results(f, "after") for f in runs.values()]
        found = [g for e in bench.recipes[arm].evaluators() for g in e.gates(before, after)]
        plain = [{**g._asdict(), "change": g.change._asdict()} for g in found]
        out += [{**g, "arm": arm} for g in gates_shown(plain)]
    return out


def _results(place: Path, which: str) -> Results:
    return Results.from_dict(json.loads((place / f"{which}.json").read_text(encoding="utf-8")))


def _samples(bench: Bench) -> dict[str, Any] | None:
    """Answers of the first seed of every arm. Prompts on which arms differ come first."""
    found = {}
    for arm, runs in bench.results().items():
        place = runs[min(runs)]
        found[arm], untouched = _results(place, "after").samples, _results(place, "before").samples
    if not found or not any(found.values()):
        return None
    by_key = {arm: {s.key: s for s in samples} for arm, samples in found.items()}
    first = {s.key: s for s in untouched}
    keys = [k for k in first if all(k in mine for mine in by_key.values())]
    keys.sort(
        key=lambda k: len({mine[k].right for mine in by_key.values()}) == 1
    )  # stable: prompts with differences first
    rows = []
    for k in keys[:SHOWN]:
        cells = [first[k], *(mine[k] for mine in by_key.values())]
        rows.append(
            {
                "prompt": first[k].prompt,
                "wanted": first[k].wanted,
                "cells": [{"text": c.answer, "right": c.right} for c in cells],
            }
        )
    return {"arms": list(by_key), "rows": rows}
