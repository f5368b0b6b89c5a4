"""A client's work: tune on its own rows, audit the exact bytes that it would send, and send them or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from luthier.collaboration.audit.canaries import Canary, Memory, canaries, memory, planted_rows
from luthier.collaboration.audit.gate import LIMITS, Answer, Leaks, Limits, Verdict, answers, judged
from luthier.collaboration.audit.membership import Membership, membership
from luthier.collaboration.audit.tokens import Found, TokenAudit, distinct
from luthier.collaboration.contract import Contract, start_of
from luthier.collaboration.messages import Message
from luthier.collaboration.parties import Disclosure
from luthier.collaboration.rounds import SERVER
from luthier.federation.audit_page import write_audit
from luthier.federation.folder import Workspace
from luthier.inference.scoring import row_scores
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError
from luthier.support.files import replaced, write_text
from luthier.support.progress import Lines, Say
from luthier.tuners.lora import Lora
from luthier.update import LowRank, Update
from luthier.update.packing import factor_deltas, unpack

OTHERS = 100  # made-up secrets for each canary: 6.7 bits of exposure at most, minutes for a model of 135M weights
Payloads = Sequence[tuple[Mapping[str, Tensor], Sequence[int]]]  # payloads of public rows, with their tokens


class AuditFailed(LuthierError):
    """Raised for a message whose audit failed: it is not written and not sent."""


class AuditSettings(NamedTuple):
    """How thoroughly a client audits what it would send.

    held      rows of the same kind that are not tuned on; empty: no membership audit
    canaries  number of made-up records tuned on beside the rows, to see what the model remembers of single rows; 0: none
    others    number of made-up secrets that each canary is ranked among
    limits    of the gate
    """

    held: Sequence[Any] = ()
    canaries: int = 100
    others: int = OTHERS
    limits: Limits = LIMITS


USUAL = AuditSettings()


class Audited(NamedTuple):
    """A message that is ready, and what it would reveal."""

    message: Message
    disclosure: Disclosure
    leaks: Leaks
    verdict: Verdict
    answers: list[Answer]
    update: Update  # of the tuned model


def prepared(
    workspace: Workspace, name: str, rows: Sequence[Any], look: AuditSettings = USUAL, state: Message | None = None,
    say: Say = lambda _: None,
) -> Audited:  # fmt: skip
    """Tune under the contract and audit what would be sent.

    state  the state that a server sent; None: the first state of the protocol
    """
    streams, contract = workspace.lab.streams, workspace.contract
    known, controls = canaries(look.canaries, streams) if look.canaries else ([], [])
    party = workspace.protocol.client(
        name, contract, workspace.first, [*rows, *planted_rows(known, workspace.lab.renderer)]
    )
    party.counted, party.progress = len(rows), Lines(say)
    if state is None:
        tensors = workspace.protocol.beginning(contract)
        state = Message.of("state", contract.digest, SERVER, workspace.first.base, tensors)
    say(f"tune    {len(rows)} rows and {len(known)} canaries" + _promise(workspace))
    (sent,) = party.handle(state)
    disclosure, update = party.disclosure(sent), party.moved(sent.message)
    say(
        f"audit   tokens, {2 * len(known)} canaries among {look.others} made-up secrets each, "
        f"membership of {len(rows) + len(look.held)} rows"
    )
    start, _ = party.start(state).to("dense")
    with start.bind(workspace.first):  # an observer knows the state from which the client started
        tokens, untested = _tokens(workspace, update, rows)
        remembered = _memory(workspace, update, known, controls, look.others, say) if known else None
        members = _membership(workspace, update, rows, look.held) if len(look.held) else None
    leaks = Leaks(tokens, remembered, members, untested)
    epsilon = None if contract.privacy is None else contract.privacy.epsilon
    verdict = judged(leaks, look.limits, epsilon)
    return Audited(sent.message, disclosure, leaks, verdict, answers(disclosure, leaks, verdict, epsilon), update)


def send(audited: Audited, folder: Path, anyway: bool = False, stem: str | None = None) -> Path:
    """Write STEM.message, with the audit's page beside it. Raises AuditFailed if the audit failed.

    stem  of the file names; None: the sender's name
    """
    stem = stem or audited.message.header.sender
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "disclosure": audited.disclosure._asdict(), "verdict": audited.verdict._asdict(),
        "answers": [a._asdict() for a in audited.answers],
    }  # fmt: skip
    write_text(folder / f"{stem}.audit.json", json.dumps(found, indent=1))
    page = write_audit(folder / f"{stem}.html", audited.message.header.sender, audited.verdict, audited.answers)
    if audited.verdict.outcome == "fail" and not anyway:
        raise AuditFailed(
            f"{stem}: not written, because {audited.verdict.failures[0]}; see {page}, or use --send-anyway to send it as it is"
        )
    target = folder / f"{stem}.message"
    with replaced(target) as temporary:
        temporary.write_bytes(audited.message.encode())
    return target


def _promise(workspace: Workspace) -> str:
    p = workspace.contract.privacy
    return "" if p is None else f", epsilon {p.epsilon:g} at delta {p.delta:g}"


def factors(workspace: Workspace, update: Update) -> dict[str, Tensor] | None:
    """A - A0 and B of a LoRA update, by "a.NAME" and "b.NAME"; None for other updates."""
    tuner, part = workspace.contract.tuner, update.only(LowRank)
    if not isinstance(tuner, Lora) or part is None:
        return None
    return factor_deltas(part, start_of(workspace.first, tuner).chart)


def public_payloads(workspace: Workspace) -> Payloads:
    """Payloads of public rows that the provider passed on; none if it did not."""
    found = workspace.calibrated()
    if not found:
        return ()
    assert isinstance(workspace.contract, Contract)
    return [(unpack(x, workspace.contract.small.shapes), tokens) for x, tokens in found]


def _tokens(workspace: Workspace, update: Update, rows: Sequence[Any]) -> tuple[list[Found] | None, str]:
    """(what each tensor reveals, or None and the reason why nothing was tested). Without public payloads to compare with, only
    exact leaks are found."""
    payload, public, tuner = factors(workspace, update), public_payloads(workspace), workspace.contract.tuner
    if payload is None or not isinstance(tuner, Lora):
        return None, "this audit reads only the factors of LoRA"
    initial = start_of(workspace.first, tuner).chart.initial
    try:
        audit = TokenAudit(workspace.first, {n.removeprefix("a."): t for n, t in initial.items()})
    except ValueError as error:  # no projection of block 0 was tuned, or its inputs depend on more than the token
        return None, str(error)
    if public:
        audit.calibrate([p for p, _ in public], [t for _, t in public])
    return audit(payload, distinct(rows)), ""


def _memory(
    workspace: Workspace, update: Update, known: list[Canary], controls: list[Canary], others: int, say: Say
) -> Memory:
    with update.bind(workspace.first) as view:
        tokens = 2 * workspace.contract.settings.tokens_per_forward
        streams = workspace.lab.streams
        return memory(
            view, workspace.lab.renderer, known, controls, others=others, tokens_per_forward=tokens, streams=streams,
            progress=Lines(say),
        )  # fmt: skip


def _membership(workspace: Workspace, update: Update, rows: Sequence[Any], held: Sequence[Any]) -> Membership:
    """How much the loss of each row fell."""
    tokens, view = 2 * workspace.contract.settings.tokens_per_forward, workspace.first
    before = [_losses(view, r, tokens) for r in (rows, held)]
    with update.bind(view):
        after = [_losses(view, r, tokens) for r in (rows, held)]
    delta = 0.0 if workspace.contract.privacy is None else workspace.contract.privacy.delta
    return membership(before[0] - after[0], before[1] - after[1], delta)


def _losses(view: ModelView, rows: Sequence[Any], tokens: int) -> np.ndarray:
    return np.array([s.total / max(s.over, 1) for s in row_scores(view, rows, tokens)])
