"""The parties as separate processes, over flwr: the work of flwr's apps.

flwr only carries bytes. The parties decide what the bytes mean, who may send them and what is refused, as in one process. A
server's journal is in its folder, so a killed run is simply started again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from luthier.collaboration.messages import Message as Envelope
from luthier.collaboration.messages import Refused, decode
from luthier.collaboration.parties import Sent, Tick
from luthier.collaboration.rounds import RoundServer
from luthier.federation.client import AuditFailed, AuditSettings, prepared, send
from luthier.federation.folder import LIMIT, Workspace
from luthier.federation.network import GIVEN, RECORD, SENT, Client
from luthier.federation.outcome import write_outcome
from luthier.federation.server import write_results, write_so_far
from luthier.support.errors import LuthierError
from luthier.support.files import whole, write_text
from luthier.support.progress import Say

GIVING = 60.0  # seconds in which a client that took part can come back for its result
PAUSE = 0.2  # seconds between looks for answers

# --- the server's process ---


def run_server(grid: Grid, workspace: Workspace, clients: list[str], output: Path, patience: float) -> None:
    """Do a server's whole work, starting from its journal: rounds, results on disk, then results to the clients."""
    party = workspace.protocol.server(workspace.contract, clients, workspace.journal(), workspace.lab)
    nodes = Nodes(grid, clients)
    try:
        serve(party, nodes, patience, _said, lambda: write_so_far(workspace, party, output))
    except LuthierError as error:
        _said(f"ended   {error}")
        return
    write_results(workspace, party, output)
    give(party, nodes, _said)


class Nodes:
    """flwr's nodes: which client is at which node, and what was asked. A client that is killed and joins again gets a new node.

    by_client  client -> flwr's number of its node
    asked      flwr's number of a message -> client, or None if a node was asked who it is
    """

    def __init__(self, grid: Grid, clients: list[str]) -> None:
        self.grid, self.clients = grid, clients
        self.by_client: dict[str, int] = {}
        self.asked: dict[str, str | None] = {}
        self._seen: set[int] = set()

    def ask_names(self) -> None:
        """Ask new nodes who they are."""
        new = sorted(set(self.grid.get_node_ids()) - self._seen)
        self._seen |= set(new)
        if new:
            self.asked |= dict.fromkeys(self.grid.push_messages([_message(b"", n) for n in new]))

    def send(self, sent: list[Sent]) -> None:
        """Send messages to the clients that are there."""
        here = [s for s in sent if s.to in self.by_client]
        if not here:
            return
        numbers = self.grid.push_messages([_message(s.message.encode(), self.by_client[s.to]) for s in here])
        # A refusal needs no answer, but flwr gives every message one.
        self.asked |= {n: s.to for n, s in zip(numbers, here, strict=True) if s.message.header.kind != "refusal"}

    def answers(self) -> Iterator[tuple[str | None, Message]]:
        """(client, answer); client is None for a node's name."""
        for reply in self.grid.pull_messages(list(self.asked)):
            yield self.asked.pop(reply.metadata.reply_to_message_id), reply

    def named(self, reply: Message) -> str | None:
        """The client's name in a node's answer; None if it is not one of the clients."""
        name = _field(reply, "name")
        if not isinstance(name, str) or name not in self.clients:
            return None
        self.by_client[name] = reply.metadata.src_node_id
        return name


def serve(party: RoundServer, nodes: Nodes, patience: float, say: Say, arrived: Callable[[], None]) -> None:
    """Carry out rounds until the last is closed. Raises LuthierError if no client will send.

    patience  seconds that a round waits for clients that have not answered; then it closes without them
    arrived   is called after each answer
    """
    began, round = time.monotonic(), party.round
    while not party.finished:
        nodes.ask_names()
        for name, reply in nodes.answers():
            if reply.has_error():
                say(f"lost    {name or 'a node'}: {reply.error.reason}")
            elif name is not None:
                nodes.send(_at_once(_taken(party, name, _field(reply, "bytes"), say)))
                arrived()
            elif (new := nodes.named(reply)) is not None:
                say(f"joined  {new}")
                nodes.send(party.back(new))
        if party.round == round and time.monotonic() - began > patience:
            say(f"round   {round + 1}: time is up; {_late(party)}")
            nodes.send(_at_once(party.handle(Tick())))
            began = time.monotonic()
        if party.round != round:
            say(f"round   {party.round} of {party.rounds} is closed")
            began, round = time.monotonic(), party.round
        time.sleep(PAUSE)


