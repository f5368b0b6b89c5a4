"""The report at a collaboration's end: what arrived, what was refused, similarity to the shadow sets, worth of translation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.federation.folder import Workspace
from luthier.report.page import template
from luthier.support.files import write_text
from luthier.support.version import __version__


def write_translation(
    target: Path, workspace: Workspace, found: Mapping[str, Any], judged: Mapping[str, Any] | None
) -> Path:
    """found   "report" of the server: by sender (grad-transformer), or a list of clients with their weights (one-shot);
            "cosine" of the senders' updates, or None; "refused" by file
    judged  the result of `collaborate translator`; None if it was not run
    """
    report = found["report"]
    translates = isinstance(report, Mapping)
    senders = [{"name": n, **r} for n, r in report.items()] if translates else []
    page = template("translation.html").render(
        name=f"{workspace.path.name}: what came of it", senders=senders, counted=[] if translates else report,
        cosine=found["cosine"], refused=found["refused"], rows=judged_rows(judged),
        verdict=None if judged is None else judged["verdict"], sets=None if judged is None else judged["sets"],
        protocol=workspace.protocol.key(), digest=workspace.contract.digest[:12], version=__version__, translates=translates,
    )  # fmt: skip
    write_text(target, page)
    return target


def judged_rows(judged: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """A table row for each update of the large model: loss, and share of the true update's gain."""
    if judged is None:
        return []
    return [{"name": n, "loss": f"{f['loss']:.4f}", "share": f"{f['share']:.0%}"} for n, f in judged["judged"].items()]
