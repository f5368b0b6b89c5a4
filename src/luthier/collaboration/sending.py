"""A client's work: tune on rows that stay, audit exactly the bytes that would leave, and let them leave or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from luthier.collaboration.audit.canaries import Canary, canaries, memory
from luthier.collaboration.audit.canaries import rows_of as planted_rows
from luthier.collaboration.audit.gate import LIMITS, Answer, Leaks, Limits, Verdict, answers, judged
from luthier.collaboration.audit.membership import membership
from luthier.collaboration.audit.tokens import Found, TokenAudit
from luthier.collaboration.base import Disclosure
from luthier.collaboration.contract import Contract, start_of
from luthier.collaboration.folder import Place
from luthier.collaboration.messages import Message
from luthier.collaboration.packing import factor_deltas, unpack
from luthier.collaboration.rounds import SERVER
from luthier.collaboration.wire import unpacked
from luthier.errors import LuthierError
from luthier.model.view import ModelView
from luthier.report.audit import write_audit
from luthier.rng import Streams
from luthier.scorer import row_scores
from luthier.training.checkpoint import write_text
from luthier.tuners.lora import Lora
from luthier.update import LowRank, Update

Say = Callable[[str], None]
OTHERS = 100  # made-up secrets for each canary: 6.7 bits of exposure at most, minutes for a model of 135M weights
Payloads = Sequence[tuple[Mapping[str, Tensor], Sequence[int]]]  # of public rows, with their tokens


class Audited(NamedTuple):
    """A message that is ready, and what it would give away."""

    message: Message
    disclosure: Disclosure
    leaks: Leaks
    verdict: Verdict
    answers: list[Answer]
    update: Update  # of the model that was tuned


def prepared(
    place: Place, name: str, rows: Sequence[Any], held: Sequence[Any], num_canaries: int = 100, say: Say = lambda _: None,
    limits: Limits = LIMITS, public: Payloads = (), others: int = OTHERS,
) -> Audited:  # fmt: skip
    """Tune under the contract and audit what would be sent.

    held          rows of the same sort that are not tuned on; empty leaves membership out
    num_canaries  made-up records tuned on beside the rows, to see what is remembered of single ones; 0 leaves that out
    public        payloads of public rows by the same recipe: without them only exact leaks of tokens are seen
    others        made-up secrets that each canary is ranked among
    """
    streams = Streams(place.contract.settings.seed)
    known, controls = canaries(num_canaries, streams) if num_canaries else ([], [])
    everything = [*rows, *planted_rows(known, place.renderer)]
    party = place.protocol.client(name, place.contract, place.first, everything)
    say(f"tune    {len(rows)} rows and {len(known)} canaries" + _promise(place))
    base = place.first.base
    (sent,) = party.answer(Message.of("state", place.contract.digest, SERVER, base, {}))
    disclosure = party.disclosure(sent)
    update = update_of(place, sent.message)
    say(
        f"audit   tokens, {2 * len(known)} canaries among {others} made-up secrets each, "
        f"membership of {len(rows) + len(held)} rows"
    )
    tokens, untold = _tokens(place, update, rows, public)
    leaks = Leaks(
        tokens,
        _memory(place, update, known, controls, others) if known else None,
        _membership(place, update, rows, held) if len(held) else None,
        untold,
    )
    epsilon = None if place.contract.privacy is None else place.contract.privacy.epsilon
    verdict = judged(leaks, limits, epsilon)
    return Audited(sent.message, disclosure, leaks, verdict, answers(disclosure, leaks, verdict, epsilon), update)


def send(audited: Audited, folder: Path, anyway: bool = False) -> Path:
    """Write NAME.message, with what was found beside it. Raises LuthierError where the gate is shut."""
    name = audited.message.header.sender
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "disclosure": audited.disclosure._asdict(), "verdict": audited.verdict._asdict(),
        "answers": [a._asdict() for a in audited.answers],
    }  # fmt: skip
    write_text(folder / f"{name}.audit.json", json.dumps(found, indent=1))
    page = write_audit(folder / f"{name}.html", name, audited)
    if audited.verdict.outcome == "fail" and not anyway:
        raise LuthierError(
            f"{name}: not written, since {audited.verdict.failures[0]}; see {page}, or use --send-anyway to send it as it is"
        )
    target = folder / f"{name}.message"
    temporary = target.with_suffix(".part")
    temporary.write_bytes(audited.message.encode())
    temporary.rename(target)
    return target


def update_of(place: Place, message: Message) -> Update:
    """What a message would do to the model that was tuned."""
    if isinstance(place.contract, Contract):
        return start_of(place.first, place.contract.tuner).update(message.tensors()["update"])
    return unpacked(message)


def _promise(place: Place) -> str:
    p = place.contract.privacy
    return "" if p is None else f", epsilon {p.epsilon:g} at delta {p.delta:g}"


def factors(place: Place, update: Update) -> dict[str, Tensor] | None:
    """A - A0 and B of a LoRA update, by "a.NAME" and "b.NAME"; None for other updates."""
    tuner = getattr(place.contract, "tuner", None)
    if not isinstance(tuner, Lora) or len(update.parts) != 1 or not isinstance(update.parts[0], LowRank):
        return None
    return factor_deltas(update.parts[0], start_of(place.first, tuner).chart)


def public_payloads(place: Place, sets: Sequence[tuple[Tensor, Sequence[Any]]]) -> Payloads:
    """From shadow sets: (packed update, rows) of each."""
    assert isinstance(place.contract, Contract)
    return [(unpack(x, place.contract.small.shapes), _distinct(rows)) for x, rows in sets]


def _tokens(place: Place, update: Update, rows: Sequence[Any], public: Payloads) -> tuple[list[Found] | None, str]:
    """(what each tensor gives away, or None and why it was not looked at)."""
    payload = factors(place, update)
    if payload is None:
        return None, "they are looked for in the factors of LoRA alone"
    initial = start_of(place.first, place.contract.tuner).chart.initial  # type: ignore[attr-defined]
    try:
        audit = TokenAudit(place.first, {n.removeprefix("a."): t for n, t in initial.items()})
    except ValueError as error:  # no projection of the first block was tuned, or its inputs tell more than the token
        return None, str(error)
    if public:
        audit.calibrate([p for p, _ in public], [t for _, t in public])
    return audit(payload, _distinct(rows)), ""


def _distinct(rows: Sequence[Any]) -> list[int]:
    return sorted({int(t) for r in rows for t in r["ids"]})


def _memory(place: Place, update: Update, known: list[Canary], controls: list[Canary], others: int) -> Any:
    with update.bind(place.first) as view:
        tokens = 2 * place.contract.settings.tokens_per_forward
        streams = Streams(place.contract.settings.seed)
        return memory(
            view, place.renderer, known, controls, others=others, tokens_per_forward=tokens, samples=20, streams=streams
        )


def _membership(place: Place, update: Update, rows: Sequence[Any], held: Sequence[Any]) -> Any:
    """By how much each row's loss fell."""
    tokens, view = 2 * place.contract.settings.tokens_per_forward, place.first
    before = [_losses(view, r, tokens) for r in (rows, held)]
    with update.bind(view):
        after = [_losses(view, r, tokens) for r in (rows, held)]
    delta = 0.0 if place.contract.privacy is None else place.contract.privacy.delta
    return membership(before[0] - after[0], before[1] - after[1], delta)


def _losses(view: ModelView, rows: Sequence[Any], tokens: int) -> np.ndarray:
    return np.array([s.total / max(s.over, 1) for s in row_scores(view, rows, tokens, "causal-lm")])
