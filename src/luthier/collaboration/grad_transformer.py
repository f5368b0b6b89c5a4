"""Gradient Transformer: organisations tune a small model; a provider translates their updates into updates of a large one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainSerializer, WithJsonSchema
from torch import Tensor

from luthier.collaboration.agreement import Agreement, named
from luthier.collaboration.base import Collaboration
from luthier.collaboration.contract import Contract, Start, refuse_other, refuse_vector, start_of
from luthier.collaboration.controls import pooled
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused
from luthier.collaboration.parties import Disclosure, Member, Sent, promised, sizes
from luthier.collaboration.rounds import SERVER, RoundServer, rows_of
from luthier.collaboration.shadows import draw, tuned
from luthier.collaboration.similarity import Likeness, likeness, mean_cosine
from luthier.collaboration.translators.base import Fitted, Pairs, Translator
from luthier.collaboration.translators.ridge import Ridge
from luthier.collaboration.wire import headers, packed
from luthier.method import Problem, Source, Traits
from luthier.method.registry import written
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.tuners.base import Tuner
from luthier.tuners.lora import Lora
from luthier.update import Update

ALIKE = 0.3  # below this mean cosine, the mean of the updates is like none of them
AnyTranslator = Annotated[
    Translator, named("translate"), PlainSerializer(written),
    WithJsonSchema({"description": "a translator's name, or {name: {fields}}"}),
]  # fmt: skip

log = logging.getLogger(__name__)


class GradTransformer(Collaboration):
    """Translate LoRA updates of a small model into updates of a large model that never sees the rows.

    A provider tunes both models on `sets` shadow sets of public rows, from one fixed start, and fits a translator to the
    pairs of updates. An organisation tunes the small model on its own rows, from the same start, and sends the difference. It
    gets an adapter of the large model. Updates can be compared only if they have the same start, so the contract holds the exact
    start tensors. The public rows must be similar to the private ones. A translation far from all shadow sets is a guess, and the
    report says how far it is.
    Without differential privacy there is no guarantee: an update remembers rows, and should be audited before it is sent.
    Departs from the paper: shadow sets keep one snapshot for each optimiser step (16 micro-steps share one). Both sides are
    standardised, because raw updates are too small to learn from. Ridge is the default: it was better with 60 pairs and with 200;
    try `transformer` with many hundreds. Pairs are split by shadow set, because snapshots of one set are nearly equal.
    Cost: the provider tunes both models `sets` times before any client is served; a client tunes the small model once.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), linear=True)
    source: ClassVar[Source] = Source(
        "Gradient Transformer: Learning to Generate Updates for LLMs", 2026, "arXiv:2605.27591", "eq. 10-11"
    )

    contract: ClassVar[type[Agreement]] = Contract
    roles: ClassVar[tuple[str, ...]] = ("small", "large")
    leaves: ClassVar[str] = "an update of each organisation's small model, and its number of rows"

    large: str | None = None
    """The large model, which gets the translated updates. The recipe's key `model` names the small one. The contract needs it."""
    translator: AnyTranslator = Ridge()
    """How pairs become a translation."""
    sets: int = Field(200, ge=2)
    """Number of shadow sets; both models are tuned on each."""
    large_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Learning rate of the large model's shadow runs; null: the same as the small model's `learning_rate`."""
    rows: int = Field(1024, ge=1)
    """Public rows in each shadow set."""
    by: str | None = None
    """Column of the public rows that names their kind. Each shadow set then mixes the kinds in different shares, like
    clients. null: sets are drawn from all rows equally."""
    concentration: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Concentration of the Dirichlet distribution of those shares; small values give sets with few kinds."""
    snapshots: int = Field(1, ge=1)
    """Pairs taken from each set, one after each of its last steps."""
    pool: Literal["none", "before", "after"] = "none"
    """"none": each organisation gets its own translation. "before": the mean of all updates is translated (the provider
    needs only their sum). "after": the mean of the translations is used."""
    strict: bool = False
    """Refuse updates that are unlike all shadow sets, instead of a warning."""

    def problems_with(self, tuner: Tuner) -> list[Problem]:
        what = f"{tuner.key()} has no fixed start, so its updates cannot be compared"
        return [] if isinstance(tuner, Lora) else [Problem("tuner", what, "set tuner: lora")]

    def agree(self, views: Sequence[ModelView], tuner: Tuner, settings: TrainSettings, **more: Any) -> Contract:
        """The contract, with the digests of the start tensors. Raises LuthierError for other tuners than LoRA."""
        self.refuse_tuner(tuner)
        assert isinstance(tuner, Lora)
        small, large = (start_of(v, tuner).side for v in views)
        return Contract(
            small=small, large=large, tuner=tuner, settings=settings, privacy=self.privacy,
            large_learning_rate=self.large_learning_rate, **more,
        )  # fmt: skip

    def draws(self, sorts: Sequence[str], streams: Streams) -> list[list[int]]:
        """The public rows of each shadow set, followed by the same number of other rows in the same shares, to judge by.

        sorts  the kind of each public row; one name for all if they have no kinds
        Raises LuthierError if a set needs more rows than there are.
        """
        if 2 * self.rows > len(sorts):
            raise LuthierError(
                f"collaborate.grad-transformer.rows: {self.rows} rows a shadow set, and as many to judge by, cannot be drawn "
                f"from {len(sorts)}; lower it or add public rows"
            )
        concentration = self.concentration if self.by is not None else None
        return draw(sorts, self.sets, 2 * self.rows, streams, concentration)

    def server(self, contract: Contract, clients: Sequence[str], journal: Journal | None, lab: Lab) -> Provider:
        pairs = pairs_of(contract, lab.shadows(self.sets, self.snapshots))
        views = [lab.view(role) for role in self.roles]
        return Provider.fitted(self, contract, views, pairs, clients, journal, lab)

    def client(self, name: str, contract: Contract, view: ModelView, rows: Sequence[Any]) -> Organisation:
        return Organisation(name, contract, view, rows)

    def alone(self, name: str, contract: Contract, lab: Lab, rows: Sequence[Any]) -> Update:
        """The small model, tuned."""
        client = self.client(name, contract, lab.view("small"), rows)
        return client.moved(client.message())

    def centralised(self, contract: Contract, lab: Lab, rows: Sequence[Any]) -> Update:
        """The large model, tuned like the shadow runs."""
        large = lab.view("large")
        vectors = tuned(large, rows, contract.tuner, contract.settings_of("large"))
        return start_of(large, contract.tuner).update(vectors[-1])


