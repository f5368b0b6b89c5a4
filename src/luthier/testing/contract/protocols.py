"""What every protocol between parties keeps: messages that survive their bytes, order of no account, refusals, kills."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.collaboration.agreement import Agreement
from luthier.collaboration.base import Collaboration
from luthier.collaboration.grad_transformer import shadow
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused, decode
from luthier.collaboration.parties import Disclosure, Member, Sent, Tick
from luthier.collaboration.rounds import SERVER, RoundServer
from luthier.collaboration.wire import packed
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import Example, worn
from luthier.testing.models import rows_of, view_of
from luthier.tuners.lora import Lora
from luthier.update import Update

NAMES = ("clinic", "lab", "ward")
LIMIT = 10**7  # bytes of a payload
PLAIN = TrainSettings(
    max_steps=2, batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", warmup_fraction=0.0
)  # fmt: skip
Heard = list[tuple[Sent, Disclosure]]


def rows_of_party(number: int) -> list[dict[str, Any]]:
    """Rows of its own: other ones, and as many more."""
    return rows_of((9, 5, 12, 7) + (6, 8) * number, seed=20 + number)


@dataclass(frozen=True, eq=False)
class Bench:
    """A protocol with its contract, and fresh parties of it."""

    method: Collaboration
    contract: Any

    def view(self, role: str) -> ModelView:
        """A model of its own size for each role, in the mode that it was loaded in."""
        number = self.method.roles.index(role)
        return view_of(layers=2 + number, seed=number)

    @property
    def lab(self) -> Lab:
        """A new lab with tiny models."""
        return Lab(models={r: partial(self.view, r) for r in self.method.roles}, shadowing=self.shadows)

    def shadows(self, sets: int, snapshots: int) -> list[dict[str, Tensor]]:
        """Both models' updates on sets of public rows."""
        return [dict(s) for s in _shadows(self, sets, snapshots)]

    def server(self, names: Sequence[str] = NAMES, journal: Journal | None = None) -> RoundServer:
        """Before anything has arrived."""
        return self.method.server(self.contract, list(names), journal, self.lab)

    def client(self, name: str) -> Member:
        """A party with rows that go with its name."""
        rows = rows_of_party(NAMES.index(name))
        return self.method.client(name, self.contract, self.view(self.method.roles[0]), rows)


@cache
def _shadows(bench: Bench, sets: int, snapshots: int) -> tuple[dict[str, Tensor], ...]:
    views = [bench.view(role) for role in bench.method.roles]
    return tuple(shadow(bench.contract, views, rows_of(seed=100 + k), k, snapshots) for k in range(sets))


@cache
def bench(collaborate: Example) -> Bench:
    """The usual one for this example."""
    method = collaborate.method
    assert isinstance(method, Collaboration)
    return Bench(method, agreed(collaborate, PLAIN))


def agreed(collaborate: Example, settings: TrainSettings) -> Agreement:
    """The contract that the example's tuner and tiny models make."""
    method = collaborate.method
    assert isinstance(method, Collaboration)
    bare = Bench(method, None)
    return method.agree([bare.view(role) for role in method.roles], collaborate.tuner or Lora(rank=2), settings)


def carried(
    server: RoundServer, parties: Mapping[str, Member], turned: bool = False,
) -> tuple[RoundServer, Heard]:  # fmt: skip
    """Messages through their bytes until none is left: all that clients say to a server's messages arrives before it speaks.

    turned  clients are served, and heard, in the reverse order
    """
    heard: Heard = []

    def through(sender: Any, sent: Sent) -> Message:
        heard.append((sent, sender.disclosure(sent)))
        return decode(sent.message.encode(), LIMIT)

    waiting = server.begin()
    while waiting:
        states = [(s.to, through(server, s)) for s in waiting][:: -1 if turned else 1]
        answers = [through(parties[to], a) for to, state in states for a in parties[to].handle(state)]
        waiting = []
        for message in answers:
            waiting += server.handle(message)
    return server, heard


@cache
def whole(collaborate: Example) -> tuple[RoundServer, dict[str, Member], Heard]:
    """All rounds with three clients, once for all tests."""
    one = bench(collaborate)
    parties = {n: one.client(n) for n in NAMES}
    server, heard = carried(one.server(), parties)
    return server, parties, heard


def bits(update: Update) -> dict[str, Any]:
    """An update's tensors, in a form that compares to the bit."""
    return {n: t.tolist() for n, t in packed(update).items()}


def near(one: Update, other: Update) -> None:
    """Equal in weight space, to rounding."""
    a, b = one.dense(), other.dense()
    assert a.keys() == b.keys() and a
    for n, t in a.items():
        torch.testing.assert_close(t, b[n], rtol=1e-4, atol=1e-6)


