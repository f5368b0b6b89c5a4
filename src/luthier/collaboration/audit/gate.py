"""The gate: what an audit found, whether the message may be sent, and five answers for a reader."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, Field

from luthier.collaboration.audit.canaries import FEW as FEW_CANARIES
from luthier.collaboration.audit.canaries import Memory
from luthier.collaboration.audit.membership import FEW as FEW_ROWS
from luthier.collaboration.audit.membership import Membership
from luthier.collaboration.audit.tokens import FALSE_POSITIVES, Found
from luthier.collaboration.parties import Disclosure


class Limits(BaseModel, frozen=True, extra="forbid"):
    """Limits of an audit. Above one of them, nothing is sent."""

    token_recall: float = Field(0.1, ge=0, le=1)
    """Share of the true tokens that may be read from any tensor, at a false-positive rate of 1 in 10,000."""
    exposure_bits: float = Field(1.0, ge=0)
    """How many bits more than controls the canaries may stand out, on average."""
    extraction_errors: float = Field(3.0, ge=0)
    """How many standard errors more canaries than controls may come out completely."""


LIMITS = Limits()


class Leaks(NamedTuple):
    """What was measured; None for an audit that was left out. `untested` says why tokens were not looked for."""

    tokens: list[Found] | None
    memory: Memory | None
    membership: Membership | None
    untested: str = ""


class Verdict(NamedTuple):
    """outcome   "pass", "fail", or "unknown": nothing failed, but too little was measured for "pass"
    failures  why it must not be sent
    gaps      what was not measured, or was measured with too few rows
    """

    outcome: str
    failures: list[str]
    gaps: list[str]


def judged(leaks: Leaks, limits: Limits = LIMITS, epsilon: float | None = None) -> Verdict:
    """The verdict. epsilon: the claimed privacy limit, None if there is none."""
    failures, gaps = [], []
    for look in (_tokens, _memory):
        wrong, missing = look(leaks, limits)
        failures += wrong
        gaps += missing
    m = leaks.membership
    if m is None:
        gaps.append("membership was not measured: name held-out rows")
    else:
        if epsilon is not None and m.epsilon_low > epsilon:
            failures.append(
                f"epsilon is at least {m.epsilon_low:.2f}, but {epsilon:.2f} is claimed, so the claim is wrong"
            )
        if m.weak:
            gaps.append(f"membership: {m.members} tuned and {m.others} held-out rows; a bound needs {FEW_ROWS} of each")
    return Verdict("fail" if failures else "unknown" if gaps else "pass", failures, gaps)


def _tokens(leaks: Leaks, limits: Limits) -> tuple[list[str], list[str]]:
    if leaks.tokens is None:
        return [], ["tokens were not looked for" + (f": {leaks.untested}" if leaks.untested else "")]
    rate = FALSE_POSITIVES[0]
    worst = max(leaks.tokens, key=lambda f: f.recall.get(rate, 0.0))
    share = worst.recall.get(rate, 0.0)
    over = [f"{share:.0%} of the tokens can be read off {worst.tensor}"] if share > limits.token_recall else []
    return over, []


def _memory(leaks: Leaks, limits: Limits) -> tuple[list[str], list[str]]:
    m = leaks.memory
    if m is None:
        return [], ["no canaries were used, so it is unknown what the model remembers of single rows"]
    over, gaps = [], []
    if m.extracted > m.extracted_controls + limits.extraction_errors * m.extraction_error:
        over.append(
            f"{m.extracted:.0%} of the planted secrets come out whole, {m.extracted_controls:.0%} of the controls"
        )
    if m.exposure > m.exposure_controls + limits.exposure_bits:
        over.append(
            f"planted secrets stand out by {m.exposure:.1f} bits, controls by {m.exposure_controls:.1f} "
            f"(at most {m.highest:.1f})"
        )
    if m.weak:
        gaps.append(f"{m.canaries} canaries were planted; a verdict needs {FEW_CANARIES}")
    return over, gaps


class Answer(NamedTuple):
    """A reader's question, and the audit's answer."""

    question: str
    lines: list[str]


def answers(sent: Disclosure, leaks: Leaks, verdict: Verdict, epsilon: float | None = None) -> list[Answer]:
    """What is sent, to whom, what could be read from it, how sure that is, and what would lower it."""
    return [
        Answer("What is sent?", [f"{sent.what}: {sent.bytes[0]:,} bytes of numbers, {sent.bytes[1]:,} as sent"]),
        Answer(
            "To whom?",
            [f"{sent.to}, and everyone who can read its disk or the network to it", f"promise: {sent.promise}"],
        ),
        Answer("What could be read from it?", [*(verdict.failures or ["these attacks found nothing"]), *_read(leaks)]),
        Answer("How sure is that?", _sure(leaks, verdict, epsilon)),
        Answer("What would lower it?", _remedies(leaks, verdict, epsilon)),
    ]


def _read(leaks: Leaks) -> list[str]:
    out = []
    for f in leaks.tokens or []:
        if f.mode == "saturated":
            out.append(f"{f.tensor}: more tokens than directions ({f.width}), so this test says nothing")
        else:
            out.append(
                f"{f.tensor}: {f.recall.get(FALSE_POSITIVES[0], 0):.0%} of the tokens ({f.mode}, AUC {f.auc:.2f})"
            )
    if leaks.memory is not None:
        m = leaks.memory
        out.append(
            f"made-up secrets: {m.extracted:.0%} come out whole ({m.extracted_controls:.0%} of the controls); exposure "
            f"{m.exposure:.2f} bits ({m.exposure_controls:.2f} of the controls, standard error {m.error:.2f})"
        )
    if leaks.membership is not None:
        d = leaks.membership
        out.append(f"membership: AUC {d.auc:.2f}, {d.found:.1%} of the rows found at 1% false alarms")
    return out


def _sure(leaks: Leaks, verdict: Verdict, epsilon: float | None) -> list[str]:
    lines = ["these are luthier's own attacks: what they find can be read; a better attack may read more"]
    if leaks.membership is not None:
        d = leaks.membership
        lines.append(f"epsilon is at least {d.epsilon_low:.2f} with 95% confidence ({d.members} and {d.others} rows)")
    lines.append("no upper bound: there is no differential privacy" if epsilon is None
                 else f"upper bound: epsilon {epsilon:.2f}, by accounting")  # fmt: skip
    return [*lines, *verdict.gaps]


def _remedies(leaks: Leaks, verdict: Verdict, epsilon: float | None) -> list[str]:
    out = []
    if epsilon is None:
        out.append("tune with differential privacy: only this limits what any attack can find")
    elif verdict.failures:
        out.append("a smaller epsilon")
    m = leaks.memory
    if m is not None and m.exposure > m.exposure_controls + 2 * m.error:
        out.append("fewer epochs or a smaller learning rate: with both, the model remembers more of single rows")
    if leaks.tokens and any(f.recall.get(FALSE_POSITIVES[0], 0) > 0 for f in leaks.tokens):
        out.append("a smaller rank than there are distinct tokens, or leaving the first block out of the targets")
    out.append("secure aggregation over several clients, where only the sum is needed")
    return out
