"""FedKSeed's rounds: the server holds K numbers, and clients send (seed, number) pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.base import Collaboration
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused
from luthier.collaboration.parties import Disclosure, Member, Sent, sizes
from luthier.collaboration.rounds import SERVER, RoundServer, rows_of, shares
from luthier.method import Problem, Source, Traits
from luthier.model.fingerprint import Fingerprint
from luthier.model.view import ModelView, as_found
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.progress import steps
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.base import Tuner
from luthier.tuners.fedkseed import FedKSeed, FedKSeedTrainable, seed_pool, seed_probabilities
from luthier.update import Seeds, Update
from luthier.update.vectors import noise

SEEDS_LIMIT = 2**16  # seed indices travel as two bytes


class SeedRounds(Collaboration):
    """FedKSeed's rounds: clients send a few bytes for each step, (seed, number) pairs, and rebuild the model from all pairs.

    The server holds K numbers. These and the base model give the model, so a round's traffic is K numbers down and six bytes for
    each step up: 17,584 bytes with K = 4096 and 200 steps. With `pro`, seeds are drawn in proportion to how much they changed
    the loss so far. Then a smaller K is enough, but probabilities are sent down as well.
    A number is the slope of a client's loss along a known direction. So rows leave traces in it, and there is no privacy
    guarantee.
    Cost: no backward pass; each round, every client makes K directions once to rebuild the model.
    Refuses: other tuners than fedkseed, more seeds than two bytes can count.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), linear=True)
    source: ClassVar[Source] = Source(
        "Federated Full-Parameter Tuning of Billion-Sized LMs with Communication Cost under 18 Kilobytes", 2023,
        "arXiv:2312.06353", "algorithm 1, and Pro in section 4.4",
    )  # fmt: skip

    recipe_lines: ClassVar[tuple[str, ...]] = (
        "data: {train: builtin:requests}",
        "tuner: fedkseed",
        "collaborate: seed-rounds",
        "lr_scheduler_type: constant",
        "warmup_fraction: 0.0",
    )
    leaves: ClassVar[str] = (
        "a number a step of each client, the slope of its loss along an agreed direction; its number of rows"
    )

    rounds: int = Field(10, ge=1)
    """How often clients are asked."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that take part in a round."""
    pro: bool = False
    """Draw seeds in proportion to how much they changed the loss so far."""
    seed: int = Field(0, ge=0)
    """For the choice of clients."""

    @property
    def turns(self) -> int:
        return self.rounds

    def problems_with(self, tuner: Tuner) -> list[Problem]:
        if not isinstance(tuner, FedKSeed):
            return [Problem("tuner", f"{tuner.key()} sends no seeds", "set tuner: fedkseed")]
        if tuner.num_seeds > SEEDS_LIMIT:
            what = f"{tuner.num_seeds} seeds are too many, because they travel as two bytes"
            return [Problem("tuner.fedkseed.num_seeds", what, f"set {SEEDS_LIMIT} at most")]
        if self.privacy is not None:
            return [Problem("privacy", "seed-rounds adds no noise to its numbers", "set it to null")]
        return []

    def agree(self, views: Sequence[ModelView], tuner: Tuner, settings: TrainSettings, **more: Any) -> SeedContract:
        """The contract for this model. Raises LuthierError for settings that its rounds cannot use."""
        (view,) = views
        self.refuse_tuner(tuner)
        assert isinstance(tuner, FedKSeed)
        return SeedContract(
            base=view.base, weights=weights_digest(view, tuner), shapes=view.anatomy.parameters, tuner=tuner,
            settings=settings, protocol=self, **more,
        )  # fmt: skip

    def server(self, contract: SeedContract, clients: Sequence[str], journal: Journal | None, lab: Lab) -> SeedServer:
        return SeedServer(contract, clients, journal)

    def client(self, name: str, contract: SeedContract, view: ModelView, rows: Sequence[Any]) -> SeedClient:
        return SeedClient(name, contract, view, rows)

    def beginning(self, contract: SeedContract) -> dict[str, Tensor]:
        return SeedServer(contract, [SERVER]).state()


class SeedContract(Agreement, frozen=True, extra="forbid"):
    """What all parties of these rounds agree on."""

    base: Fingerprint
    weights: str
    """Digest of names, shapes and precision of the tuned weights, with the first numbers of the first direction. Without it,
    parties with different random generators would train different models unnoticed."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tuned weights, in the order in which directions are drawn."""
    tuner: FedKSeed
    protocol: SeedRounds


