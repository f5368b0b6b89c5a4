"""One-shot federated tuning: every client tunes once from the same base, and the server takes one weighted mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.averaging import cosines, length, outliers
from luthier.collaboration.base import Collaboration
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused
from luthier.collaboration.parties import Disclosure, Member, Sent, promised, sizes
from luthier.collaboration.privacy import tuning
from luthier.collaboration.rounds import SERVER, RoundServer, rows_of, shares
from luthier.collaboration.wire import headers, packed, unpacked
from luthier.method import Problem, Source, Traits
from luthier.model.fingerprint import Fingerprint
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.progress import OnProgress, no_progress, steps
from luthier.training.loop import Loop
from luthier.tuners.base import Tuner
from luthier.update import Part, Update


class OneShot(Collaboration):
    """Each client tunes from the same base for as long as several rounds would take, and sends its update once.

    The server takes sum of p_i Delta_i with p_i = n_i / sum of n_j, in weight space. This is exact for every linear update. Ranks
    of low-rank updates are stacked and may differ between clients. With `rounds` above 1 this is federated averaging: each round
    starts from the mean so far. Compare at equal local work, for example 1 round of 3 epochs with 3 rounds of 1. The schedule of
    the learning rate and Adam's moments start again in each round.
    The mean of the updates so far is available after each arrival; the order of arrival does not change it.
    One round is good if the clients' rows are similar. If each client has a topic of its own, one mean can be worse than no
    update, and rounds help. `luthier collaborate simulate` shows both, next to each client alone and to all rows in one place.
    Cost: traffic of one update for each client and round; the work of tuning alone.
    Refuses: updates that are not differences of weights (prompts, new heads), other forms or parameters than the contract's.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), linear=True)
    source: ClassVar[Source] = Source(
        "One Communication Round is All It Needs for Federated Fine-Tuning Foundation Models", 2024, "arXiv:2412.04650",
        "exact averaging of low-rank updates from FLoRA, arXiv:2409.05976",
    )  # fmt: skip

    leaves: ClassVar[str] = "an update of each client's model, and its number of rows"

    rounds: int = Field(1, ge=1)
    """1: each client sends once."""
    weights: Literal["rows", "equal"] = "rows"
    """How much a client counts: by its rows, or all clients equally."""
    rank: int | None = Field(None, ge=1)
    """Cut the mean of low-rank updates to this rank after each round; null keeps all ranks (the sum of the clients' ranks)."""
    keep_outliers: bool = False
    """Also count updates that are more than ten times as long as the median."""

    @property
    def turns(self) -> int:
        return self.rounds

    def problems_with(self, tuner: Tuner) -> list[Problem]:
        what = f"the update of {tuner.key()} cannot be averaged"
        return [] if tuner.traits.linear else [Problem("tuner", what, "choose lora, full or a sparse one")]

    def agree(self, views: Sequence[ModelView], tuner: Tuner, settings: TrainSettings, **more: Any) -> AverageContract:
        """The contract. Raises LuthierError for a tuner whose updates cannot be averaged."""
        (view,) = views
        self.refuse_tuner(tuner)
        trainable = tuner.attach(view, None, settings.max_steps)
        update = trainable.update()
        trainable.detach()
        moves = _moves(update)
        shapes = {n: view.anatomy.parameters[n] for names in moves.values() for n in names}
        return AverageContract(
            base=view.base, tuner=tuner, settings=settings, protocol=self, moves=moves, shapes=shapes,
            transposed=_transposed(update), privacy=self.privacy, **more,
        )  # fmt: skip

    def server(
        self, contract: AverageContract, clients: Sequence[str], journal: Journal | None, lab: Lab
    ) -> AverageServer:
        return AverageServer(contract, clients, journal)

    def client(self, name: str, contract: AverageContract, view: ModelView, rows: Sequence[Any]) -> AverageClient:
        return AverageClient(name, contract, view, rows)


class AverageContract(Agreement, frozen=True, extra="forbid"):
    """What all parties of an average agree on."""

    base: Fingerprint
    protocol: OneShot
    moves: dict[str, list[str]]
    """Form of an update's part -> the parameters that it changes."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors that change."""
    transposed: list[str]
    """The ones with low-rank factors that the model stores as [in, out]."""


