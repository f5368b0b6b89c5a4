"""FedKSeed's rounds: a server with K numbers, clients that send (seed, number) pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, SerializeAsAny
from torch import Tensor

from luthier.collaboration.base import Disclosure, Gathering, Sent, Tick, refusal
from luthier.collaboration.fedkseed import FedKSeed, FedKSeedTrainable, seed_pool, seed_probabilities
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused
from luthier.model.fingerprint import Fingerprint
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.rng import Streams
from luthier.training.loop import Loop
from luthier.training.settings import TrainSettings
from luthier.update import Seeds, Update
from luthier.update.parts import noise

SERVER = "server"
SEEDS_LIMIT = 2**16  # seed indices travel as two bytes


class SeedContract(BaseModel, frozen=True, extra="forbid"):
    """What all parties of a federation agree on."""

    base: Fingerprint
    weights: str
    """Digest of names, shapes and precision of what is tuned, with the first numbers of the first direction: parties
    whose generators differ would train different models without noticing."""
    shapes: dict[str, tuple[int, ...]]
    """Of what is tuned, in the order that directions are drawn in."""
    tuner: SerializeAsAny[FedKSeed]
    settings: TrainSettings
    rounds: int = Field(ge=1)
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that take part in a round."""
    pro: bool = False
    """Draw seeds by how much they moved the loss so far."""
    seed: int = Field(0, ge=0)
    """For the choice of clients."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def seed_contract(view: ModelView, tuner: FedKSeed, settings: TrainSettings, rounds: int, **more: Any) -> SeedContract:
    """The contract that this model makes. Raises ValueError for more seeds than two bytes count."""
    if tuner.num_seeds > SEEDS_LIMIT:
        raise ValueError(f"num_seeds = {tuner.num_seeds}: seeds travel as two bytes, so {SEEDS_LIMIT} at most")
    return SeedContract(
        base=view.base, weights=weights_digest(view, tuner), shapes=view.anatomy.parameters, tuner=tuner,
        settings=settings, rounds=rounds, **more,
    )  # fmt: skip


def weights_digest(view: ModelView, tuner: FedKSeed) -> str:
    first = int(seed_pool(tuner.num_seeds, tuner.seed_pool)[0])
    said = [
        (n, list(view.weight(n).shape), str(view.weight(n).dtype), noise(first, i, (8,)).tolist())
        for i, n in enumerate(view.anatomy.parameters)
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class SeedServer:
    """Holds A[j], the weighted sum of all scalars seen on seed j; that and the base are the model.

    journal  where arrivals and closed rounds are kept; a server with the journal of a killed one goes on where it was
    """

    name = SERVER

    def __init__(self, contract: SeedContract, clients: Sequence[str], journal: Journal | None = None) -> None:
        self.contract, self.clients, self.journal = contract, tuple(sorted(clients)), journal
        k = contract.tuner.num_seeds
        self.scalars = torch.zeros(k, dtype=torch.float64)
        self.history: list[list[float]] = [[0.0] for _ in range(k)]
        self.round = 0
        self.gathering = self._gathering()
        closed = {m.header.round - 1 for m in journal or () if m.header.kind == "state"}
        while self.round in closed or (self.round < contract.rounds and not self.gathering.missing):
            self._add_up()

    def chosen(self, round: int) -> tuple[str, ...]:
        """The clients of a round: known before training starts."""
        count = max(1, round_half_up(self.contract.participation * len(self.clients)))
        drawn = Streams(self.contract.seed).at("clients", round).choice(len(self.clients), size=count, replace=False)
        return tuple(self.clients[i] for i in sorted(drawn.tolist()))

    def begin(self) -> list[Sent]:
        """The states that this round's clients wait for; after a restart, of those that have not answered."""
        if self.round == self.contract.rounds:
            return []
        return [Sent(name, self._state()) for name in self.chosen(self.round) if name in self.gathering.missing]

    def handle(self, event: Message | Tick) -> list[Sent]:
        """A client's scalars, or the end of a round's time: then whoever has arrived counts."""
        if isinstance(event, Tick):
            return self._close() if self.gathering.arrived else []
        try:
            if self.round == self.contract.rounds:
                raise Refused("round", f"{event.header.sender} sent for round {event.header.round}, all are closed")
            self.gathering.take(event)
        except Refused as error:
            return [refusal(error, event, self.name, self.contract.base)]
        return [] if self.gathering.missing else self._close()

    def disclosure(self, out: Sent) -> Disclosure:
        return Disclosure(
            f"the sum over all clients and rounds of one number for each of {len(self.scalars)} seeds", out.to,
            sizes(out.message), "nothing", "no formal privacy",
        )  # fmt: skip

    def update(self) -> Update:
        """What has been learnt, as seeds and scalars."""
        return update_of(self.contract, self.scalars.float())

    def _gathering(self) -> Gathering:
        c = self.contract
        return Gathering("scalars", c.digest, c.base, self.chosen(self.round), self._accept, self.journal, self.round)

    def _accept(self, message: Message) -> None:
        head, k = message.header, len(self.scalars)
        tensors = message.tensors()
        index, value = tensors.get("index"), tensors.get("scalar")
        if index is None or value is None or index.shape != value.shape or index.ndim != 1:
            raise Refused("shape", f"{head.sender}: seed indices and scalars do not pair up")
        if len(index) != head.notes.get("steps"):
            raise Refused(
                "length", f"{head.sender}: {len(index)} scalars where {head.notes.get('steps')} were announced"
            )
        if len(index) and int(index.to(torch.int64).max()) >= k:
            raise Refused("seed", f"{head.sender}: seed {int(index.to(torch.int64).max())} of {k}")
        if value.dtype != torch.float32 or not value.isfinite().all():
            raise Refused("not-finite", f"{head.sender}: a scalar is not finite, or no float32")
        rows = head.notes.get("rows")
        if not isinstance(rows, int) or rows < 1:
            raise Refused("rows", f"{head.sender}: {rows!r} rows; its weight would be nothing")

    def _close(self) -> list[Sent]:
        self._add_up()
        if self.journal is not None:  # so that a restarted server does not open the round again
            self.journal.append(self._state())
        return self.begin()

    def _add_up(self) -> None:
        arrived = sorted(self.gathering.arrived.items())
        total = sum(int(m.header.notes["rows"]) for _, m in arrived)
        for _, message in arrived:
            tensors = message.tensors()
            index, value = tensors["index"].to(torch.int64), tensors["scalar"].double()
            self.scalars.index_add_(0, index, value, alpha=int(message.header.notes["rows"]) / total)
            for j, g in zip(index.tolist(), value.tolist(), strict=True):
                self.history[j].append(g)
        self.round += 1
        if self.round < self.contract.rounds:
            self.gathering = self._gathering()

    def _state(self) -> Message:
        tensors = {"scalars": self.scalars.float()}
        if self.contract.pro:
            tensors["probabilities"] = torch.from_numpy(seed_probabilities(self.history)).float()
        return Message.of("state", self.contract.digest, self.name, self.contract.base, tensors, round=self.round)


