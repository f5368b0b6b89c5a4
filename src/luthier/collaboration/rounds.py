"""A server with rounds: it asks clients, waits for their messages, adds them up, and asks again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Kind, Message, Refused
from luthier.collaboration.parties import Disclosure, Gathering, Sent, Tick, refusal
from luthier.model.fingerprint import Fingerprint
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.update import Update

SERVER = "server"


class RoundServer:
    """A server, as far as all protocols share it. `accept`, `add_up`, `state` and `disclosure` differ between protocols.

    waits_for      the kind of the clients' messages
    report         the results, for a page
    run, base      digest of the contract, and of the model
    participation  share of the clients that a round asks; the choice is known before training starts
    journal        stores arrivals and closed rounds; a server with the journal of a killed one continues from there
    """

    name = SERVER
    waits_for: Kind = "update"
    report: Any = ()

    def __init__(
        self, run: str, base: Fingerprint, rounds: int, clients: Sequence[str], journal: Journal | None = None,
        participation: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.run, self.base, self.rounds, self.clients = run, base, rounds, tuple(sorted(clients))
        self.journal, self.participation, self.seed, self.round = journal, participation, seed, 0
        self.heard: set[str] = set()  # senders of messages that count
        known: dict[int, list[Message]] = {}
        closed = set()
        for message in journal or ():
            if message.header.kind == self.waits_for:
                known.setdefault(message.header.round, []).append(message)
            elif message.header.sender == self.name:  # the state that opened the next round, or the result
                closed.add(message.header.round - 1)
        self.gathering = self._gathering(known.get(0, ()))
        while self.round < rounds and (self.round in closed or not self.gathering.missing):
            self._next(known.get(self.round + 1, ()))

    # --- different in each protocol ---

    def accept(self, message: Message) -> None:
        """Raises Refused for a payload that cannot be added up."""
        raise NotImplementedError  # the seam: every server has its own

    def add_up(self, arrived: Mapping[str, Message]) -> None:
        """Add up a round's messages. Senders come in the order of their names."""
        raise NotImplementedError  # the seam: every server has its own

    def state(self) -> dict[str, Any]:
        """The tensors, by name, that the next round's clients start from."""
        raise NotImplementedError  # the seam: every server has its own

    def outcome(self, client: str) -> Update:
        """The final update of a client. Raises LuthierError if it gets none."""
        raise NotImplementedError  # the seam: every server has its own

    def disclosure(self, out: Sent) -> Disclosure:
        """What a message that it is about to send reveals, and to whom."""
        raise NotImplementedError  # the seam: every server has its own

    def so_far(self) -> Update | None:
        """The result that all would get if the round closed now; None if it differs between clients, or if nothing has
        arrived."""
        return None

    def notes(self) -> dict[str, str]:
        """Small values that belong to the tensors of `state`."""
        return {}

    # --- the same in all protocols ---

    @property
    def finished(self) -> bool:
        return self.round == self.rounds

    def chosen(self, round: int) -> tuple[str, ...]:
        """The clients of a round."""
        count = max(1, int(self.participation * len(self.clients) + 0.5))
        drawn = Streams(self.seed).at("clients", round).choice(len(self.clients), size=count, replace=False)
        return tuple(self.clients[i] for i in sorted(drawn.tolist()))

    def begin(self) -> list[Sent]:
        """The states for this round's clients. After a restart, only for clients that have not answered. At the end, the results
        again."""
        if self.finished:
            return self.results()
        return [Sent(name, self._state("state")) for name in self.chosen(self.round) if name in self.gathering.missing]

    def handle(self, event: Message | Tick) -> list[Sent]:
        """Handle a client's message, or the end of a round's time: then the messages that have arrived count.

        Raises LuthierError if all clients declined, because then the round has no update.
        """
        if isinstance(event, Tick):
            return self._close() if self.gathering.arrived and not self.finished else []
        try:
            if self.finished:
                raise Refused("round", f"{event.header.sender} sent for round {event.header.round + 1}, all are closed")
            if event.header.kind == "refusal":
                self.gathering.decline(event)
            else:
                self.gathering.take(event)
        except Refused as error:
            return [refusal(error, event, self.name, self.base)]
        if self.gathering.missing:
            return []
        if not self.gathering.arrived:
            declined = ", ".join(sorted(self.gathering.declined))
            raise LuthierError(f"round {self.round + 1}: {declined} will not send anything")
        return self._close()

    def back(self, client: str) -> list[Sent]:
        """The messages for a client that joins, or joins again."""
        if self.finished:
            return [s for s in self.results() if s.to == client]
        self.gathering.declined.discard(client)
        return [Sent(client, self._state("state"))] if client in self.gathering.missing else []

    def results(self) -> list[Sent]:
        """The results for all clients at the end."""
        return [Sent(name, self._state("result")) for name in self.clients]

    def _gathering(self, known: Sequence[Message] = ()) -> Gathering:
        asked = self.chosen(self.round)
        return Gathering(self.waits_for, self.run, self.base, asked, self.accept, self.journal, self.round, known)

    def _close(self) -> list[Sent]:
        self._next()
        if self.journal is not None:  # so that a restarted server does not open this round again
            self.journal.append(self._state("result" if self.finished else "state"))
        return self.results() if self.finished else self.begin()

    def _next(self, known: Sequence[Message] = ()) -> None:
        self.heard |= self.gathering.arrived.keys()
        self.add_up(dict(sorted(self.gathering.arrived.items())))
        self.round += 1
        if not self.finished:
            self.gathering = self._gathering(known)

    def _state(self, kind: Kind) -> Message:
        return Message.of(kind, self.run, self.name, self.base, self.state(), round=self.round, notes=self.notes())


def shares(rows: Mapping[str, int]) -> dict[str, float]:
    """p_i = n_i / sum of n_j. Raises ValueError if there is no client, or one without rows."""
    for name, n in rows.items():
        if n <= 0:
            raise ValueError(f"{name} has {n} rows; a client without rows has no weight")
    if not rows:
        raise ValueError("no client has sent an update")
    return {name: n / sum(rows.values()) for name, n in rows.items()}


def rows_of(message: Message) -> int:
    """The number of rows that the sender tuned on. Raises Refused unless it is a number above zero."""
    rows = message.header.notes.get("rows")
    if not isinstance(rows, int) or rows < 1:
        raise Refused("rows", f"{message.header.sender}: {rows!r} rows; its weight would be zero")
    return rows
