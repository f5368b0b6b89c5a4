"""The report of claims: what each paper says, what was measured here, and whether the claim holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.claims.claim import Claim, Condition
from luthier.report.curve import Range, interval_chart
from luthier.report.page import template
from luthier.support.environment import environment
from luthier.support.files import write_text
from luthier.support.units import in_time
from luthier.support.version import __version__

MEAN = "mean and 95% interval over seeds"
TONES = {"held": "good", "not held": "bad"}


def write_claims(target: Path, claims: Mapping[str, Claim], command: str) -> Path:
    """Write the report. Claims without measurements are shown without numbers."""
    shown = [_shown(name, claim) for name, claim in claims.items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, template("claims.html").render(
        name="Claims", claims=shown, version=__version__, again=command, env=environment()))  # fmt: skip
    return target


def _shown(name: str, claim: Claim) -> dict[str, Any]:
    out = {"name": name, "claim": claim.claim, "source": claim.source, "data": claim.data, "tier": claim.tier,
           "arms": claim.arms, "verdict": "not measured", "tone": "", "conditions": [], "by_arm": []}  # fmt: skip
    m = claim.measured
    if m is None:
        return out
    conditions = [
        {
            **found, "range": f"{found['mean']:.4g} ({found['low']:.4g} to {found['high']:.4g})",
            "tone": TONES.get(found["outcome"], ""), "bound": _bound(asked),
            "svg": interval_chart(
                [Range("", found["mean"], found["low"], found["high"], i)], MEAN, found["says"], asked.bound
            ),
        }
        for i, (found, asked) in enumerate(zip(m["conditions"], claim.conditions, strict=True))
    ]  # fmt: skip
    measures = list(dict.fromkeys(name for by in m["values"].values() for name in by))
    values = [
        {"arm": arm, "cells": [", ".join(f"{v:.4g}" for v in by.get(x, [])) for x in measures]}
        for arm, by in m["values"].items()
    ]
    when = f"{m['date']}, {m['seeds']} seeds, {in_time(m['seconds'])} in all, {m['machine']}, commit {m['commit']}"
    verdict = {"verdict": m["verdict"], "tone": TONES.get(m["verdict"], "")}
    return out | verdict | {"conditions": conditions, "measures": measures, "by_arm": values, "when": when}


def _bound(condition: Condition) -> str:
    return f"{'at most' if condition.at_least is None else 'at least'} {condition.bound:g}"