def test_a_contract_survives_its_file_and_is_named_by_all_that_is_in_it(collaborate: Example) -> None:
    contract = bench(collaborate).contract
    again = type(contract).model_validate(json.loads(json.dumps(contract.as_dict())))
    assert isinstance(contract, bench(collaborate).method.contract)
    assert again == contract and again.digest == contract.digest
    same, other = agreed(collaborate, PLAIN), agreed(collaborate, PLAIN.model_copy(update={"learning_rate": 2e-2}))
    assert same.digest == contract.digest != other.digest


def test_messages_survive_their_bytes_and_say_what_leaves(collaborate: Example) -> None:
    """Kinds are the declared ones, all names and digests the contract's; each is disclosed in words and bytes."""
    one, (server, _, heard) = bench(collaborate), whole(collaborate)
    ours = [h for h in heard if h[0].message.header.sender == SERVER]
    theirs = [h for h in heard if h[0].message.header.sender != SERVER]
    assert {s.message.header.kind for s, _ in ours} == {"state", "result"}
    assert {s.message.header.kind for s, _ in theirs} == {server.waits_for} and {s.to for s, _ in theirs} == {SERVER}
    assert len(theirs) <= len(NAMES) * one.method.turns and one.method.leaves
    for sent, told in heard:
        again = decode(sent.message.encode(), LIMIT)
        assert again.header == sent.message.header and again.digest == sent.message.digest
        mine, other = sent.message.tensors(), again.tensors()
        assert mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)
        assert sent.message.header.run == one.contract.digest
        assert " " in told.what and told.to == sent.to and told.promise and told.unit
        assert told.bytes[0] == sum(t.numel() * t.element_size() for t in mine.values())
        assert told.bytes[1] == len(sent.message.encode())


def test_every_client_ends_with_what_the_server_has_for_it(collaborate: Example) -> None:
    """It moves the model that is served, and binds to it."""
    one, (server, parties, _) = bench(collaborate), whole(collaborate)
    served = one.view(one.method.roles[-1])
    for name, party in parties.items():
        near(party.update, server.outcome(name))
        assert party.update.base.same_base(served.base)
        with party.update.bind(served):
            pass
    assert any(t.abs().max() > 0 for t in server.outcome(NAMES[0]).dense().values())


def test_a_client_leaves_its_model_as_it_was(collaborate: Example) -> None:
    one = bench(collaborate)
    party: Any = one.client(NAMES[0])
    view = party.view
    view.module.train()
    before = worn(view)
    (state,) = [s.message for s in one.server(NAMES[:1]).begin()]
    (sent,) = party.handle(state)
    assert worn(view) == before
    party.moved(sent.message)
    one.method.alone(NAMES[0], one.contract, one.lab, rows_of_party(0))
    assert worn(view) == before


def test_the_order_in_which_clients_come_changes_nothing(collaborate: Example) -> None:
    """To the bit; so nothing is drawn either that is not keyed."""
    torch.manual_seed(5)
    one = bench(collaborate)
    server, _ = carried(one.server(NAMES[::-1]), {n: one.client(n) for n in NAMES}, turned=True)
    expected, _, _ = whole(collaborate)
    assert server.finished
    for name in NAMES:
        assert bits(server.outcome(name)) == bits(expected.outcome(name))


def test_a_server_killed_after_each_arrival_goes_on_to_the_same_bits(collaborate: Example, tmp_path: Path) -> None:
    one, (expected, _, heard) = bench(collaborate), whole(collaborate)
    arrived = [s.message for s, _ in heard if s.message.header.sender != SERVER]
    server = one.server(journal=Journal(tmp_path, LIMIT))
    for i, message in enumerate(arrived, 1):
        server.handle(message)
        server = one.server(journal=Journal(tmp_path, LIMIT))  # the one before is gone
        answered = {m.header.sender for m in arrived[:i] if m.header.round == server.round}
        assert server.finished or {s.to for s in server.begin()} == set(NAMES) - answered, (
            "only the others are asked again"
        )
    assert server.finished and {s.to for s in server.begin()} == set(NAMES)
    for name in NAMES:
        assert bits(server.outcome(name)) == bits(expected.outcome(name))


def test_clients_that_say_the_same_count_as_one(collaborate: Example) -> None:
    """A second client that sends what the first one sends changes nothing of what the first one ends with."""
    one, twins = bench(collaborate), NAMES[:2]
    alone, both = one.server(twins[:1]), one.server(twins)
    party = one.client(twins[0])
    while not alone.finished:
        state = next(s.message for s in alone.begin())
        for sent in party.handle(state):
            alone.handle(sent.message)
            for name in twins:
                head = sent.message.header
                copy = head.model_copy(update={"sender": name, "nonce": f"{head.nonce}{name}"})
                both.handle(Message(header=copy, payload=sent.message.payload))
    assert both.finished
    near(both.outcome(twins[0]), alone.outcome(twins[0]))


