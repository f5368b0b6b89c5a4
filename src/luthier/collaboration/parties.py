"""Parties: state machines that take messages and answer with messages. They work the same in one process, over a network,
and when a journal is replayed after a kill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Kind, Message, Refused
from luthier.collaboration.privacy import Privacy
from luthier.collaboration.wire import unpacked
from luthier.model.fingerprint import Fingerprint
from luthier.support.errors import LuthierError
from luthier.support.progress import OnProgress, no_progress
from luthier.update import Update


class Tick(NamedTuple):
    """The time that a party waits for messages has ended."""


class Sent(NamedTuple):
    """A message and its receiver."""

    to: str
    message: Message


class Disclosure(NamedTuple):
    """What a message reveals.

    what     what is sent, in words
    to       who sees it
    bytes    of payload, and with the header
    unit     what a promise protects: "row" or "nothing"
    promise  "no formal privacy", or a privacy limit
    """

    what: str
    to: str
    bytes: tuple[int, int]
    unit: str = "nothing"
    promise: str = "no formal privacy"


class Party(Protocol):
    """A role in a protocol."""

    name: str

    def handle(self, event: Message | Tick) -> list[Sent]:
        """Take an event and return the messages to send. Equal events in equal order give equal answers, except for nonces."""

    def disclosure(self, out: Sent) -> Disclosure:
        """What a message that this party is about to send reveals, and to whom."""


def in_process(parties: Iterable[Party], first: Iterable[Sent], gate: Callable[[Sent, Disclosure], None]) -> None:
    """Deliver messages between parties of this process until there are none left.

    first  the messages to start with
    gate   is called with every message before it is delivered, and may raise an error to stop it
    """
    known = {p.name: p for p in parties}
    waiting = deque(first)
    while waiting:
        sent = waiting.popleft()
        sender = known.get(sent.message.header.sender)
        if sender is not None:
            gate(sent, sender.disclosure(sent))
        waiting.extend(known[sent.to].handle(sent.message))


class Member:
    """A client, as far as all protocols share it. `answer`, `disclosure` and `moved` differ between protocols.

    rows      the rows that it tunes on
    counted   the number of rows that it reports to the server; canaries of an audit do not count
    progress  is called after every step of its tuning
    refusals  what the server refused, and why
    result    the result that it got at the end
    """

    def __init__(self, name: str, run: str, rows: Sequence[Any]) -> None:
        self.name, self.run, self.rows, self.counted = name, run, rows, len(rows)
        self.progress: OnProgress = no_progress
        self.refusals: list[str] = []
        self.result: Message | None = None

    def answer(self, state: Message) -> list[Sent]:
        """The answer to a server's state."""
        raise NotImplementedError  # the seam: every party has its own

    def disclosure(self, out: Sent) -> Disclosure:
        """What a message that it is about to send reveals, and to whom."""
        raise NotImplementedError  # the seam: every party has its own

    def moved(self, message: Message) -> Update:
        """The change that one of its own messages makes to the tuned model."""
        raise NotImplementedError  # the seam: every party has its own

    def start(self, state: Message) -> Update:
        """The update in a server's state, which tuning starts from."""
        return Update(state.header.base, ())

    @property
    def update(self) -> Update:
        """The result at the end. Raises LuthierError before that."""
        if self.result is None:
            raise LuthierError(f"{self.name} has been given no result yet")
        return unpacked(self.result)

    def handle(self, event: Message | Tick) -> list[Sent]:
        """Handle a server's state, refusal or result. Raises Refused for those of another contract."""
        if isinstance(event, Tick):
            return []
        if event.header.kind == "refusal":
            self.refusals.append(str(event.header.notes["says"]))
            return []
        if event.header.run != self.run:
            raise Refused("contract", f"{self.name} was sent a {event.header.kind} of another contract")
        if event.header.kind == "result":
            self.result = event
            return []
        return self.answer(event)


def promised(privacy: Privacy | None) -> tuple[str, str]:
    """(unit, promise) of an update that was tuned on rows."""
    if privacy is None:
        return "nothing", "no formal privacy: weights remember rows, so audit before sending"
    said = f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} for whether a row is there or not"
    return "row", f"{said}; the number of rows is not protected"


def sizes(message: Message) -> tuple[int, int]:
    """(bytes of the numbers, bytes on the wire)."""
    return sum(t.numel() * t.element_size() for t in message.tensors().values()), len(message.encode())


class Gathering:
    """Collects one message from each expected sender. A message that cannot be used is refused with a name, and a message is on
    disk before it counts.

    kind     the kind of message that it waits for
    run      digest of the contract
    accept   raises Refused for a payload that this protocol cannot use
    journal  None: in memory only
    known    the messages of this round that the journal holds already

    declined  senders that said they will not send; they may change their mind while the round is open
    """

    def __init__(
        self, kind: Kind, run: str, base: Fingerprint, senders: Iterable[str], accept: Callable[[Message], None],
        journal: Journal | None = None, round: int = 0, known: Iterable[Message] = (),
    ) -> None:  # fmt: skip
        self.kind, self.run, self.base, self.senders, self.round = kind, run, base, frozenset(senders), round
        self.accept, self.journal = accept, journal
        self.arrived: dict[str, Message] = {}
        self.declined: set[str] = set()
        for message in known:
            self._check(message)
            self.arrived[message.header.sender] = message

    @property
    def missing(self) -> frozenset[str]:
        """Senders that may still send."""
        return self.senders - self.arrived.keys() - self.declined

    def decline(self, message: Message) -> None:
        """Note that a sender will not send. Raises Refused for one that was not asked."""
        self._asked(message)
        self.declined.add(message.header.sender)

    def take(self, message: Message) -> bool:
        """Take a message. Returns True if it is new, False for a duplicate. Raises Refused."""
        known = self.arrived.get(message.header.sender)
        if known is not None and known.digest == message.digest:
            return False
        self._check(message)
        if known is not None:
            raise Refused("second", f"{message.header.sender} has sent its message of round {self.round + 1} already")
        if self.journal is not None:
            self.journal.append(message)
        self.arrived[message.header.sender] = message
        self.declined.discard(message.header.sender)
        return True

    def _check(self, message: Message) -> None:
        self._asked(message)
        head = message.header
        if head.kind != self.kind:
            raise Refused("kind", f"{head.sender} sent {head.kind!r} but this round waits for {self.kind!r}")
        if head.base.weights != self.base.weights:
            raise Refused(
                "base", f"{head.sender} tuned {head.base.weights[:12]}, the contract's is {self.base.weights[:12]}"
            )
        if head.base.tokenizer != self.base.tokenizer:
            raise Refused("tokenizer", f"{head.sender} has another tokenizer or template than the contract's")
        self.accept(message)

    def _asked(self, message: Message) -> None:
        head = message.header
        if head.sender not in self.senders:
            raise Refused("unknown", f"{head.sender!r} is not one of the clients")
        if head.run != self.run:
            raise Refused("contract", f"{head.sender} is under contract {head.run[:12]}, this is {self.run[:12]}")
        if head.round != self.round:
            raise Refused("round", f"{head.sender} sent for round {head.round + 1}, this is round {self.round + 1}")


def refusal(error: Refused, message: Message, sender: str, base: Fingerprint) -> Sent:
    """The answer to a message that is refused."""
    head = message.header
    notes: Mapping[str, str] = {"name": error.name, "says": str(error)}
    return Sent(head.sender, Message.of("refusal", head.run, sender, base, {}, round=head.round, notes=notes))
