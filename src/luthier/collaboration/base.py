"""The base class of protocols between parties, as methods of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.journal import Journal
from luthier.collaboration.parties import Member, in_process
from luthier.collaboration.privacy import Privacy
from luthier.collaboration.rounds import RoundServer
from luthier.method import Facts, Method, Problem
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.tuners.base import Tuner
from luthier.update import Update


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

    def problems_with(self, tuner: Tuner) -> list[Problem]:
        """Why clients cannot tune with it."""
        return []

    def refuse_tuner(self, tuner: Tuner) -> None:
        """Raises LuthierError for a tuner that clients cannot use."""
        for problem in self.problems_with(tuner):
            raise LuthierError(f"collaborate.{self.key()}.{problem.key}: {problem.what}; {problem.remedy}")

    def check(self, facts: Facts) -> list[Problem]:
        tuners = [t for t in facts.others if isinstance(t, Tuner)]
        return super().check(facts) + [p for t in tuners for p in self.problems_with(t)]

    def agree(self, views: Sequence[ModelView], tuner: Tuner, settings: TrainSettings, **more: Any) -> Agreement:
        """The contract over these models, one for each role. Raises LuthierError if the protocol cannot work with them."""
        raise NotImplementedError  # the seam: every protocol has its own

    def server(self, contract: Any, clients: Sequence[str], journal: Journal | None, lab: Lab) -> RoundServer:
        """The party that clients send to.

        journal  None: arrivals are kept in memory only
        lab      the models that the contract pins, under the names of their roles, and what reads shadow runs
        """
        raise NotImplementedError  # the seam: every protocol has its own

    def client(self, name: str, contract: Any, view: ModelView, rows: Sequence[Any]) -> Member:
        """A party with its own rows."""
        raise NotImplementedError  # the seam: every protocol has its own

    def alone(self, name: str, contract: Any, lab: Lab, rows: Sequence[Any]) -> Update:
        """The model that a client would have without the others: the same protocol with only this client."""
        server = self.server(contract, [name], None, lab)
        client = self.client(name, contract, lab.view(self.roles[0]), rows)
        in_process([server, client], server.begin(), lambda sent, disclosure: None)
        return server.outcome(name)

    def centralised(self, contract: Any, lab: Lab, rows: Sequence[Any]) -> Update:
        """The served model, tuned on the rows of all clients together. This needs shared rows."""
        return self.alone("everybody", contract, lab, rows)

    def beginning(self, contract: Any) -> dict[str, Tensor]:
        """The tensors of the first state, from which clients start."""
        return {}