class Provider(RoundServer):
    """Takes one update of the small model from each organisation, and gives each an update of the large one.

    report  by client: norm and distance to the shadows, rows, warnings
    cosine  mean over pairs of clients' updates; None if fewer than two have sent one
    """

    def __init__(
        self, contract: Contract, protocol: GradTransformer, starts: tuple[Start, Start], pairs: Pairs, translator: Fitted,
        clients: Sequence[str], journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self.contract, self.protocol, (self.small, self.large) = contract, protocol, starts
        for start, side in zip(starts, (contract.small, contract.large), strict=True):
            refuse_other(start.side, side, "the provider")
        self.pairs, self.translator = pairs, translator
        self.translated: dict[str, Tensor] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.cosine: float | None = None
        super().__init__(contract.digest, contract.small.base, 1, clients, journal)

    @classmethod
    def fitted(
        cls, protocol: GradTransformer, contract: Contract, views: Sequence[ModelView], pairs: Pairs, clients: Sequence[str],
        journal: Journal | None = None, lab: Lab | None = None,
    ) -> Provider:  # fmt: skip
        """A provider whose translator is trained on these pairs first."""
        small, large = (start_of(v, contract.tuner) for v in views)
        return cls(contract, protocol, (small, large), pairs, protocol.translator.fit(pairs, lab), clients, journal)

    def accept(self, message: Message) -> None:
        name, x = message.header.sender, message.tensors().get("update")
        if x is None:
            raise Refused("form", f"{name} sent no update")
        refuse_vector(x, self.small, name)
        rows_of(message)
        if self.protocol.strict:
            for said in likeness(x, self.pairs).warnings(name):
                raise Refused("unlike", said)

    def add_up(self, arrived: Mapping[str, Message]) -> None:
        vectors = {n: m.tensors()["update"].float() for n, m in arrived.items()}
        self.report = {n: self._seen(n, likeness(x, self.pairs), arrived[n]) for n, x in vectors.items()}
        if len(vectors) > 1:
            self._told_cosine(list(vectors.values()))
        if self.protocol.pool == "before":
            self.translated = dict.fromkeys(self.clients, self._translation(pooled(vectors)))
            return
        each = {n: self._translation(x) for n, x in vectors.items()}
        self.translated = each if self.protocol.pool == "none" else dict.fromkeys(self.clients, pooled(each))

    def _translation(self, x: Tensor) -> Tensor:
        """[L_S, d_S] -> [L_T, d_T]."""
        return self.translator(x[None])[0]

    def _seen(self, name: str, like: Likeness, message: Message) -> dict[str, Any]:
        said = like.warnings(name)
        for line in said:
            log.warning(line)
        return {**like._asdict(), "rows": rows_of(message), "warnings": said}

    def _told_cosine(self, vectors: list[Tensor]) -> None:
        cosine = self.cosine = mean_cosine(torch.stack(vectors))
        if cosine < ALIKE and self.protocol.pool != "none":
            log.warning(
                "the clients' updates have a mean cosine of %.2f: their mean is like none of them; pool: none is safer",
                cosine,
            )

    def state(self) -> dict[str, Tensor]:
        return {}

    def outcome(self, client: str) -> Update:
        """The update of the large model for one client. Raises LuthierError if there is none."""
        if client not in self.translated:
            raise LuthierError(f"{client} has sent no update, so there is nothing to translate")
        return self.large.update(self.translated[client])

    def results(self) -> list[Sent]:
        out = []
        for name in self.translated:
            update, c = self.outcome(name), self.contract
            notes = {"parts": headers(update)}
            message = Message.of("result", c.digest, self.name, c.large.base, packed(update), round=1, notes=notes)
            out.append(Sent(name, message))
        return out

    def disclosure(self, out: Sent) -> Disclosure:
        if out.message.header.kind != "result":
            return Disclosure("only the start of tuning", out.to, sizes(out.message))
        pools = self.protocol.pool != "none"
        others = f", made from the updates of {len(self.report)} organisations" if pools else ""
        return Disclosure(f"an adapter of the large model{others}", out.to, sizes(out.message))


def shadow(
    contract: Contract, views: Sequence[ModelView], rows: Sequence[Any], number: int, snapshots: int = 1
) -> dict[str, Tensor]:
    """Tune both models on one set of public rows. Returns "x" and "y" [snapshots, L, d].

    The two runs have different orders of rows, so that an organisation's run and a shadow run share only the content of the
    rows. With a privacy limit, the small model is tuned as privately as the clients' models, so that the translator learns from
    the same noise. The large model is not, because public rows need no privacy.
    """
    found = {}
    for i, (side, view) in enumerate(zip(("small", "large"), views, strict=True)):
        settings = contract.settings_of(side).model_copy(update={"seed": contract.settings.seed + 2 * number + i})
        private = contract.privacy if side == "small" else None
        found["xy"[i]] = tuned(view, rows, contract.tuner, settings, snapshots, private)
    return found


def pairs_of(contract: Contract, shadows: Sequence[Mapping[str, Tensor]]) -> Pairs:
    """Aligned pairs from the results of `shadow`, set by set."""
    x, y = (torch.cat([s[side] for s in shadows]) for side in "xy")
    numbers = torch.cat([torch.full((len(s["x"]),), k) for k, s in enumerate(shadows)])
    return Pairs(x, y, numbers, contract.small.kinds(), contract.large.kinds())


def shadow_pairs(contract: Contract, views: Sequence[ModelView], sets: Sequence[Sequence[Any]]) -> Pairs:
    """Pairs of a few sets, made at once. `luthier collaborate shadow` makes many, and can be interrupted."""
    return pairs_of(contract, [shadow(contract, views, rows, k) for k, rows in enumerate(sets)])


class Organisation(Member):
    """Tunes the small model on its own rows, and sends the difference to the contract's start."""

    def __init__(self, name: str, contract: Contract, view: ModelView, rows: Sequence[Any]) -> None:
        refuse_other(start_of(view, contract.tuner).side, contract.small, name)
        super().__init__(name, contract.digest, rows)
        self.contract, self.view = contract, view

    def answer(self, state: Message) -> list[Sent]:
        return [Sent(SERVER, self.message())]

    def message(self) -> Message:
        """Tune, and put the difference into a message."""
        c = self.contract
        vectors = tuned(self.view, self.rows, c.tuner, c.settings, privacy=c.privacy, progress=self.progress)
        tensors, notes = {"update": vectors[-1]}, {"rows": self.counted}
        return Message.of("update", c.digest, self.name, c.small.base, tensors, notes=notes)

    def moved(self, message: Message) -> Update:
        return start_of(self.view, self.contract.tuner).update(message.tensors()["update"])

    def disclosure(self, out: Sent) -> Disclosure:
        return Disclosure(
            f"how tuning on the rows of {self.name} moved the small model, and its number of rows", out.to,
            sizes(out.message), *promised(self.contract.privacy),
        )  # fmt: skip