class SeedClient:
    """Rebuilds the model from the server's scalars, takes its steps, and sends what it saw: nothing else leaves."""

    def __init__(self, name: str, contract: SeedContract, view: ModelView, rows: Sequence[Any]) -> None:
        if weights_digest(view, contract.tuner) != contract.weights or not view.base.same_base(contract.base):
            raise Refused("base", f"{name}: its model, or the random numbers of its machine, are not the contract's")
        self.name, self.contract, self.view, self.rows = name, contract, view, rows
        self.refusals: list[str] = []

    def handle(self, event: Message | Tick) -> list[Sent]:
        if isinstance(event, Tick):
            return []
        if event.header.kind == "refusal":
            self.refusals.append(str(event.header.notes["says"]))
            return []
        if event.header.run != self.contract.digest:
            raise Refused("contract", f"{self.name} was sent a state of another federation")
        tensors = event.tensors()
        return [Sent(SERVER, self._trained(event.header.round, tensors["scalars"], tensors.get("probabilities")))]

    def disclosure(self, out: Sent) -> Disclosure:
        steps = out.message.header.notes["steps"]
        return Disclosure(
            f"{steps} numbers: how fast the loss on rows of {self.name} changes along agreed random directions",
            out.to, sizes(out.message), "nothing", "no formal privacy",
        )  # fmt: skip

    def _trained(self, round: int, scalars: Tensor, probabilities: Tensor | None) -> Message:
        c, streams = self.contract, Streams(self.contract.seed)
        own = int(streams.at("client", self.name, round).integers(2**31))
        tuner = c.tuner.model_copy(update={"seed": own})
        drawn = None if probabilities is None else probabilities.double().numpy()
        with update_of(c, scalars).bind(self.view):
            client: FedKSeedTrainable = tuner.attach(
                self.view, probabilities=None if drawn is None else drawn / drawn.sum()
            )
            try:
                loop = Loop(self.view, self.rows, client, Sft(), c.settings.model_copy(update={"seed": own}))
                for _ in range(loop.total_steps):
                    loop.step()
            finally:
                client.detach()
        index = torch.from_numpy(np.array([i for i, _ in client.observed], dtype=np.uint16))
        value = torch.tensor([g for _, g in client.observed], dtype=torch.float32)
        notes = {"steps": len(index), "rows": len(self.rows)}
        return Message.of(
            "scalars", c.digest, self.name, c.base, {"index": index, "scalar": value}, round=round, notes=notes
        )


def update_of(contract: SeedContract, scalars: Tensor) -> Update:
    """-eta * sum of scalars[j] z(seed j); scalars are the float32 numbers that travel, so that all parties agree."""
    tuner = contract.tuner
    used = scalars.nonzero().squeeze(1)
    seeds = torch.from_numpy(seed_pool(tuner.num_seeds, tuner.seed_pool))[used]
    steps = -contract.settings.learning_rate * scalars.double()[used]
    return Update(contract.base, (Seeds(seeds, steps, contract.shapes),))


def sizes(message: Message) -> tuple[int, int]:
    """(bytes of the numbers, bytes on the wire)."""
    return sum(t.numel() * t.element_size() for t in message.tensors().values()), len(message.encode())


def round_half_up(x: float) -> int:
    return int(x + 0.5)