def give(party: RoundServer, nodes: Nodes, say: Say, patience: float = GIVING) -> None:
    """Send the results to the clients that are there, and to those that took part and come back in time. The same command
    sends them again."""
    results, began = {s.to: s for s in party.results()}, time.monotonic()
    sent: set[str] = set()
    given: set[str] = set()
    while not (party.heard & results.keys()) <= given and time.monotonic() - began < patience:
        nodes.ask_names()
        for name, reply in nodes.answers():
            if reply.has_error():
                say(f"lost    {name or 'a node'}: {reply.error.reason}")
            elif name is not None and _field(reply, "bytes") == b"":  # not a late answer to a round
                given.add(name)
            elif name is None and (new := nodes.named(reply)) is not None:
                say(f"joined  {new}")
                sent.discard(new)
        waiting = [results[n] for n in nodes.by_client if n in results and n not in sent]
        nodes.send(waiting)
        sent |= {s.to for s in waiting}
        time.sleep(PAUSE)


def _at_once(sent: list[Sent]) -> list[Sent]:
    """All messages except results, which are sent once they are on disk here."""
    return [s for s in sent if s.message.header.kind != "result"]


def _late(party: RoundServer) -> str:
    missing = ", ".join(sorted(party.gathering.missing))
    return f"{missing} did not answer" + (
        "" if party.gathering.arrived else ", and nobody else did; the round keeps waiting"
    )


def _field(reply: Message, name: str) -> Any:
    """A field of a reply; None if it is missing. Anyone may have written the reply."""
    record = reply.content.get(RECORD)
    return record.get(name) if isinstance(record, ConfigRecord) else None


def _taken(party: RoundServer, name: str, data: Any, say: Say) -> list[Sent]:
    """The answers to a client's bytes. Bytes that are no message are refused, and nothing that has arrived is lost."""
    try:
        if not isinstance(data, bytes):
            raise Refused("form", f"{name} sent no bytes")
        message = decode(data, LIMIT)
        if message.header.sender != name:
            raise Refused("sender", f"{name} sent a message of {message.header.sender}")
    except Refused as error:
        say(f"refused {name}: {error}")
        return []
    if message.header.kind == "refusal":
        say(f"without {name}: {message.header.notes.get('says', 'it does not say why')}")
    answers = party.handle(message)
    for sent in answers:
        if sent.message.header.kind == "refusal":
            say(f"refused {sent.to}: {sent.message.header.notes['says']}")
    return answers


def _message(data: bytes, node: int) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({"bytes": data})}), dst_node_id=node, message_type="query")


# --- a client's process ---


def answered(folder: Path, who: Client, received: bytes) -> bytes:
    """A client's answer to a server's bytes. It is audited first, and noted in sent.jsonl, before it is sent.

    A round is answered once. If the server asks again, the same bytes are sent: a second tuning would spend the privacy twice.
    """
    workspace, message = Workspace(folder, who.models), decode(received, LIMIT)
    if message.header.kind == "result":
        _keep(workspace, who, message)
    if message.header.kind != "state":
        return b""
    if message.header.round >= workspace.protocol.turns:
        asked = f"asked for round {message.header.round + 1} of {workspace.protocol.turns}"
        raise Refused("round", f"{asked}: the contract has no more rounds")
    stem = f"{who.name}-{message.header.round}"
    kept = folder / SENT / f"{stem}.message"
    if not kept.exists():
        try:
            _prepare(workspace, who, message, stem)
        except AuditFailed as error:
            write_text(folder / f"{who.name}.held-back", str(error))
            return _declined(who.name, message).encode()
    data = kept.read_bytes()
    note = json.loads(kept.with_suffix(".audit.json").read_text(encoding="utf-8"))
    entry = {**note["disclosure"], "round": message.header.round, "digest": decode(data, LIMIT).digest}
    with (folder / "sent.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return data


def _keep(workspace: Workspace, who: Client, result: Envelope) -> None:
    """Save the server's result as an adapter's folder. A client need not have the model that it belongs to."""
    party = workspace.protocol.client(who.name, workspace.contract, workspace.first, [])
    party.handle(result)
    target = workspace.path / GIVEN / who.name
    shutil.rmtree(target, ignore_errors=True)
    with whole(target) as temporary:
        roles = workspace.protocol.roles
        write_outcome(workspace, roles[-1], party.update, temporary, who.name, model_here=len(roles) == 1)


def _prepare(workspace: Workspace, who: Client, state: Envelope, stem: str) -> None:
    rows, held = workspace.rows_in(who.data), workspace.rows_in(who.held) if who.held else []
    audited = prepared(workspace, who.name, rows, AuditSettings(held, who.canaries, who.others), state, _said)
    _said(
        f"audit   round {state.header.round + 1}: {audited.verdict.outcome}; {workspace.path / SENT / f'{stem}.html'}"
    )
    send(audited, workspace.path / SENT, who.send_anyway, stem)


def _declined(name: str, state: Envelope) -> Envelope:
    """Say only that no message will come. What an audit found stays with the client."""
    head = state.header
    notes = {"name": "held-back", "says": "its audit failed, so it sends no message"}
    return Envelope.of("refusal", head.run, name, head.base, {}, round=head.round, notes=notes)


def _said(text: str) -> None:
    """Print one line, even if a message contains line breaks."""
    print(" ".join(text.splitlines()), flush=True)