def test_the_same_message_twice_and_time_that_is_up_early_change_nothing(collaborate: Example) -> None:
    one, (expected, _, heard) = bench(collaborate), whole(collaborate)
    server = one.server()
    assert server.handle(Tick()) == [], "nobody has sent anything: there is nothing to close the round with"
    for message in [s.message for s, _ in heard if s.message.header.sender != SERVER]:
        server.handle(message)
        if not server.finished and message.header.round == server.round:
            assert server.handle(message) == [], "a duplicate is no second message"
    assert server.finished and bits(server.outcome(NAMES[0])) == bits(expected.outcome(NAMES[0]))


def _with(message: Message, **header: Any) -> Message:
    return Message(header=message.header.model_copy(update=header), payload=message.payload)


def _of(message: Message, tensors: Mapping[str, Tensor]) -> Message:
    head = message.header
    return Message.of(head.kind, head.run, head.sender, head.base, tensors, round=head.round, notes=head.notes)


def spoilt(message: Message) -> dict[str, Message]:
    """Messages that a server must not take, by what it calls the fault; "" where each protocol has a word of its own."""
    head, tensors = message.header, message.tensors()
    other = head.base.model_copy(update={"weights": "0" * 64})
    tokens = head.base.model_copy(update={"tokenizer": "0" * 64})
    real = {n: t * float("nan") if t.is_floating_point() else t for n, t in tensors.items()}
    return {
        "contract": _with(message, run="0" * 64), "unknown": _with(message, sender="stranger"),
        "round": _with(message, round=head.round + 1), "kind": _with(message, kind="state"),
        "base": _with(message, base=other), "tokenizer": _with(message, base=tokens),
        "rows": _with(message, notes={**head.notes, "rows": 0}), "not-finite": _of(message, real),
        "payload": Message(header=head, payload=message.payload[:-3]), "": _of(message, {}),
    }  # fmt: skip


def test_what_cannot_be_used_is_refused_by_name_and_changes_nothing(collaborate: Example) -> None:
    one, (expected, _, heard) = bench(collaborate), whole(collaborate)
    server = one.server()
    for message in [s.message for s, _ in heard if s.message.header.sender != SERVER]:
        if message.header.round == 0:
            for name, wrong in spoilt(message).items():
                (answer,) = server.handle(wrong)
                head = answer.message.header
                assert head.kind == "refusal" and answer.to == wrong.header.sender, name
                assert re.fullmatch(name or ".+", str(head.notes["name"])) and " " in str(head.notes["says"])
        server.handle(message)
    assert bits(server.outcome(NAMES[0])) == bits(expected.outcome(NAMES[0]))


def test_another_model_or_contract_is_refused_on_the_clients_side(collaborate: Example) -> None:
    one = bench(collaborate)
    with pytest.raises(Refused, match="base: ") as refused:
        one.method.client(NAMES[0], one.contract, view_of(layers=2, seed=9), rows_of_party(0))
    assert NAMES[0] in str(refused.value)
    state = next(s.message for s in one.server().begin())
    party = one.client(state.header.sender if state.header.sender in NAMES else NAMES[0])
    with pytest.raises(Refused, match="contract: "):
        party.handle(_with(state, run="0" * 64))
    with pytest.raises(LuthierError, match="no result yet"):
        _ = party.update


def test_what_a_client_has_alone_and_where_it_begins(collaborate: Example) -> None:
    """Alone it has an update of the model that it tunes; the first state is the one that `beginning` writes down."""
    one = bench(collaborate)
    alone = one.method.alone(NAMES[0], one.contract, one.lab, rows_of_party(0))
    own = one.view(one.method.roles[0])
    assert alone.base.same_base(own.base) and any(t.abs().max() > 0 for t in alone.dense().values())
    assert bits(alone) == bits(one.method.alone(NAMES[0], one.contract, one.lab, rows_of_party(0)))
    whole_set = one.method.centralised(one.contract, one.lab, rows_of_party(0))
    assert whole_set.base.same_base(one.view(one.method.roles[-1]).base)
    first, begun = one.server().begin()[0].message.tensors(), one.method.beginning(one.contract)
    assert begun.keys() == first.keys() and all(torch.equal(begun[n], first[n]) for n in begun)


__all__ = [
    "test_a_client_leaves_its_model_as_it_was",
    "test_a_contract_survives_its_file_and_is_named_by_all_that_is_in_it",
    "test_a_server_killed_after_each_arrival_goes_on_to_the_same_bits",
    "test_another_model_or_contract_is_refused_on_the_clients_side",
    "test_clients_that_say_the_same_count_as_one",
    "test_every_client_ends_with_what_the_server_has_for_it",
    "test_messages_survive_their_bytes_and_say_what_leaves",
    "test_the_order_in_which_clients_come_changes_nothing",
    "test_the_same_message_twice_and_time_that_is_up_early_change_nothing",
    "test_what_a_client_has_alone_and_where_it_begins",
    "test_what_cannot_be_used_is_refused_by_name_and_changes_nothing",
]
