"""FedKSeed as messages: what travels, who is refused, and that server and clients hold the same model."""

import numpy as np
import pytest
import torch

from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused, decode
from luthier.collaboration.parties import Sent, Tick, in_process, sizes
from luthier.collaboration.privacy import Privacy
from luthier.collaboration.seed_rounds import SeedClient, SeedContract, SeedRounds, SeedServer
from luthier.inference.scoring import mean_loss, row_scores
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.tuners.fedkseed import FedKSeed
from luthier.tuners.lora import Lora

SETTINGS = TrainSettings(
    max_steps=6, batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant", warmup_fraction=0.0
)
NAMES = ("a", "b", "c")


def contract(rounds=2, num_seeds=64, **more):
    return SeedRounds(rounds=rounds, **more).agree([view_of()], FedKSeed(num_seeds=num_seeds), SETTINGS)


def clients(agreed):
    return [SeedClient(n, agreed, view_of(), rows_of(seed=i)) for i, n in enumerate(NAMES)]


def carried(server, parties, drop=lambda sent: False):
    """All messages of a federation, through their bytes."""
    seen = []

    def gate(sent, disclosure):
        again = decode(sent.message.encode(), 10**6)
        assert again.digest == sent.message.digest
        seen.append((sent, disclosure))

    in_process([server, *parties], server.begin(), gate)
    return seen


def dense(server):
    return {n: t.clone() for n, t in server.update().dense().items()}


def test_server_and_clients_hold_the_same_model_after_every_round():
    agreed = contract(rounds=3)
    server, parties = SeedServer(agreed, NAMES), clients(agreed)
    seen = carried(server, parties)
    assert server.round == 3 and {s.message.header.kind for s in server.begin()} == {"result"}
    assert [s.message.header.kind for s, _ in seen].count("scalars") == 9
    # The model after a round is the weighted mean of what the clients that trained in it ended with.
    alone = SeedServer(contract(rounds=1), NAMES)
    ends, replies = [], []
    for party, sent in zip(clients(alone.contract), alone.begin(), strict=True):
        reply = party.handle(sent.message)[0]
        replies.append(reply)
        one = SeedServer(contract(rounds=1), (party.name,))
        tensors = reply.message.tensors()
        one.scalars.index_add_(0, tensors["index"].to(torch.int64), tensors["scalar"].double())
        ends.append(dense(one))
    for reply in replies:
        alone.handle(reply.message)
    for n, t in dense(alone).items():
        torch.testing.assert_close(t, sum(e[n] for e in ends) / 3, atol=1e-6, rtol=0)


def test_4096_seeds_and_200_steps_stay_under_18_kilobytes():
    settings = SETTINGS.model_copy(update={"max_steps": 200, "batch_size": 1})
    agreed = SeedRounds(rounds=1).agree([view_of()], FedKSeed(num_seeds=4096), settings)
    server = SeedServer(agreed, ("a",))
    down = server.begin()[0].message
    up = SeedClient("a", agreed, view_of(), rows_of()).handle(down)[0].message
    numbers, framed = (sum(x) for x in zip(sizes(down), sizes(up), strict=True))
    assert sizes(down)[0] == 4096 * 4 and sizes(up)[0] == 200 * (2 + 4)
    assert numbers < 18_000 < 20_000 > framed > numbers
    assert up.tensors()["index"].dtype == torch.uint16


def test_pro_sends_probabilities_and_prefers_seeds_that_moved_the_loss():
    agreed = contract(rounds=2, num_seeds=16, pro=True)
    server = SeedServer(agreed, NAMES)
    first = server.begin()[0].message.tensors()["probabilities"]
    assert torch.equal(first, torch.full((16,), 1 / 16))
    parties = clients(agreed)
    carried(server, parties)
    assert all(p.update.digest() == server.update().digest() for p in parties), "told at the end"
    with pytest.raises(LuthierError, match="a has been given no result yet"):
        _ = clients(agreed)[0].update
    later = server.state()["probabilities"]
    assert later.max() > later.min() and float(later.max() / later.min()) <= np.e + 1e-4
    moved = np.array([np.abs(h).mean() for h in server.history])
    assert int(later.argmax()) == int(moved.argmax())
    assert "probabilities" not in SeedServer(contract(), NAMES).begin()[0].message.tensors()


def test_a_client_draws_seeds_by_the_probabilities_it_was_sent():
    agreed = contract(num_seeds=16, pro=True)
    state = SeedServer(agreed, NAMES).begin()[0].message
    only = torch.zeros(16).index_fill(0, torch.tensor([5]), 1.0)
    state = Message.of("state", agreed.digest, "server", agreed.base, {**state.tensors(), "probabilities": only})
    reply = clients(agreed)[0].handle(state)[0].message.tensors()
    assert set(reply["index"].to(torch.int64).tolist()) == {5}


def test_participation_draws_the_same_clients_everywhere():
    names = tuple(f"c{i}" for i in range(10))
    server, other = (SeedServer(contract(participation=0.3), names) for _ in range(2))
    assert len(server.chosen(0)) == 3 and [server.chosen(r) for r in range(5)] == [other.chosen(r) for r in range(5)]
    assert len({server.chosen(r) for r in range(8)}) > 1


