"""The base class of protocols between parties, as methods of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.journal import Journal
from luthier.collaboration.parties import Member, in_process
from luthier.collaboration.privacy import Privacy
from luthier.collaboration.rounds import RoundServer
from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.tuners.base import Tuner
from luthier.update import Update


@dataclass(frozen=True)
class Workshop:
    """Where a server works: a lab, and what shadow runs left.

    lab   its models are those that the contract pins, under the names of their roles
    made  reads the updates of so many shadow sets with so many snapshots each; None: no shadow runs belong to the contract
    """

    lab: Lab
    made: Callable[[int, int], list[dict[str, Tensor]]] | None = None

    def shadows(self, sets: int, snapshots: int) -> list[dict[str, Tensor]]:
        """Both models' updates on this many sets of public rows. Raises LuthierError if some are missing."""
        if self.made is None:
            raise LuthierError("nothing here made shadow runs; give the workshop what reads them")
        return self.made(sets, snapshots)


class Collaboration(Method):
    """A protocol: what its parties agree on, what the server does, and what a client does."""

    contract: ClassVar[type[Agreement]]
    roles: ClassVar[tuple[str, ...]] = ("model",)
    """The models of a contract; clients tune the first one."""

    leaves: ClassVar[str]
    """What a client sends, in words."""

    privacy: Privacy | None = None
    """Privacy limit that every client keeps while it tunes: {epsilon: 8, delta: 1e-5, clip: 1}; null: none."""

    @property
    def turns(self) -> int:
        """How often the server may ask a client."""
        return 1

    def agree(self, views: Sequence[ModelView], tuner: Tuner, settings: TrainSettings, **more: Any) -> Agreement:
        """The contract over these models, one for each role. Raises LuthierError if the protocol cannot work with them."""
        raise NotImplementedError  # the seam: every protocol has its own

    def server(self, contract: Any, clients: Sequence[str], journal: Journal | None, workshop: Workshop) -> RoundServer:
        """The party that clients send to."""
        raise NotImplementedError  # the seam: every protocol has its own

    def client(self, name: str, contract: Any, view: ModelView, rows: Sequence[Any]) -> Member:
        """A party with its own rows."""
        raise NotImplementedError  # the seam: every protocol has its own

    def alone(self, name: str, contract: Any, workshop: Workshop, rows: Sequence[Any]) -> Update:
        """The model that a client would have without the others: the same protocol with only this client."""
        server = self.server(contract, [name], None, workshop)
        client = self.client(name, contract, workshop.lab.view(self.roles[0]), rows)
        in_process([server, client], server.begin(), lambda sent, disclosure: None)
        return server.outcome(name)

    def centralised(self, contract: Any, workshop: Workshop, rows: Sequence[Any]) -> Update:
        """The served model, tuned on the rows of all clients together. This needs shared rows."""
        return self.alone("everybody", contract, workshop, rows)

    def beginning(self, contract: Any) -> dict[str, Tensor]:
        """The tensors of the first state, from which clients start."""
        return {}
