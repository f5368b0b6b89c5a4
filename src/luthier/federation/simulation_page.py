"""The report of a simulated collaboration: alone, together, and with shared rows, on each client's held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.federation.folder import Workspace
from luthier.report.curve import Range, Series, interval_chart, line_chart
from luthier.report.page import template
from luthier.support.files import write_text
from luthier.support.version import __version__

UNTOUCHED, ALONE, TOGETHER, SHARED = "untouched", "alone", "together", "shared"
SAYS = {
    UNTOUCHED: "base model", ALONE: "alone: tuned on its own rows", TOGETHER: "together: the protocol's result",
    SHARED: "tuned on all clients' rows (needs shared rows)",
}  # fmt: skip


def write_simulation(target: Path, workspace: Workspace, found: Mapping[str, Any]) -> Path:
    """Write the report. found: the contents of found.json from `federation.simulation.simulate`."""
    names, losses = list(found["losses"][ALONE]), found["losses"]
    lines = [
        {"name": SAYS[m], "losses": list(by.values()), "mean": mean(by), "everybody": mean(found["everybody"][m])}
        for m, by in losses.items()
    ]  # fmt: skip
    chart = interval_chart(
        [Range(m, mean(by), min(by.values()), max(by.values()), i) for i, (m, by) in enumerate(losses.items())],
        "nats a token", "loss on held-out rows: mean, lowest and highest of the clients", mean(losses[UNTOUCHED]),
    )  # fmt: skip
    counted = found["report"] if isinstance(found["report"], list) else []
    page = template("simulation.html").render(
        name=f"{workspace.path.name}: simulated", protocol=workspace.protocol.key(), digest=workspace.contract.digest[:12],
        lead=lead(found), names=names, lines=lines, chart=chart, counted=counted, rounds=found["rounds"],
        arrivals=found["arrivals"], arriving=_arriving(found), line=found["line"], along=_along(found),
        leaves=workspace.protocol.leaves, two_models=len(workspace.protocol.roles) > 1, version=__version__,
        steps=workspace.contract.settings.max_steps,
    )  # fmt: skip
    write_text(target, page)
    return target


def mean(by: Mapping[str, float]) -> float:
    """The mean over clients."""
    return sum(by.values()) / len(by)


def lead(found: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    losses = found["losses"]
    had, got, shared = (mean(losses[m]) for m in (ALONE, TOGETHER, SHARED))
    better = [n for n, x in losses[TOGETHER].items() if x < losses[ALONE][n]]
    worse = [n for n in losses[ALONE] if n not in better]
    text = (
        f"Alone {had:.4f}, together {got:.4f}, with all rows shared {shared:.4f} nats a token, on their held-out rows. "
    )
    if not worse:
        return text + "Every client is better off together than alone."
    if not better:
        return text + "No client is better off together than alone: collaboration gains nothing here."
    return text + f"Better off together: {', '.join(better)}; better off alone: {', '.join(worse)}."


def _arriving(found: Mapping[str, Any]) -> Any:
    points = [(float(i), a["loss"]) for i, a in enumerate(found["arrivals"], 1)]
    return line_chart(
        [Series("mean so far", points)],
        "messages that have arrived",
        "nats a token",
        "loss on all held-out rows",
        False,
    )


def _along(found: Mapping[str, Any]) -> Any:
    line = [Series("loss", found["line"])]
    return line_chart(line, "multiple of the result", "nats a token", "loss on all held-out rows", False)
