"""The same parties as processes of their own, over flwr: a server's app and a client's.

flwr carries bytes; what they are, who may send them and what is refused is decided by the parties, as in one process. A
server's journal lies in its folder, so that a run that was killed is simply started again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from luthier.collaboration.arriving import left
from luthier.collaboration.base import Disclosure, Sent, Tick
from luthier.collaboration.folder import LIMIT, Place
from luthier.collaboration.messages import Refused, decode
from luthier.collaboration.rounds import RoundServer

RECORD = "luthier"
PATIENCE = 0.2  # seconds between looks for answers

server = ServerApp()
client = ClientApp()


# --- the server's process ---


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    place = Place(Path(str(config["folder"])))
    clients = str(config["clients"]).split(",")
    party = place.protocol.server(place.contract, clients, place.journal(), place)
    serve(party, grid, clients, float(config["patience"]), lambda text: print(text, flush=True))
    left(place, party, Path(str(config["output"])))


def serve(party: RoundServer, grid: Grid, clients: list[str], patience: float, say: Callable[[str], None]) -> None:
    """Rounds until the last is closed.

    patience  seconds that a round waits for whoever has not answered; then those that have count
    """
    nodes = _nodes(grid, clients, patience, say)
    waiting, began = party.begin(), time.monotonic()
    asked: dict[str, str] = {}  # flwr's number of a message -> client
    while not party.finished:
        asked |= _pushed(grid, [s for s in waiting if s.to in nodes], nodes)
        waiting, round = [], party.round
        for reply in grid.pull_messages(list(asked)):
            name = asked.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                say(f"lost    {name}: {reply.error.reason}")
                continue
            waiting += _taken(party, name, bytes(reply.content[RECORD]["bytes"]), say)  # type: ignore[arg-type]
        if party.round == round and time.monotonic() - began > patience:
            say(f"round   {round}: time is up; {', '.join(sorted(party.gathering.missing))} did not answer")
            waiting += party.handle(Tick())
            began = time.monotonic()
        if party.round != round:
            say(f"round   {round} of {party.rounds} is closed")
            began = time.monotonic()
        time.sleep(PATIENCE)
    results = [s for s in party.results() if s.to in nodes]
    for _ in grid.send_and_receive(_wrapped(results, nodes), timeout=patience):
        pass


def _nodes(grid: Grid, clients: list[str], patience: float, say: Callable[[str], None]) -> dict[str, int]:
    """Client -> flwr's number of its node; those that are there when time is up."""
    known: dict[str, int] = {}
    began = time.monotonic()
    while len(known) < len(clients) and time.monotonic() - began < patience:
        new = [n for n in grid.get_node_ids() if n not in known.values()]
        asks = [_message(b"", n) for n in new]
        for reply in grid.send_and_receive(asks, timeout=patience) if asks else []:
            if not reply.has_error():
                name = str(reply.content[RECORD]["name"])
                if name in clients:
                    known[name] = reply.metadata.src_node_id
                    say(f"joined  {name}")
        time.sleep(PATIENCE)
    return known


def _taken(party: RoundServer, name: str, data: bytes, say: Callable[[str], None]) -> list[Sent]:
    """What a client's bytes lead to; bytes that are no message are refused, and lose nothing that has arrived."""
    try:
        message = decode(data, LIMIT)
        if message.header.sender != name:
            raise Refused("sender", f"{name} sent a message of {message.header.sender}")
    except Refused as error:
        say(f"refused {name}: {error}")
        return []
    answers = party.handle(message)
    for sent in answers:
        if sent.message.header.kind == "refusal":
            say(f"refused {sent.to}: {sent.message.header.notes['says']}")
    return answers


def _pushed(grid: Grid, sent: list[Sent], nodes: Mapping[str, int]) -> dict[str, str]:
    numbers = list(grid.push_messages(_wrapped(sent, nodes))) if sent else []
    # A refusal wants no answer, but flwr gives every message one.
    return {number: s.to for number, s in zip(numbers, sent, strict=True) if s.message.header.kind == "state"}


def _wrapped(sent: list[Sent], nodes: Mapping[str, int]) -> list[Message]:
    return [_message(s.message.encode(), nodes[s.to]) for s in sent]


def _message(data: bytes, node: int) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({"bytes": data})}), dst_node_id=node, message_type="query")


# --- a client's process ---


@client.query()
def _answer(message: Message, context: Context) -> Message:
    config = context.node_config
    name, data = str(config["name"]), bytes(message.content[RECORD]["bytes"])  # type: ignore[arg-type]
    if not data:
        return _reply(message, name=name)
    found = answered(Path(str(config["folder"])), name, str(config["data"]), data)
    return _reply(message, bytes=found)


def _reply(message: Message, **values: Any) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord(values)}), reply_to=message)


def answered(folder: Path, name: str, data: str, received: bytes) -> bytes:
    """What a client says to a server's bytes; every answer is written to sent.jsonl first: what leaves, to whom, how much."""
    place = Place(folder)
    message = decode(received, LIMIT)
    if message.header.kind == "result":
        (folder / f"{name}.result").write_bytes(received)
    if message.header.kind != "state":
        return b""
    rows = place.rendered(place.rows(data, Path()))
    party = place.protocol.client(name, place.contract, place.first, rows)
    (sent,) = party.handle(message)
    _note(folder, party.disclosure(sent), sent)
    return sent.message.encode()


def _note(folder: Path, disclosure: Disclosure, sent: Sent) -> None:
    entry = {**disclosure._asdict(), "round": sent.message.header.round, "digest": sent.message.digest}
    with (folder / "sent.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


# --- flwr's own processes ---

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip
APP = """[project]
name = "luthier-collaboration"
version = "0.1.0"
description = "Parties of a collaboration by luthier"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "luthier"

[tool.flwr.app.components]
serverapp = "luthier_collaboration:server"
clientapp = "luthier_collaboration:client"

[tool.flwr.app.config]
folder = {folder}
clients = {clients}
output = {output}
patience = {patience}
"""


def environment(home: Path) -> dict[str, str]:
    """For flwr's processes: nothing is told to anybody, nothing is installed; its files lie in `home`. They start others by
    name, so that the folder of this Python's programs comes first in their path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def app_in(path: Path, control: str, certificates: Path | None, **config: Any) -> None:
    """flwr's folder of an app, and the configuration that leads to the superlink at `control`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "pyproject.toml").write_text(APP.format(**{k: json.dumps(v) for k, v in config.items()}), encoding="utf-8")
    (path / "luthier_collaboration.py").write_text(
        '"""Our parties, as flwr finds them."""\n\nfrom luthier.collaboration.flower import client, server\n\n'
        '__all__ = ["client", "server"]\n'
    )
    line = (
        "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates / 'ca.pem'))}"
    )
    connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{control}"\n{line}\n'
    (path / "config.toml").write_text(connection)