def test_time_up_closes_a_round_with_those_that_came_and_a_restart_does_not_open_it_again(tmp_path):
    agreed = contract(rounds=2)
    server = SeedServer(agreed, NAMES, Journal(tmp_path, 10**6))
    assert server.handle(Tick()) == [] and server.round == 0  # nobody came: there is nothing to add up
    states = {s.to: s.message for s in server.begin()}
    party = {c.name: c for c in clients(agreed)}
    early, late = (party[n].handle(states[n])[0].message for n in ("a", "b"))
    server.handle(early)
    after = server.handle(Tick())
    assert server.round == 1 and {s.to for s in after} == set(NAMES)
    again = SeedServer(agreed, NAMES, Journal(tmp_path, 10**6))
    assert again.round == 1 and torch.equal(again.scalars, server.scalars)
    for s in (server, again):
        answer = s.handle(late)
        assert answer[0].message.header.notes["name"] == "round"
    assert torch.equal(again.scalars, server.scalars)


def scalars(server, index=(1, 2), value=(0.5, -1.0), sender="a", dtype=np.uint16, **notes):
    tensors = {"index": torch.from_numpy(np.array(index, dtype=dtype)), "scalar": torch.tensor(value)}
    told = {"steps": len(index), "rows": 4, **notes}
    c = server.contract
    return Message.of("scalars", c.digest, sender, c.base, tensors, round=server.round, notes=told)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"index": (64, 2)}, "seed"),
        ({"index": (1, 2), "dtype": np.int64}, "dtype"),
        ({"index": (-1, 2), "dtype": np.int64}, "dtype"),
        ({"index": (0.5, 2), "dtype": np.float32}, "dtype"),
        ({"value": (float("nan"), 1.0)}, "not-finite"),
        ({"value": (float("inf"), 1.0)}, "not-finite"),
        ({"value": (1.0,)}, "shape"),
        ({"steps": 3}, "length"),
        ({"rows": 0}, "rows"),
        ({"sender": "stranger"}, "unknown"),
    ],
)
def test_scalars_that_cannot_be_used_are_refused_and_never_added(more, name):
    server = SeedServer(contract(), NAMES)
    answer = server.handle(scalars(server, **more))
    assert answer[0].message.header.kind == "refusal" and answer[0].message.header.notes["name"] == name
    assert not server.scalars.any() and not server.gathering.arrived
    server.handle(scalars(server))
    assert list(server.gathering.arrived) == ["a"]


def test_a_client_is_told_why_it_was_refused():
    agreed = contract()
    server, party = SeedServer(agreed, ("b", "c")), clients(agreed)[0]
    for sent in server.handle(party.handle(SeedServer(agreed, NAMES).begin()[0].message)[0].message):
        party.handle(sent.message)
    assert party.refusals == ["unknown: 'a' is not one of the clients"]


def test_other_models_and_federations_are_refused():
    agreed = contract()
    with pytest.raises(Refused, match="base: a"):
        SeedClient("a", agreed, view_of(seed=1), rows_of())
    with pytest.raises(Refused, match="contract: a was sent"):
        SeedClient("a", agreed, view_of(), rows_of()).handle(SeedServer(contract(rounds=5), NAMES).begin()[0].message)
    with pytest.raises(LuthierError, match="two bytes"):
        contract(num_seeds=2**16 + 1)
    with pytest.raises(LuthierError, match="tuner: lora sends no seeds"):
        SeedRounds().agree([view_of()], Lora(), SETTINGS)
    with pytest.raises(LuthierError, match="seed-rounds.privacy"):
        contract(privacy=Privacy(epsilon=1.0))
    again = SeedContract.model_validate_json(agreed.model_dump_json())
    assert again.digest == agreed.digest and list(again.shapes) == list(agreed.shapes)


def test_what_leaves_is_said_with_its_bytes():
    agreed = contract(rounds=1)
    seen = carried(SeedServer(agreed, NAMES), clients(agreed))
    for sent, told in seen:
        assert told.to == sent.to and told.bytes == sizes(sent.message) and told.promise == "no formal privacy"
    mine = next(d for s, d in seen if s.message.header.sender == "a")
    assert mine.what.startswith("6 numbers") and mine.bytes[0] == 6 * 6


def test_training_together_lowers_the_loss():
    settings = SETTINGS.model_copy(update={"max_steps": 40, "batch_size": 2, "learning_rate": 1e-3})
    agreed = SeedRounds(rounds=2).agree([view_of()], FedKSeed(num_seeds=128), settings)
    server = SeedServer(agreed, NAMES[:2])
    carried(server, clients(agreed)[:2])
    view, rows = view_of(), [r for i in range(2) for r in rows_of(seed=i)]
    before = mean_loss(row_scores(view, rows, 1000))
    with server.update().bind(view):
        assert mean_loss(row_scores(view, rows, 1000)) < before - 0.02


def test_nothing_is_sent_back_for_a_tick():
    assert clients(contract())[0].handle(Tick()) == []
    assert isinstance(SeedServer(contract(), NAMES).begin()[0], Sent)
