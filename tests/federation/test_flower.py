"""The server's loop over flwr's grid, with a grid made up: who joins, who is lost, who writes nonsense, who comes again."""

from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict

from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message
from luthier.collaboration.one_shot import AverageClient, AverageServer, OneShot
from luthier.federation import flower
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.tuners.lora import Lora

NAMES = ("north", "south")
SETTINGS = TrainSettings(max_steps=1, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0)


@pytest.fixture(scope="module")
def agreed():
    return OneShot().agree([view_of()], Lora(rank=2), SETTINGS)


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    """flwr makes messages inside a run alone."""
    made = lambda data, node: SimpleNamespace(content=content(bytes=data), metadata=SimpleNamespace(dst_node_id=node))  # noqa: E731
    monkeypatch.setattr(flower, "_message", made)
    monkeypatch.setattr(flower, "PAUSE", 0.01)


class Grid:
    """flwr's, as far as the server uses it. A node is a function from the bytes it is sent to a reply's content, or None
    where it never answers."""

    def __init__(self, **nodes):
        self.nodes = {i: node for i, node in enumerate(nodes.values(), 1)}
        self.waiting, self.count, self.results = {}, 0, []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        numbers = []
        for m in messages:
            self.count += 1
            numbers.append(str(self.count))
            data, node = bytes(m.content["luthier"]["bytes"]), m.metadata.dst_node_id
            if data and flower.decode(data, 10**8).header.kind == "result":
                self.results.append(node)
            content = self.nodes[node](data) if node in self.nodes else None
            if content is not None:
                self.waiting[numbers[-1]] = (node, content)
        return numbers

    def pull_messages(self, numbers):
        out = []
        for n in [n for n in numbers if n in self.waiting]:
            node, content = self.waiting.pop(n)
            meta = SimpleNamespace(reply_to_message_id=n, src_node_id=node)
            error = SimpleNamespace(reason="it died") if content == "died" else None
            out.append(
                SimpleNamespace(metadata=meta, content=content, error=error, has_error=lambda e=error: e is not None)
            )
        return out


def content(**values):
    return RecordDict({"luthier": ConfigRecord(values)})


def node(name, agreed, answer=None):
    """An honest client, or one that gives `answer` of its honest bytes."""

    def reply(data):
        if not data:
            return content(name=name)
        party = AverageClient(name, agreed, view_of(), rows_of())
        said = flower.decode(data, 10**8)
        if said.header.kind != "state":
            return content(bytes=b"")
        honest = party.handle(said)[0].message.encode()
        return content(bytes=honest) if answer is None else answer(honest)

    return reply


def served(agreed, grid, patience=0.5, journal=None):
    party, said, arrivals = AverageServer(agreed, NAMES, journal), [], []
    nodes = flower.Nodes(grid, list(NAMES))
    flower.serve(party, nodes, patience, said.append, lambda: arrivals.append(len(party.gathering.arrived)))
    flower.give(party, nodes, said.append, patience)
    return party, said, arrivals


def test_two_honest_clients_and_a_stranger(agreed):
    grid = Grid(a=node("north", agreed), b=node("stranger", agreed), c=node("south", agreed))
    party, said, arrivals = served(agreed, grid, patience=60)
    assert party.finished and said == ["joined  north", "joined  south", "round   1 of 1 is closed"]
    assert arrivals == [1, 2] and sorted(grid.results) == [1, 3]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda honest: RecordDict({}), "refused south: form: south sent no bytes"),
        (lambda honest: content(bytes="text"), "refused south: form: south sent no bytes"),
        (lambda honest: content(bytes=honest[:-3]), "refused south: truncated"),
        (lambda honest: "died", "lost    south: it died"),
        (lambda honest: None, "time is up; south did not answer"),
    ],
)
def test_nonsense_is_refused_and_the_round_ends_without_it(agreed, answer, says):
    party, said, _ = served(agreed, Grid(a=node("north", agreed), b=node("south", agreed, answer)))
    assert party.finished and any(says in s for s in said), said
    assert [r["client"] for r in party.report] == ["north"]


def test_a_node_that_does_not_say_its_name_is_nobody(agreed):
    odd = lambda data: RecordDict({"other": ConfigRecord({"name": "north"})})  # noqa: E731
    party, said, _ = served(agreed, Grid(a=odd, b=node("north", agreed), c=lambda data: content(name=3)))
    assert said.count("joined  north") == 1 and party.finished


def test_a_client_that_died_is_asked_again_where_it_comes_back(agreed):
    grid = Grid(a=node("north", agreed), b=node("south", agreed, lambda honest: comes_again()))

    def comes_again():
        del grid.nodes[2]
        grid.nodes[3] = node("south", agreed)

    party, said, _ = served(agreed, grid, patience=60)
    assert said.count("joined  south") == 2 and party.finished and len(party.report) == 2


def test_a_server_started_again_at_the_end_gives_results_to_those_that_come(agreed, tmp_path):
    first = Grid(a=node("north", agreed), b=node("south", agreed))
    served(agreed, first, patience=60, journal=Journal(tmp_path, 10**8))
    again = Grid(a=node("south", agreed), b=node("stranger", agreed), c=node("north", agreed))
    party, said, _ = served(agreed, again, patience=60, journal=Journal(tmp_path, 10**8))
    assert party.heard == set(NAMES) and sorted(first.results) == [1, 2] and sorted(again.results) == [1, 3]
    assert said == ["joined  south", "joined  north"]
    _, said, _ = served(agreed, Grid(), patience=0.5, journal=Journal(tmp_path, 10**8))
    assert said == [], "nobody comes: it does not wait for ever"


def declined(name, agreed):
    says = "no\nended   all is lost"
    message = Message.of("refusal", agreed.digest, name, agreed.base, {}, notes={"name": "held-back", "says": says})
    return node(name, agreed, lambda honest: content(bytes=message.encode()))


def test_whoever_declines_is_not_waited_for_and_where_all_do_it_ends(agreed, capsys):
    party, said, _ = served(agreed, Grid(a=node("north", agreed), b=declined("south", agreed)), patience=60)
    assert party.finished and any(s.startswith("without south: no") for s in said)
    with pytest.raises(LuthierError, match="north, south will not send anything"):
        served(agreed, Grid(a=declined("north", agreed), b=declined("south", agreed)), patience=60)
    flower._said(next(s for s in said if s.startswith("without")))
    assert capsys.readouterr().out.count("\n") == 1, "nobody writes a line of the server's own"
