"""one-shot's parties: one round and several, kills, refusals, what leaves."""

import itertools
import json
import math

import pytest
import torch

from luthier.collaboration import privacy
from luthier.collaboration.averaging import averaged
from luthier.collaboration.messages import Message
from luthier.collaboration.one_shot import (
    AverageClient,
    AverageContract,
    AverageServer,
    OneShot,
    alone,
)
from luthier.collaboration.parties import Tick, in_process
from luthier.collaboration.privacy import Plan, Privacy
from luthier.collaboration.wire import headers, packed, unpacked
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.tuners.dept import Dept
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel
from luthier.update import Dense, Update

NAMES = ("east", "north", "west")
SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0)
LORA = Lora(rank=2)


def many(count, seed=0):
    return rows_of((9, 5, 12, 7, 8, 6) * 2, seed)[:count]


def contract(tuner=LORA, **fields):
    return OneShot(**fields).agree([view_of()], tuner, SETTINGS)


def clients(agreed):
    return [AverageClient(n, agreed, view_of(), many(8 + 2 * i, i)) for i, n in enumerate(NAMES)]


def carried(server, parties, heard=lambda sent, disclosure: None):
    in_process([server, *parties], server.begin(), heard)
    return server


def gap(one, other):
    a, b = one.dense(), other.dense()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("tuner", [LORA, Full(), Spiel(density=0.05)], ids=lambda t: t.key())
def test_one_round_is_the_mean_of_what_each_learnt_alone(tuner):
    agreed, said = contract(tuner), []
    parties = clients(agreed)
    server = carried(AverageServer(agreed, NAMES), parties, lambda sent, d: said.append((sent, d)))
    mine = {p.name: alone(agreed, p.view, p.rows)[0] for p in parties}
    expected = averaged(mine, {"east": 8, "north": 10, "west": 12})
    assert server.finished and gap(server.update, expected) <= 1e-6
    assert all(p.update.digest() == parties[0].update.digest() and gap(p.update, expected) <= 1e-6 for p in parties)
    assert [r["weight"] for r in server.report] == pytest.approx([8 / 30, 10 / 30, 12 / 30])
    assert all(r["loss"] > 0 and r["length"] > 0 and len(r["cosines"]) == 3 for r in server.report)
    up = [d for sent, d in said if sent.message.header.kind == "update"]
    assert len(up) == 3 and all(d.unit == "nothing" and "number of rows" in d.what and d.to == "server" for d in up)
    moved = sum(t.numel() * t.element_size() for t in packed(mine["east"]).values())
    assert up[0].bytes[0] == moved < up[0].bytes[1] < moved + 8192


def test_several_rounds_are_federated_averaging():
    agreed = contract(rounds=2)
    server = carried(AverageServer(agreed, NAMES), clients(agreed))
    view, total = view_of(), Update(agreed.base, ())
    for _ in range(2):
        with total.to("dense")[0].bind(view):
            mine = {n: alone(agreed, view, many(8 + 2 * i, i))[0] for i, n in enumerate(NAMES)}
        total = total + averaged(mine, {"east": 8, "north": 10, "west": 12})
    assert gap(server.update, total) <= 1e-6
    assert [r["round"] for r in server.report] == [0, 0, 0, 1, 1, 1]


def test_weights_may_be_equal_and_the_mean_cut_to_a_rank():
    agreed = contract(weights="equal", rank=2)
    server = carried(AverageServer(agreed, NAMES), clients(agreed))
    assert [r["weight"] for r in server.report] == pytest.approx([1 / 3] * 3)
    (part,) = server.update.parts
    assert {t.shape[0] for t in part.a.values()} == {2}
    whole = carried(AverageServer(contract(weights="equal"), NAMES), clients(contract(weights="equal"))).update
    assert {t.shape[0] for t in whole.parts[0].a.values()} == {6} and 0 < gap(server.update, whole) < 0.1


def test_whoever_is_late_does_not_count_and_is_refused_by_name():
    agreed = contract()
    server, (east, north, west) = AverageServer(agreed, NAMES), clients(agreed)
    states = {s.to: s.message for s in server.begin()}
    assert server.handle(Tick()) == [], "nobody has arrived: there is no mean"
    for party in (east, west):
        server.handle(party.handle(states[party.name])[0].message)
    results = server.handle(Tick())
    assert {s.to for s in results} == set(NAMES) and [r["client"] for r in server.report] == ["east", "west"]
    (refused,) = server.handle(north.handle(states["north"])[0].message)
    north.handle(refused.message)
    assert north.refusals == ["round: north sent for round 1, all are closed"]


def message(agreed, update, name="east", rows=8):
    notes = {"rows": rows, "loss": 1.0, "parts": headers(update)}
    return Message.of("update", agreed.digest, name, agreed.base, packed(update), notes=notes)


def changed(agreed, **tensors):
    """A dense update of the contract's parameters, with one changed."""
    names = agreed.moves["dense"]
    values = {n: torch.zeros(agreed.shapes[n]) for n in names}
    return Update(agreed.base, (Dense(values | tensors),))


