"""The report of a whole collaboration: what each organisation had, what it got, what shared rows would give, what was sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.collaboration.controls import gap_recovered
from luthier.federation.audit_page import SAYS
from luthier.federation.client import Audited
from luthier.federation.translation_page import judged_rows
from luthier.report.curve import Range, interval_chart
from luthier.report.page import template
from luthier.support.files import write_text
from luthier.support.units import in_time
from luthier.support.version import __version__

OWN, BARE = "its own small model, tuned on its rows", "large model, not tuned"
MEAN, PUBLIC = "large model with the mean shadow (C1)", "large model tuned on all public rows (C2)"
TRANSLATED = "large model with its translated update"
SHARED = "large model tuned on its own rows (needs them to be shared)"
ALL = "large model tuned on all three organisations' rows (needs them to be shared)"
SHORT = {  # short names for pictures
    OWN: "own small model", BARE: "not tuned", MEAN: "mean shadow", PUBLIC: "public rows", TRANSLATED: "translated",
    SHARED: "own rows", ALL: "all rows",
}  # fmt: skip


def write_collaboration(
    target: Path, found: Mapping[str, Any], audits: Mapping[str, Audited], report: Mapping[str, Any]
) -> Path:
    """found   losses by organisation and model, and how the translator was judged
    audits  by organisation, from `federation.client.prepared`
    report  of the server, by organisation
    """
    names = list(found["losses"])
    models = list(next(iter(found["losses"].values())))
    lines = [{"model": m, "losses": [found["losses"][n][m] for n in names], "mean": _mean(found, m)} for m in models]
    chart = interval_chart(
        [Range(SHORT[x["model"]], x["mean"], min(x["losses"]), max(x["losses"]), i) for i, x in enumerate(lines)],
        "nats a token",
        "loss on rows that nobody tuned on: mean, lowest and highest of the organisations",
        _mean(found, BARE),
    )
    sent = [
        {
            "name": n, "what": a.disclosure.what, "bytes": a.disclosure.bytes, "promise": a.disclosure.promise,
            "tone": SAYS[a.verdict.outcome][0], "verdict": SAYS[a.verdict.outcome][1], "answers": a.answers,
            "warnings": report[n]["warnings"],
        }
        for n, a in audits.items()
    ]  # fmt: skip
    page = template("collaboration.html").render(
        name="Three organisations, and no row was sent", names=names, lines=lines, chart=chart, sent=sent,
        recovered=[_recovered(by) for by in found["losses"].values()], judged=judged_rows(found["judged"]),
        verdict=found["judged"]["verdict"], sets=found["judged"]["sets"],
        took=in_time(found["seconds"]), version=__version__, lead=_lead(found),
    )  # fmt: skip
    write_text(target, page)
    return target


def _mean(found: Mapping[str, Any], model: str) -> float:
    values: list[float] = [by[model] for by in found["losses"].values()]
    return sum(values) / len(values)


def _recovered(by: Mapping[str, float]) -> float:
    """PGR in percent, from losses: the share of the way from the own small model to the large one tuned on the same rows."""
    return gap_recovered(-by[TRANSLATED], -by[OWN], -by[SHARED])


def _lead(found: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    had, got, bare, shared = (_mean(found, m) for m in (OWN, TRANSLATED, BARE, SHARED))
    controls = min(_mean(found, m) for m in (MEAN, PUBLIC))
    gained = (bare - got) / (bare - shared) if bare != shared else float("nan")
    beats = "beats" if got < controls else "does not beat"
    return (
        f"On average, each had its own small model with a loss of {had:.3f}, and got a large one with {got:.3f}. That is "
        f"{gained:.0%} of the gain of shared rows ({bare:.3f} not tuned, {shared:.3f} shared). It {beats} the "
        f"best model that needs no organisation's rows or updates ({controls:.3f})."
    )
