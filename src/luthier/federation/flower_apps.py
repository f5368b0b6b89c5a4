"""The apps that flwr starts: a server's app once, a client's app for every message. They import what they need late, so
that a node can answer who it is in half a second, not in ten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from luthier.federation.network import RECORD, Client

server = ServerApp()
client = ClientApp()


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    from luthier.federation.flower import run_server
    from luthier.federation.folder import Workspace

    c = context.run_config
    workspace = Workspace(Path(str(c["folder"])), json.loads(str(c["models"])))
    run_server(grid, workspace, str(c["clients"]).split(","), Path(str(c["output"])), float(c["patience"]))


@client.query()
def _answer(message: Message, context: Context) -> Message:
    config, received = context.node_config, bytes(message.content[RECORD]["bytes"])  # type: ignore[arg-type]
    if not received:
        return _reply(message, name=str(config["name"]))
    from luthier.federation.flower import answered

    return _reply(message, bytes=answered(Path(str(config["folder"])), Client.from_config(config), received))


def _reply(message: Message, **values: Any) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord(values)}), reply_to=message)