def test_arrivals_one_by_one_come_to_the_same_mean_whatever_their_order():
    agreed = contract(weights="rows")
    sent = {c.name: c.handle(AverageServer(agreed, NAMES).begin()[0].message)[0].message for c in clients(agreed)}
    seen = []
    for order in itertools.permutations(NAMES):
        server = AverageServer(agreed, NAMES)
        assert server.so_far() is None
        for i, name in enumerate(order):
            server.handle(sent[name])
            here = {n: unpacked(sent[n]) for n in order[: i + 1]}
            rows = {n: sent[n].header.notes["rows"] for n in here}
            assert gap(server.so_far(), averaged(here, rows)) < 1e-6, "the mean of those that are there"
        seen.append(server.so_far().digest())
    assert len(set(seen)) == 1 and seen[0] == server.update.digest()


def test_a_round_ends_without_those_that_decline_and_not_with_none():
    agreed = contract()
    declined = lambda name: Message.of("refusal", agreed.digest, name, agreed.base, {})  # noqa: E731
    server, (north, *_) = AverageServer(agreed, NAMES), clients(agreed)
    for name in NAMES[1:]:
        assert server.handle(declined(name)) == []
    assert [s.to for s in server.back(NAMES[1])] == [NAMES[1]] and server.gathering.missing == {NAMES[0], NAMES[1]}
    assert server.handle(declined(NAMES[1])) == []
    (state, *_) = server.begin()
    (sent,) = north.handle(state.message)
    assert {s.message.header.kind for s in server.handle(sent.message)} == {"result"} and server.finished
    assert [s.to for s in server.back(NAMES[1])] == [NAMES[1]], "whoever comes late is given the result"
    nobody = AverageServer(agreed, NAMES)
    with pytest.raises(LuthierError, match="will not send anything"):
        for name in NAMES:
            nobody.handle(declined(name))


def test_under_a_promise_each_round_has_the_noise_of_all_together(monkeypatch):
    seen, limit = [], Privacy(epsilon=4.0, delta=0.01)

    def planned(privacy, rows, batch_size, steps, rounds):
        seen.append((privacy, rows, batch_size, steps, rounds))
        return Plan(privacy=privacy, rows=rows, rate=batch_size / rows, steps=steps, noise=1.0, spent=4.0)

    monkeypatch.setattr(privacy, "plan", planned)
    agreed = contract(rounds=2, privacy=limit)
    server = carried(AverageServer(agreed, NAMES[:1]), clients(agreed)[:1])
    assert seen == [(limit, 8, 4, 3, 2)] * 2
    assert [r["loss"] for r in server.report] == [None, None], "the limit does not account for a loss"


def test_what_cannot_be_added_is_refused_by_name_and_the_rest_counts():
    agreed = contract(Full())
    first = agreed.moves["dense"][0]
    fewer = {n: torch.zeros(agreed.shapes[n]) for n in agreed.moves["dense"][1:]}
    lora = alone(contract(), view_of(), many(4))[0]
    unread = Message.of("update", agreed.digest, "east", agreed.base, {}, notes={"rows": 8, "parts": "[[1]]"})
    cases = {
        "form: east: sends lowrank, the contract says dense": message(agreed, lora),
        f"form: east: {first} is not moved": message(agreed, Update(agreed.base, (Dense(fewer),))),
        "shape: east": message(agreed, changed(agreed, **{first: torch.zeros(2)})),
        "not-finite: east": message(agreed, changed(agreed, **{first: torch.full(agreed.shapes[first], torch.nan)})),
        "rows: east": message(agreed, changed(agreed), rows=0),
        "form: from east: its parts cannot be read": unread,
        "unknown: 'stranger'": message(agreed, changed(agreed), name="stranger"),
    }
    server = AverageServer(agreed, NAMES)
    for words, sent in cases.items():
        (answer,) = server.handle(sent)
        assert str(answer.message.header.notes["says"]).startswith(words) and not server.gathering.arrived
    assert server.handle(message(agreed, changed(agreed))) == [] and list(server.gathering.arrived) == ["east"]


def sent(agreed, part, tensors=None, **more):
    """A message of one part; `more` changes its header."""
    head = json.dumps([[part.kind, {**part.header(), **more}]])
    tensors = packed(Update(agreed.base, (part,))) if tensors is None else tensors
    notes = {"rows": 8, "parts": head}
    return Message.of("update", agreed.digest, "east", agreed.base, tensors, notes=notes)


def learnt(agreed):
    return alone(agreed, view_of(), many(4))[0].parts[0]


@pytest.fixture(scope="module")
def low_rank():
    agreed = contract()
    return agreed, learnt(agreed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("not-finite", lambda p, n: {"scale": {**p.scale, n: math.nan}}),
        ("not-finite", lambda p, n: {"scale": {**p.scale, n: -math.inf}}),
        ("form", lambda p, n: {"scale": {**p.scale, n: "x"}}),
        ("form", lambda p, n: {"scale": {**p.scale, n: None}}),
        ("form", lambda p, n: {"scale": {**p.scale, n: 10**400}}),
        ("form", lambda p, n: {"scale": [1.0]}),
        ("form", lambda p, n: {"transposed": 3}),
        ("form", lambda p, n: {"transposed": [n]}),
        ("form", lambda p, n: {"transposed": ["other"]}),
    ],
)
def test_a_header_that_would_stop_or_turn_the_mean_is_refused(low_rank, name, change):
    agreed, part = low_rank
    server = AverageServer(agreed, NAMES)
    (answer,) = server.handle(sent(agreed, part, **change(part, next(iter(part.a)))))
    assert answer.message.header.notes["name"] == name and not server.gathering.arrived
    assert server.handle(sent(agreed, part)) == [] and list(server.gathering.arrived) == ["east"]


