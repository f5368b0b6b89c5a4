"""A server of rounds: it asks clients, waits for their messages, adds them up, and asks again."""

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
    """What every protocol of rounds shares; `accept`, `add_up`, `state` and `disclosure` are a protocol's own.

    waits_for      kind of the clients' messages
    report         what came of it, for a page
    run, base      digest of the contract, and of the model
    participation  share of the clients that a round asks; which ones is known before training starts
    journal        where arrivals and closed rounds are kept; a server with the journal of a killed one goes on where it was
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
        self.heard: set[str] = set()  # whoever has sent something that counts
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

    # --- a protocol's own ---

    def accept(self, message: Message) -> None:
        """Raises Refused for a payload that cannot be added up."""
        raise NotImplementedError

    def add_up(self, arrived: Mapping[str, Message]) -> None:
        """Take in a round's messages; senders come in the order of their names."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Tensors that the next round's clients start from, by name."""
        raise NotImplementedError

    def outcome(self, client: str) -> Update:
        """What a client ends with. Raises LuthierError for one that gets nothing."""
        raise NotImplementedError

    def disclosure(self, out: Sent) -> Disclosure:
        """What a message that it is about to send tells, and to whom."""
        raise NotImplementedError

    def so_far(self) -> Update | None:
        """What everybody would be given if the round closed now; None where it is not the same for all, or nothing has
        arrived."""
        return None

    def notes(self) -> dict[str, str]:
        """What belongs to the tensors of `state`."""
        return {}

    # --- the same for all ---

    @property
    def finished(self) -> bool:
        return self.round == self.rounds

    def chosen(self, round: int) -> tuple[str, ...]:
        """The clients of a round."""
        count = max(1, int(self.participation * len(self.clients) + 0.5))
        drawn = Streams(self.seed).at("clients", round).choice(len(self.clients), size=count, replace=False)
        return tuple(self.clients[i] for i in sorted(drawn.tolist()))

    def begin(self) -> list[Sent]:
        """The states that this round's clients wait for; after a restart, of those that have not answered. At the end, the
        results once more."""
        if self.finished:
            return self.results()
        return [Sent(name, self._state("state")) for name in self.chosen(self.round) if name in self.gathering.missing]

    def handle(self, event: Message | Tick) -> list[Sent]:
        """A client's message, or the end of a round's time: then whoever has arrived counts.

        Raises LuthierError where everybody declined: there is nothing to close the round with.
        """
        if isinstance(event, Tick):
            return self._close() if self.gathering.arrived and not self.finished else []
        try:
            if self.finished:
                raise Refused("round", f"{event.header.sender} sent for round {event.header.round}, all are closed")
            if event.header.kind == "refusal":
                self.gathering.decline(event)
            else:
                self.gathering.take(event)
        except Refused as error:
            return [refusal(error, event, self.name, self.base)]
        if self.gathering.missing:
            return []
        if not self.gathering.arrived:
            raise LuthierError(
                f"round {self.round}: {', '.join(sorted(self.gathering.declined))} will not send anything"
            )
        return self._close()

    def back(self, client: str) -> list[Sent]:
        """What a client that comes, or comes again, waits for."""
        if self.finished:
            return [s for s in self.results() if s.to == client]
        self.gathering.declined.discard(client)
        return [Sent(client, self._state("state"))] if client in self.gathering.missing else []

    def results(self) -> list[Sent]:
        """What all clients get at the end."""
        return [Sent(name, self._state("result")) for name in self.clients]

    def _gathering(self, known: Sequence[Message] = ()) -> Gathering:
        asked = self.chosen(self.round)
        return Gathering(self.waits_for, self.run, self.base, asked, self.accept, self.journal, self.round, known)

    def _close(self) -> list[Sent]:
        self._next()
        if self.journal is not None:  # so that a restarted server does not open the round again
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
    """p_i = n_i / sum of n_j. Raises ValueError for no client, or one without rows."""
    for name, n in rows.items():
        if n <= 0:
            raise ValueError(f"{name} has {n} rows; a client without rows has nothing to weigh")
    if not rows:
        raise ValueError("no client has sent an update")
    return {name: n / sum(rows.values()) for name, n in rows.items()}


def rows_of(message: Message) -> int:
    """How many rows the sender tuned on. Raises Refused where that is no number above zero."""
    rows = message.header.notes.get("rows")
    if not isinstance(rows, int) or rows < 1:
        raise Refused("rows", f"{message.header.sender}: {rows!r} rows; its weight would be nothing")
    return rows
