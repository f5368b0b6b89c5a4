"""report.html of a run: what was asked, what it cost, curves, before and after, samples, and how to run it again.

The report is one file that opens without a network. All texts of the user are escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

from luthier.data.table import DROP, Table
from luthier.evaluation.measures import SIDE
from luthier.inspection.base import Finding
from luthier.recipe import Recipe
from luthier.recipe.text import as_yaml, parse
from luthier.report import token_view
from luthier.report.curve import Series, line_chart, plane_chart
from luthier.support.files import write_text
from luthier.support.units import in_flops, in_time
from luthier.support.version import __version__

SAMPLES = 12
CHANGED = 5  # rows that are shown before and after a change
CELL = 500  # characters of a field
DECIDED = {"keep": "kept", "drop": "left out", "rewrite": "rewritten", "split": "split"}
ABOUT = {  # measures whose names do not say what they are
    "general_loss": "on general text that is not about the task; a rise means that something was forgotten",
    "canaries": "right answers to plain questions, such as capitals and sums; a fall means that something was forgotten",
    "canary_loss": "on the answers to the plain questions; a rise means that something was forgotten",
    "stopped": "the others were cut at the largest number of tokens",
}
TONES = {"better": "good", "worse": "bad", "no clear change": ""}
WAYS = ("pipeline", "tuner", "objective", "compute")  # keys of a recipe that say how it trains
NEAR_ONE = 0.05  # weights within this of 1 are plain cross-entropy, up to rounding


def template(name: str) -> Template:
    """A page's template. All texts put into it are escaped."""
    pages = Environment(loader=PackageLoader("luthier.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(name)


def write_report(folder: Path) -> Path:
    """Write the report from the run folder."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in _lines(folder / "log.jsonl")]
    samples = [json.loads(line) for line in _lines(folder / "samples.jsonl")]
    page = template("run.html").render(
        run=run,
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        env=(folder / "env.txt").read_text(encoding="utf-8"),
        name=folder.name,
        charts=_charts(log, run),
        headline=headline(run),
        method=_method(parse((folder / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml")[0]),
        facts=_facts(run),
        planes=_planes(folder),
        scores=_scores(run),
        gates=gates_shown(run.get("gates", [])),
        samples=_chosen(samples),
        counts=_counts(samples),
        rendered=_tokens(folder),
        again=f"luthier run {shlex.quote(str(folder.resolve() / 'recipe.yaml'))} --fresh",
    )
    target = folder / "report.html"
    write_text(target, page)
    return target


def write_curation(folder: Path, name: str, recipe: Recipe, table: Table) -> Path:
    """Write the report of curation from its folder.

    table  after the last step
    """
    decided = [json.loads(line) for line in _lines(folder / "decisions.jsonl")[:50_000]]
    examples = {title: [d for d in decided if d["decision"] == what][:SAMPLES] for what, title in DECIDED.items()}
    page = template("curate.html").render(
        name=name,
        before=table.incoming,
        after=len(table),
        changes=changes_in(table),
        planes=_planes(folder),
        recipe=as_yaml(recipe.as_dict()),
        examples=examples,
        version=__version__,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def changes_in(table: Table, count: int = CHANGED) -> list[dict[str, Any]]:
    """The first rows that were rewritten or split: key, step, and each field that changed, before and after."""
    numbers = np.flatnonzero(table.decision > DROP)[:count]
    return [change for number in numbers.tolist() for change in _changes(table, number)]


def _changes(table: Table, number: int) -> Iterator[dict[str, Any]]:
    """Yield the fields of an entry that differ in the entries that replaced it, as texts."""
    line, old = table.line(number), table.entries[number].values
    new = [table.entries[i].values for i in np.flatnonzero(table.parent == number).tolist()]
    for field in dict.fromkeys([*old, *(name for values in new for name in values)]):
        if any(values.get(field) != old.get(field) for values in new):
            after = [_cell(values.get(field)) for values in new]
            yield {
                "key": line["key"],
                "step": line["step"],
                "field": field,
                "before": _cell(old.get(field)),
                "after": after,
            }


def _cell(value: Any) -> str:
    """A field's value as text, cut after some lines; "" for a field that is missing."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, indent=1)
    return text if len(text) <= CELL else text[:CELL] + " ..."


def write_finding(target: Path, finding: Finding, again: str) -> Path:
    """The page of what an inspector found.

    again  the command that makes it
    """
    page = template("finding.html").render(
        name="What tuning did", finding=finding, picture=Markup(finding.picture), again=again, version=__version__
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    return target


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def loss_unit(run: Mapping[str, Any]) -> str:
    """The unit of a run's loss: nats a token, a row or a masked token."""
    return str(((run.get("after") or {}).get("loss") or {}).get("unit", "nats a token"))


def _charts(log: list[dict[str, float]], run: Mapping[str, Any]) -> list[dict[str, Any]]:
    steps = [e for e in log if "loss" in e]
    loss = [Series("training loss", [(e["step"], e["loss"]) for e in steps])]
    held = _held_out(log, run)
    if held:
        loss.append(Series("held-out loss", held))
    charts = [("Loss", loss_unit(run), loss)]
    if any("grad_norm" in e for e in steps):
        charts.append(
            (
                "Gradient norm, before clipping",
                "norm",
                [Series("gradient norm", [(e["step"], e["grad_norm"]) for e in steps if "grad_norm" in e])],
            )
        )
    charts.append(("Speed", "tokens a second", [Series("speed", [(e["step"], e["tokens_per_second"]) for e in steps])]))
    return [{"title": t, "svg": line_chart(s, "step", y, t)} for t, y, s in charts if any(x.points for x in s)]


def _held_out(log: Sequence[Mapping[str, float]], run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Steps with the loss on held-out rows: before training and in it, or before and after it."""
    before, after = (run.get(when) or {} for when in ("before", "after"))
    seen = [(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e]
    if "loss" not in before or "loss" not in after:
        return seen
    return [(0.0, before["loss"]["value"]), *(seen or [(float(run["steps"]), after["loss"]["value"])])]


def _planes(folder: Path) -> list[dict[str, Any]]:
    """What each curation step decided, with a picture if it decides by two numbers."""
    file = folder / "curation.json"
    steps = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    out = []
    for k in steps:
        x_name, y_name = k["axes"]
        points = [(x, y, stayed) for x, y, stayed in k["plane"]]
        svg = plane_chart(points, x_name, y_name, k["step"]) if points else ""
        out.append(
            {"step": k["step"], "rows": k["rows"], "of": k["of"], "reasons": sorted(k["reasons"].items()), "svg": svg}
        )
    return out


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    census = run.get("census", {})
    out = [
        *([("Finished", f"{run['finished']}, after {in_time(run['seconds'])} in all")] if "finished" in run else []),
        ("Base model", run["base"]["name"]),
        ("Base fingerprint", run["base"]["weights"][:16]),
        (
            "Rows",
            f"{census.get('rows', 0):,} with {census.get('tokens', 0):,} tokens, {census.get('supervised', 0):,} supervised",
        ),
        (
            "Dropped, cut, duplicates",
            f"{census.get('dropped', 0)}, {census.get('cut', 0)}, {census.get('duplicates', 0)}",
        ),
        ("Trained numbers", f"{run['trained_weights']:,}"),
        ("Optimiser steps", f"{run['steps']:,}"),
        (
            "Training time",
            f"{run['train_seconds']:.0f} s, {run['tokens'] / max(run['train_seconds'], 1e-9):.0f} tokens a second",
        ),
        ("Peak memory", f"{run['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]
    if run["reload_difference"] is not None:
        out.append(("Saved, reloaded, compared", f"largest difference {run['reload_difference']:.1e}"))
    if run["spent"]["flops"] is not None:
        by_stage = ", ".join(f"{k} {in_flops(v)}" for k, v in run["spent"]["flops"].items() if v)
        out.append(("Work, by formula", f"{by_stage}; evaluation {in_flops(run['spent']['evaluation_flops'])}"))
    if run.get("forecast_miss"):
        f, off = run["forecast"], run["forecast_miss"]
        out.append(
            (
                "Forecast, and how far off",
                f"{f['memory_bytes'] / 1e9:.2f} GB ({off['memory']:+.0%}), {f['seconds']:.0f} s ({off['seconds']:+.0%})",
            )
        )
    out += [
        (f"Source {s['name']}", f"{s['rows']:,} rows, {s['share']:.1%} of the draws") for s in run.get("sources", [])
    ]
    out += [
        (f"Curated by {k['step']}", f"{k['of']:,} rows before, {k['rows']:,} after") for k in run.get("curated", [])
    ]
    if run.get("skipped_steps"):
        out.append(
            (
                "Steps without a change",
                f"{run['skipped_steps']} of {run['steps']}: no supervised token, or no finite loss",
            )
        )
    for name, forms in run.get("forms", {}).items():
        out.append(({"train": "Training rows", "eval": "Held-out rows"}[name], "; ".join(forms)))
    if run.get("overlap"):
        out.append(("Held out and trained on", run["overlap"]))
    if run.get("pool_shared"):
        out.append(("Pool rows left out", f"{run['pool_shared']:,}, which are also training rows"))
    if run.get("skipped"):
        out.append(("Rows that could not be read", "; ".join(run["skipped"])))
    return out


def _method(recipe: Mapping[str, Any]) -> str:
    """What trained, in words."""
    named = {k: next(iter(v)) if isinstance(v, Mapping) else v for k, v in recipe.items() if k in WAYS and v}
    if "pipeline" in named:
        return f"pipeline {named['pipeline']}"
    return ", ".join(f"{key} {name}" for key, name in named.items())


def headline(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """How much the first measure changed and how sure that is, then every measure that became worse."""
    judged = {n: m for n, m in (run.get("compared") or {}).items() if m["change"] is not None and n not in SIDE}
    first = next(iter(judged), None)
    out = []
    for name, m in judged.items():
        verdict = verdict_on(m)
        if name != first and verdict != "worse":
            continue
        by, word = m["change"], "rose" if m["change"]["value"] > 0 else "fell"
        sure = f"95% interval of the change {by['low']:+.3g} to {by['high']:+.3g}, over {m['rows']:,} rows"
        went = f"{word} from {m['base']:.4g} to {m['value']:.4g}" if by["value"] else f"stayed at {m['value']:.4g}"
        text = f"{name.replace('_', ' ').capitalize()} {went}: {verdict} ({sure})."
        out.append({"text": text, "tone": TONES[verdict]})
    return out


def verdict_on(measure: Mapping[str, Any]) -> str:
    """Whether a change is certain: its whole interval must be on one side of zero."""
    change, sign = measure["change"], 1 if measure["higher"] else -1
    low, high = sorted((sign * change["low"], sign * change["high"]))
    return "better" if low > 0 else "worse" if high < 0 else "no clear change"


def _scores(run: Mapping[str, Any]) -> list[dict[str, str]]:
    before, after, compared = run.get("before") or {}, run.get("after") or {}, run.get("compared") or {}
    return [
        {
            "name": name.replace("_", " "), "unit": m["unit"], "rows": f"{m['rows']:,}", "before": _level(before[name]),
            "after": _value(compared.get(name, m)), "about": ABOUT.get(name, ""),
            "better": "" if name in SIDE else "higher" if m["higher"] else "lower",
            **_changed(name, compared.get(name)),
        }
        for name, m in after.items()
    ]  # fmt: skip


def _changed(name: str, measure: Mapping[str, Any] | None) -> dict[str, str]:
    """The change of a measure with its interval, and what it means."""
    if measure is None or measure["change"] is None:
        return {"change": "", "verdict": "", "tone": ""}
    by = measure["change"]
    verdict = "" if name in SIDE else verdict_on(measure)
    unit = 100 if _is_share(measure) else 1
    shown = [f"{unit * by[k]:+.3g}" for k in ("value", "low", "high")]
    points = " points" if unit == 100 else ""
    return {
        "change": f"{shown[0]}{points} ({shown[1]} to {shown[2]})",
        "verdict": verdict,
        "tone": TONES.get(verdict, ""),
    }


def gates_shown(gates: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The conditions of the release gate, in words."""
    tones = {"pass": "good", "fail": "bad"}
    return [
        {
            "name": g["measure"].replace("_", " "), "outcome": g["outcome"], "tone": tones.get(g["outcome"], ""),
            "change": f"{g['change']['value']:+.3f} ({g['change']['low']:.3f} to {g['change']['high']:.3f})",
            "needed": f"{g['needed']:,}", "delta": f"{g['delta']:g}",
        }
        for g in gates
    ]  # fmt: skip


def _is_share(measure: Mapping[str, Any]) -> bool:
    return str(measure["unit"]).startswith("share of")


def _level(measure: Mapping[str, Any]) -> str:
    return f"{measure['value']:.1%}" if _is_share(measure) else f"{measure['value']:.4g}"


def _value(measure: Mapping[str, Any]) -> str:
    """A level with its interval, where one is known."""
    if measure.get("low") is None:
        return _level(measure)
    ends = [f"{measure[k]:.0%}" if _is_share(measure) else f"{measure[k]:.4g}" for k in ("low", "high")]
    return f"{_level(measure)} ({ends[0]} to {ends[1]})"


def _chosen(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wrong answers first, at most half; then what was learnt."""
    misses = [s for s in samples if s["after_right"] is False][: SAMPLES // 2]
    return misses + [s for s in samples if s["after_right"] is not False][: SAMPLES - len(misses)]


def _counts(samples: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "shown": min(SAMPLES, len(samples)),
        "of": len(samples),
        "wrong": sum(s["after_right"] is False for s in samples),
        "judged": sum(s["after_right"] is not None for s in samples),
    }


def _tokens(folder: Path) -> list[list[dict[str, Any]]]:
    """A few rows, token by token, with notes below the tokens."""
    rows = token_view.load(folder)
    weighed = any(abs(t.get("weight", 1.0) - 1.0) > NEAR_ONE for row in rows for t in row)
    for t in (t for row in rows for t in row):
        said = [f"{t[k]:.2f}" for k in ("before", "after") if k in t]
        t["said"] = " → ".join(said) + (f" ×{t['weight']:.2f}" if weighed and "weight" in t else "")
        t["pruned"] = t.get("kept") is False
    return rows