@pytest.mark.parametrize(
    "parts", ["[" * 20_000, '[["lowrank", 3]]', '[[["a"], {}]]', "3", '[["seeds", {"shapes": 3}]]']
)
def test_notes_that_are_no_parts_are_refused(low_rank, parts):
    agreed, part = low_rank
    tensors = packed(Update(agreed.base, (part,)))
    message = Message.of("update", agreed.digest, "east", agreed.base, tensors, notes={"rows": 8, "parts": parts})
    (answer,) = AverageServer(agreed, NAMES).handle(message)
    assert answer.message.header.notes["name"] == "form"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int64, "shape"), (torch.bool, "dtype"), (torch.complex64, "dtype"), (torch.float8_e4m3fn, "dtype"),
        (torch.int32, "dtype"), (torch.float64, ""), (torch.bfloat16, ""), (torch.float16, ""),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_added_are_refused(low_rank, dtype, name):
    agreed, part = low_rank
    tensors = {n: t.to(dtype) for n, t in packed(Update(agreed.base, (part,))).items()}
    server = AverageServer(agreed, ("east", "north"))
    answers = server.handle(sent(agreed, part, tensors))
    assert [a.message.header.notes["name"] for a in answers] == ([name] if name else [])
    if not name:
        whole = sent(agreed, part)
        server.handle(
            Message.of("update", agreed.digest, "north", agreed.base, whole.tensors(), notes=whole.header.notes)
        )
        expected = Update(agreed.base, (part,))
        assert server.finished and gap(server.update, expected) < 0.02 * max(
            float(t.abs().max()) for t in expected.dense().values()
        )


def test_sparse_values_that_cannot_be_added_are_refused():
    agreed = contract(Spiel(density=0.05))
    part, server = learnt(agreed), AverageServer(agreed, NAMES)
    whole = {n: list(s) for n, s in part.shapes.items()}
    first = next(iter(part.indices))
    for tensors, header in (
        ({f"0.values.{first}": part.values[first].half()}, {}),
        ({f"0.values.{first}": part.values[first].long()}, {}),
        ({"0.values.other": torch.ones(2)}, {}),
        ({}, {"shapes": {**whole, "other": [1]}}),
    ):
        (answer,) = server.handle(sent(agreed, part, packed(Update(agreed.base, (part,))) | tensors, **header))
        assert answer.message.header.notes["name"] == "shape" and not server.gathering.arrived


@pytest.mark.parametrize("loss", ["<b>", math.nan, math.inf, 10**400])
def test_a_loss_that_is_no_number_is_refused(low_rank, loss):
    agreed, part = low_rank
    notes = {**sent(agreed, part).header.notes, "loss": loss}
    tensors = packed(Update(agreed.base, (part,)))
    (answer,) = AverageServer(agreed, NAMES).handle(
        Message.of("update", agreed.digest, "east", agreed.base, tensors, notes=notes)
    )
    assert answer.message.header.notes["name"] == "loss"


def test_an_update_far_too_long_is_left_out_and_named():
    for keep in (False, True):
        agreed = contract(Full(), keep_outliers=keep)
        server, first = AverageServer(agreed, NAMES), agreed.moves["dense"][0]
        for name, size in zip(NAMES, (1.0, 1.5, 100.0), strict=True):
            value = torch.full(agreed.shapes[first], size)
            server.handle(message(agreed, changed(agreed, **{first: value}), name))
        mean = float(server.update.dense()[first].mean())
        weights = [r["weight"] for r in server.report]
        assert weights == pytest.approx([1 / 3] * 3 if keep else [1 / 2, 1 / 2, 0])
        assert mean == pytest.approx(102.5 / 3 if keep else 1.25)


def test_a_tuner_that_replaces_is_refused_and_so_is_another_model():
    with pytest.raises(LuthierError, match="the update of dept cannot be averaged"):
        OneShot().agree([view_of()], Dept(), SETTINGS)
    with pytest.raises(LuthierError, match="base: east: its model is not the contract's"):
        AverageClient("east", contract(), view_of(seed=1), many(4))
    with pytest.raises(LuthierError, match="no result yet"):
        _ = clients(contract())[0].update


def test_a_contract_reads_back_as_it_was_written():
    agreed = contract(Spiel(density=0.05), rounds=3)
    again = AverageContract.model_validate(agreed.as_dict())
    assert again == agreed and again.digest == agreed.digest and isinstance(again.tuner, Spiel)
    assert contract(Spiel(density=0.06), rounds=3).digest != agreed.digest