class AverageServer(RoundServer):
    """Holds the mean so far. `report` has a line for each update of each round; its weight is 0 if it was too long to count."""

    def __init__(self, contract: AverageContract, clients: Sequence[str], journal: Journal | None = None) -> None:
        self.contract, self.update = contract, Update(contract.base, ())
        self.report: list[dict[str, Any]] = []
        super().__init__(contract.digest, contract.base, contract.protocol.rounds, clients, journal)

    def accept(self, message: Message) -> None:
        head, update = message.header, unpacked(message)
        found = _moves(update)
        if found != self.contract.moves or len(update.parts) != len(found):
            raise Refused("form", f"{head.sender}: {_odd(found, self.contract.moves)}")
        if _transposed(update) != self.contract.transposed:
            raise Refused("form", f"{head.sender}: its factors are not stored as the contract's are")
        for problem in (p for part in update.parts for p in part.problems(self.contract.shapes)):
            raise Refused("not-finite" if "not finite" in problem else "shape", f"{head.sender}: {problem}")
        rows_of(message)
        loss = head.notes.get("loss", 0.0)
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise Refused("loss", f"{head.sender}: its last training loss is {loss!r}, it must be a number")

    def add_up(self, arrived: Mapping[str, Message]) -> None:
        updates, weight = self._weighed(arrived)
        alike = cosines(updates)
        for i, (name, u) in enumerate(updates.items()):
            self.report.append({"round": self.round, "client": name, "rows": rows_of(arrived[name]),
                                "weight": weight.get(name, 0.0), "loss": arrived[name].header.notes.get("loss"),
                                "length": length(u), "cosines": alike[i].tolist()})  # fmt: skip
        self.update = self._moved_by(updates, weight)

    def so_far(self) -> Update | None:
        """The mean of the updates so far. The order of arrival does not change it."""
        arrived = dict(sorted(self.gathering.arrived.items()))
        if self.finished or not arrived:
            return self.update if self.round else None
        return self._moved_by(*self._weighed(arrived))

    def _weighed(self, arrived: Mapping[str, Message]) -> tuple[dict[str, Update], dict[str, float]]:
        """(all updates, the weight of each that counts): by default, one that is far too long does not count."""
        protocol = self.contract.protocol
        updates = {name: unpacked(m) for name, m in arrived.items()}
        too_long = [] if protocol.keep_outliers else outliers(updates)
        rows = {n: rows_of(arrived[n]) if protocol.weights == "rows" else 1 for n in updates if n not in too_long}
        return updates, shares(rows)

    def _moved_by(self, updates: Mapping[str, Update], weight: Mapping[str, float]) -> Update:
        """The mean so far plus this round's mean. Clients are added in the order of names, so arrival cannot change any bit."""
        rank, out = self.contract.protocol.rank, self.update
        for name, p in weight.items():
            out = out + p * updates[name]
        return out if rank is None else out.to("lowrank", rank=rank)[0]

    def state(self) -> dict[str, Tensor]:
        return packed(self.update)

    def outcome(self, client: str) -> Update:
        return self.update

    def notes(self) -> dict[str, str]:
        return {"parts": headers(self.update)}

    def disclosure(self, out: Sent) -> Disclosure:
        what = f"the mean of the updates of {len(self.clients)} clients" if self.round else "only the start of tuning"
        return Disclosure(what, out.to, sizes(out.message))


class AverageClient(Member):
    """Tunes from the state that the server sends, and sends the difference."""

    def __init__(self, name: str, contract: AverageContract, view: ModelView, rows: Sequence[Any]) -> None:
        if not view.base.same_base(contract.base):
            raise Refused("base", f"{name}: its model is not the contract's")
        super().__init__(name, contract.digest, rows)
        self.contract, self.view = contract, view

    def answer(self, state: Message) -> list[Sent]:
        # The state goes into the weights, so that the tuner can add its own change.
        start, _ = self.start(state).to("dense")
        with start.bind(self.view):
            update, loss = alone(self.contract, self.view, self.rows, self.progress)
        c = self.contract
        notes: dict[str, str | int | float] = {"rows": self.counted, "parts": headers(update)}
        if loss is not None:
            notes["loss"] = loss
        message = Message.of(
            "update", c.digest, self.name, c.base, packed(update), round=state.header.round, notes=notes
        )
        return [Sent(SERVER, message)]

    def start(self, state: Message) -> Update:
        return unpacked(state)

    def moved(self, message: Message) -> Update:
        return unpacked(message)

    def disclosure(self, out: Sent) -> Disclosure:
        return Disclosure(
            f"how tuning on the rows of {self.name} moved the model, and its number of rows"
            + (", and its last training loss" if "loss" in out.message.header.notes else ""),
            out.to, sizes(out.message), *promised(self.contract.privacy),
        )  # fmt: skip


def alone(
    contract: AverageContract, view: ModelView, rows: Sequence[Any], progress: OnProgress = no_progress
) -> tuple[Update, float | None]:
    """(update, last training loss) of one client alone, or of all clients' rows together. With a privacy limit the loss is not
    returned, because the limit does not account for it."""
    c, entry = contract, {}
    with tuning(view, rows, c.tuner, c.settings, c.privacy, c.protocol.rounds) as (trainable, take_step):
        for _ in steps(Loop.length(rows, c.settings), progress):
            entry = take_step()
        # There is no loss if the last step had nothing to learn.
        return trainable.update(), entry.get("loss") if c.privacy is None else None


def _moves(update: Update) -> dict[str, list[str]]:
    """The names of changed parameters, by the form of their part; for parts that cannot be averaged only the form."""
    return {p.kind: _named(p) if p.linear else [] for p in update.parts}


def _named(part: Part) -> list[str]:
    return list(part.names()) if part.ordered else sorted(part.names())


def _transposed(update: Update) -> list[str]:
    return sorted(n for p in update.parts for n in p.turned())


def _odd(found: Mapping[str, list[str]], agreed: Mapping[str, list[str]]) -> str:
    """The first difference, in words."""
    if list(found) != list(agreed):
        return f"sends {', '.join(found) or 'nothing'}, the contract says {', '.join(agreed)}"
    for kind, names in agreed.items():
        for name in sorted(set(found[kind]) ^ set(names)):
            return f"{name} is {'not ' if name in names else ''}moved, against the contract"
    return "its parts come twice, or in another order than the contract's"


OneShot.contract = AverageContract
