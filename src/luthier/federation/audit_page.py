"""The page of an audit: five questions of a person who is asked to send a message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.collaboration.audit.gate import Answer, Verdict
from luthier.report.page import template
from luthier.support.files import write_text
from luthier.support.version import __version__

SAYS = {
    "pass": ("good", "it may be sent"),
    "fail": ("bad", "it must not be sent as it is"),
    "unknown": ("", "nothing failed, but too little was measured to call it safe"),
}


def write_audit(target: Path, name: str, verdict: Verdict, answers: Sequence[Answer]) -> Path:
    """Write the page of one message. name: of the party that would send it."""
    tone, says = SAYS[verdict.outcome]
    page = template("audit.html").render(
        name=f"What {name} would send", tone=tone, says=says, answers=answers, version=__version__
    )
    write_text(target, page)
    return target