def weights_digest(view: ModelView, tuner: FedKSeed) -> str:
    """The digest that `SeedContract.weights` describes."""
    first = int(seed_pool(tuner.num_seeds, tuner.seed_pool)[0])
    said = [
        (n, list(view.weight(n).shape), str(view.weight(n).dtype), noise(first, i, (8,)).tolist())
        for i, n in enumerate(view.anatomy.parameters)
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class SeedServer(RoundServer):
    """Holds A[j], the weighted sum of all scalars for seed j. These and the base model give the model."""

    waits_for = "scalars"

    def __init__(self, contract: SeedContract, clients: Sequence[str], journal: Journal | None = None) -> None:
        self.contract, k, p = contract, contract.tuner.num_seeds, contract.protocol
        self.scalars = torch.zeros(k, dtype=torch.float64)
        self.history: list[list[float]] = [[0.0] for _ in range(k)]
        super().__init__(contract.digest, contract.base, p.rounds, clients, journal, p.participation, p.seed)

    def disclosure(self, out: Sent) -> Disclosure:
        return Disclosure(
            f"the sum over all clients and rounds of one number for each of {len(self.scalars)} seeds", out.to,
            sizes(out.message))  # fmt: skip

    def update(self) -> Update:
        """What was learnt, as seeds and scalars."""
        return update_of(self.contract, self.scalars.float())

    def outcome(self, client: str) -> Update:
        return self.update()

    def accept(self, message: Message) -> None:
        head, k = message.header, len(self.scalars)
        tensors = message.tensors()
        index, value = tensors.get("index"), tensors.get("scalar")
        if index is None or value is None or index.shape != value.shape or index.ndim != 1:
            raise Refused("shape", f"{head.sender}: seed indices and scalars do not pair up")
        if index.dtype != torch.uint16:
            raise Refused("dtype", f"{head.sender}: seed indices are {index.dtype}, they travel as torch.uint16")
        if len(index) != head.notes.get("steps"):
            raise Refused(
                "length", f"{head.sender}: {len(index)} scalars, but {head.notes.get('steps')} were announced"
            )
        if len(index) and int(index.to(torch.int64).max()) >= k:
            raise Refused("seed", f"{head.sender}: seed {int(index.to(torch.int64).max())} of {k}")
        if value.dtype != torch.float32 or not value.isfinite().all():
            raise Refused("not-finite", f"{head.sender}: a scalar is not finite, or no float32")
        rows_of(message)

    def add_up(self, arrived: Mapping[str, Message]) -> None:
        weight = shares({name: rows_of(m) for name, m in arrived.items()})
        for name, message in arrived.items():
            tensors = message.tensors()
            self.scalars += weight[name] * added(tensors, len(self.scalars))
            for j, g in zip(tensors["index"].tolist(), tensors["scalar"].tolist(), strict=True):
                self.history[j].append(g)

    def state(self) -> dict[str, Tensor]:
        tensors = {"scalars": self.scalars.float()}
        if self.contract.protocol.pro:
            tensors["probabilities"] = torch.from_numpy(seed_probabilities(self.history)).float()
        return tensors


class SeedClient(Member):
    """Rebuilds the model from the server's scalars, takes its steps, and sends its numbers and its number of rows."""

    def __init__(self, name: str, contract: SeedContract, view: ModelView, rows: Sequence[Any]) -> None:
        if weights_digest(view, contract.tuner) != contract.weights or not view.base.same_base(contract.base):
            raise Refused("base", f"{name}: its model, or the random numbers of its machine, are not the contract's")
        super().__init__(name, contract.digest, rows)
        self.contract, self.view = contract, view

    def answer(self, state: Message) -> list[Sent]:
        tensors = state.tensors()
        return [Sent(SERVER, self._trained(state.header.round, tensors["scalars"], tensors.get("probabilities")))]

    def start(self, state: Message) -> Update:
        return update_of(self.contract, state.tensors()["scalars"])

    def moved(self, message: Message) -> Update:
        tensors = message.tensors()
        return update_of(self.contract, added(tensors, self.contract.tuner.num_seeds).float())

    def disclosure(self, out: Sent) -> Disclosure:
        count = out.message.header.notes["steps"]
        return Disclosure(
            f"{count} numbers: how fast the loss on rows of {self.name} changes along agreed random directions, "
            "and its number of rows",
            out.to, sizes(out.message))  # fmt: skip

    @property
    def update(self) -> Update:
        if self.result is None:
            return super().update
        return update_of(self.contract, self.result.tensors()["scalars"])

    def _trained(self, round: int, scalars: Tensor, probabilities: Tensor | None) -> Message:
        c, streams = self.contract, Streams(self.contract.protocol.seed)
        own = int(streams.at("client", self.name, round).integers(2**31))
        tuner = c.tuner.model_copy(update={"seed": own})
        drawn = None if probabilities is None else probabilities.double().numpy()
        with as_found(self.view), update_of(c, scalars).bind(self.view):
            client: FedKSeedTrainable = tuner.attach(
                self.view, probabilities=None if drawn is None else drawn / drawn.sum()
            )
            try:
                loop = Loop(self.view, self.rows, client, Sft(), c.settings.model_copy(update={"seed": own}))
                for _ in steps(loop.total_steps, self.progress):
                    loop.step()
            finally:
                client.detach()
        index = torch.from_numpy(np.array([i for i, _ in client.observed], dtype=np.uint16))
        value = torch.tensor([g for _, g in client.observed], dtype=torch.float32)
        notes = {"steps": len(index), "rows": self.counted}
        return Message.of(
            "scalars", c.digest, self.name, c.base, {"index": index, "scalar": value}, round=round, notes=notes
        )


def added(tensors: Mapping[str, Tensor], num_seeds: int) -> Tensor:
    """[K] float64: a client's numbers, by seed."""
    out = torch.zeros(num_seeds, dtype=torch.float64)
    return out.index_add_(0, tensors["index"].to(torch.int64), tensors["scalar"].double())


def update_of(contract: SeedContract, scalars: Tensor) -> Update:
    """-eta * sum of scalars[j] z(seed j). The scalars are the float32 numbers that are sent, so all parties get the same."""
    tuner = contract.tuner
    used = scalars.nonzero().squeeze(1)
    seeds = torch.from_numpy(seed_pool(tuner.num_seeds, tuner.seed_pool))[used]
    steps = -contract.settings.learning_rate * scalars.double()[used]
    return Update(contract.base, (Seeds(seeds, steps, contract.shapes),))


SeedRounds.contract = SeedContract
