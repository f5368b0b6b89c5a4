"""flwr's processes around the parties: a superlink and a run for the server, a supernode for each client."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from luthier.support import machine
from luthier.support.errors import LuthierError
from luthier.support.progress import Say

SENT = "sent"  # folder of a client's messages and audits, by name and round
GIVEN = "given"  # folder of the server's results, by client
RECORD = "luthier"  # the record in flwr's messages that holds a message of luthier
STARTING = 60.0  # seconds in which flwr's server must start to listen

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
models = {models}
"""


class Address(NamedTuple):
    """host:port of the server, and the folder of certificates that protect the connection (None: no protection).

    certificates  ca.pem for clients; server.pem and server.key beside it for the server
    """

    host: str
    port: int
    certificates: Path | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Client(NamedTuple):
    """A client that joins, its rows, and how thoroughly it audits (see `federation.client.AuditSettings`).

    models  where the contract's models are on this machine, by role
    """

    name: str
    data: str
    held: str | None = None
    canaries: int = 100
    others: int = 100
    send_anyway: bool = False
    models: Mapping[str, str] | None = None

    def to_config(self) -> dict[str, str | int | bool]:
        """The configuration for flwr's node, which has another working folder."""
        files = {k: str(Path(v).resolve()) for k, v in (("data", self.data), ("held", self.held)) if v is not None}
        return {
            "name": self.name,
            "canaries": self.canaries,
            "others": self.others,
            "send_anyway": self.send_anyway,
            "models": _written(self.models),
            **files,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Client:
        return cls(**{k: config[k] for k in cls._fields if k in config} | {"models": json.loads(config["models"])})


def _written(models: Mapping[str, str] | None) -> str:
    """Models by role, as flwr's configuration holds them; folders as absolute paths."""
    return json.dumps({r: str(Path(m).resolve()) if Path(m).exists() else m for r, m in (models or {}).items()})


def address(text: str, certificates: Path | None, insecure: bool) -> Address:
    """Parse an address. Raises LuthierError for a text that is none, or an unprotected connection to another machine."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise LuthierError(f"{text!r} is not an address: write host:port, for example 127.0.0.1:9092")
    if certificates is None and not insecure and not _loopback(host):
        raise LuthierError(
            f"{text}: without certificates, others can read and change what is sent to another machine; "
            "name a folder with --certificates, or pass --insecure"
        )
    return Address(host, int(port), certificates)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    folder: Path, clients: Sequence[str], at: Address, patience: float, output: Path, say: Say,
    models: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Wait for clients, carry out the rounds, save the results. After a kill it continues from its journal.

    models  where the contract's models are on this machine, by role
    """
    home, report = folder / "flwr", output / "report.html"
    began = _changed(report)  # of an earlier call
    app_in(
        home, str(at), at.certificates, folder=str(folder.resolve()), clients=",".join(clients), output=str(output.resolve()),
        patience=patience, models=_written(models),
    )  # fmt: skip
    link = ["flower-superlink", "--host", at.host, "--port", str(at.port), *_server_side(at)]
    with ExitStack() as running:
        superlink = running.enter_context(_process(link, home, "superlink.log"))
        _listening(at, superlink, home / "superlink.log")
        say(f"serve   {at}: waiting for {', '.join(clients)}")
        run = running.enter_context(_process(["flwr", "run", str(home), "here", "--stream"], home, "run.log"))
        told = Tail(home / "run.log", say)
        while run.poll() is None:
            told.read()
            time.sleep(0.3)
        told.read()
    if told.ended:
        raise LuthierError(told.ended)
    if _changed(report) == began:
        raise LuthierError(f"the run ended without a result; see {home / 'run.log'}")


def join(folder: Path, client: Client, at: Address, say: Say) -> Path:
    """Answer a server until it has given a result. Returns the adapter's folder. Raises LuthierError if an audit held a
    message back."""
    name = client.name
    given, held, home = folder / GIVEN / name, folder / f"{name}.held-back", folder / f"flwr-{name}"
    result = given / "update.json"
    home.mkdir(exist_ok=True)
    held.unlink(missing_ok=True)
    config = {"folder": str(folder.resolve()), **client.to_config()}
    words = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
    command = [
        "flower-supernode", "--superlink", str(at), "--port", str(_free_port()), "--node-config", words, *_client_side(at),
    ]  # fmt: skip
    began = _changed(result)  # of an earlier call
    with _process(command, home, "supernode.log") as node:
        say(f"join    {at} as {name}; rows stay here; what is sent is noted in {folder / 'sent.jsonl'}")
        if kept := sorted(folder.glob(f"{SENT}/{name}-*.message")):
            say(f"again   rounds that were answered before get the same answer: {', '.join(map(str, kept))}")
        told = Tail(home / "supernode.log", say)
        while not held.exists() and _changed(result) in (0, began):
            if node.poll() is not None:
                raise LuthierError(f"flwr's node ended with {node.returncode}; see {home / 'supernode.log'}")
            told.read()
            time.sleep(0.5)
        time.sleep(2.0)  # until flwr has reported that the message arrived
        told.read()
    if held.exists():
        raise LuthierError(held.read_text(encoding="utf-8"))
    return given


def _changed(file: Path) -> int:
    """When a file was last written, in nanoseconds; 0 if it does not exist. It may be replaced at any moment."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _server_side(at: Address) -> list[str]:
    if at.certificates is None:
        return ["--insecure"]
    pem = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
    return [w for flag, file in pem.items() for w in (f"--ssl-{flag}", str(at.certificates / file))]


def _client_side(at: Address) -> list[str]:
    return ["--insecure"] if at.certificates is None else ["--root-certificates", str(at.certificates / "ca.pem")]


def environment(home: Path) -> dict[str, str]:
    """Environment of flwr's processes: no telemetry, no installation, files in `home`. They start other programs by name, so
    this Python's folder of programs comes first in their path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def app_in(path: Path, control: str, certificates: Path | None, **config: Any) -> None:
    """Write flwr's folder of an app, and the configuration that leads to the superlink at `control`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "pyproject.toml").write_text(APP.format(**{k: json.dumps(v) for k, v in config.items()}), encoding="utf-8")
    (path / "luthier_collaboration.py").write_text(
        '"""Our parties, as flwr finds them."""\n\nfrom luthier.federation.flower_apps import client, server\n\n'
        '__all__ = ["client", "server"]\n'
    )
    line = (
        "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates / 'ca.pem'))}"
    )
    connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{control}"\n{line}\n'
    (path / "config.toml").write_text(connection)


@contextmanager
def _process(command: list[str], home: Path, log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A flwr process whose process group ends with the block."""
    program = Path(sys.executable).parent / command[0]
    with (home / log).open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [str(program), *command[1:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(home),
            start_new_session=True,
            preexec_fn=machine.end_with_parent,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: flwr starts processes of its own."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _listening(at: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if process.poll() is not None:
            raise LuthierError(f"flwr's server ended with {process.returncode}; see {log}")
        with socket.socket() as one:
            one.settimeout(1.0)
            if one.connect_ex((at.host, at.port)) == 0:
                return
        time.sleep(0.2)
    raise LuthierError(f"{at}: flwr's server did not listen within {STARTING:.0f} s; see {log}")


class Tail:
    """Passes on what the parties print, out of flwr's log. `ended` is the reason why there will be no result."""

    TOLD = ("joined ", "round ", "refused ", "lost ", "without ", "tune ", "audit ")

    def __init__(self, log: Path, say: Say) -> None:
        self.log, self.say, self.seen, self.ended = log, say, 0, ""

    def read(self) -> None:
        """Pass on new whole lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[self.seen :]:
            if line.startswith(self.TOLD):
                self.say(line)
            if line.startswith("ended "):
                self.ended = line.removeprefix("ended ").strip()
        self.seen = len(lines)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
