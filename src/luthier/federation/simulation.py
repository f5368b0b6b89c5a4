"""Simulate a protocol with all rows at hand: each client's result alone, together with the others, and with shared rows.

It helps to decide whether to set up a protocol, with your own data. There is no network; a network would not change the results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.collaboration.averaging import STEPS, best_step
from luthier.collaboration.journal import Journal
from luthier.collaboration.parties import Member, Sent
from luthier.collaboration.rounds import RoundServer
from luthier.federation.folder import LIMIT, Workspace
from luthier.federation.outcome import write_outcome
from luthier.federation.simulation_page import ALONE, SHARED, TOGETHER, UNTOUCHED, write_simulation
from luthier.run.folder import RunFolder
from luthier.support.cache import key_of
from luthier.support.errors import LuthierError
from luthier.support.files import whole, write_text
from luthier.support.progress import Say
from luthier.support.units import in_time
from luthier.update import Update
from luthier.update.files import load

FEW = 2  # smallest number of held-out rows of a client


class Client(NamedTuple):
    """A client's rendered rows: those that it tunes on, and its held-out rows."""

    rows: list[Any]
    held: list[Any]


def simulate(
    workspace: Workspace, files: Mapping[str, str], held: float, out: Path, say: Say = lambda _: None
) -> Path:  # fmt: skip
    """Carry out the whole simulation and write the report. After a stop, the same call continues.

    files  client -> its rows
    held   share of each client's rows that are held out for scoring
    Raises LuthierError for too few rows, or a folder that holds another simulation.
    """
    clients = {n: _split(workspace, n, file, held) for n, file in files.items()}
    with RunFolder(out).locked():
        _same(out, workspace, clients)
        server = workspace.protocol.server(
            workspace.contract, list(clients), Journal(out / "arrived", LIMIT), workspace.lab
        )
        work = Work(len(clients) + sum(len(server.chosen(r)) for r in range(server.rounds)) + 1, say)
        of_own = {n: _kept(workspace, out / "alone" / n, work, f"{n} alone", c.rows, n) for n, c in clients.items()}
        _together(workspace, server, clients, work)
        everybody = [r for c in clients.values() for r in c.rows]
        shared = _kept(workspace, out / "shared", work, "all rows in one place", everybody)
        given = {n: server.outcome(n) for n in clients}
        for n, update in given.items():
            if not (out / "together" / n).exists():
                with whole(out / "together" / n) as temporary:
                    write_outcome(workspace, workspace.protocol.roles[-1], update, temporary, n)
        say("judge   on held-out rows")
        found = _found(workspace, clients, of_own, given, shared)
        found |= _on_the_way(workspace, server, clients, out) | {
            "rounds": server.rounds,
            "report": server.report,
        }
        write_text(out / "found.json", json.dumps(found, indent=1, default=str))
        return write_simulation(out / "report.html", workspace, found)


def _split(workspace: Workspace, name: str, file: str, held: float) -> Client:
    rows = workspace.rows_in(file)
    count = round(held * len(rows))
    if count < FEW or count == len(rows):
        raise LuthierError(f"{name}: {count} of {len(rows)} rows would be held out; take at least {FEW}, and not all")
    order = workspace.lab.streams.at("held", name).permutation(len(rows)).tolist()
    return Client([rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])])


def _same(out: Path, workspace: Workspace, clients: Mapping[str, Client]) -> None:
    """Make sure that finished work in the folder has the same rows and contract."""
    key, file = key_of(workspace.contract.digest, {n: (c.rows, c.held) for n, c in clients.items()}), out / "asked.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["key"] != key:
        raise LuthierError(f"{out}: holds a simulation of other rows or another contract; choose another --output")
    write_text(file, json.dumps({"key": key, "clients": {n: len(c.rows) for n, c in clients.items()}}))


class Work:
    """Reports how many runs are done, and how long the rest takes."""

    def __init__(self, runs: int, say: Say) -> None:
        self.runs, self.done, self.say, self.made, self.began = runs, 0, say, 0, time.monotonic()

    def finished(self, what: str) -> None:
        """Count one more run."""
        self.done, self.made = self.done + 1, self.made + 1
        each = (time.monotonic() - self.began) / self.made
        self.say(f"run     {self.done} of {self.runs}: {what}; {in_time(each * (self.runs - self.done))} left")

    def found(self, what: str, count: int = 1) -> None:
        """Count runs that were made before."""
        self.done += count
        self.say(f"run     {self.done} of {self.runs}: {what}; made before")


def _kept(
    workspace: Workspace, folder: Path, work: Work, what: str, rows: Sequence[Any], name: str | None = None
) -> Update:
    """A run's update, read from its folder if it was made before. name: of a client alone; None: all clients' rows."""
    protocol, there = workspace.protocol, folder.exists()
    if not there:
        if name is None:
            update = protocol.centralised(workspace.contract, workspace.lab, rows)
        else:
            update = protocol.alone(name, workspace.contract, workspace.lab, rows)
        with whole(folder) as temporary:
            write_outcome(workspace, protocol.roles[0 if name else -1], update, temporary, what)
    (work.found if there else work.finished)(what)
    return load(folder)


def _together(workspace: Workspace, server: RoundServer, clients: Mapping[str, Client], work: Work) -> None:
    """Carry out the protocol message by message. The server's journal keeps what has arrived."""
    parties: dict[str, Member] = {}
    there = sum(len(server.chosen(r)) for r in range(server.round))
    there += 0 if server.finished else len(server.gathering.arrived)
    if there:
        work.found(f"{there} messages have arrived", there)
    waiting: list[Sent] = [] if server.finished else server.begin()
    while not server.finished:
        round, answers = server.round, []
        for state in waiting:
            if state.to not in parties:
                rows = clients[state.to].rows
                parties[state.to] = workspace.protocol.client(state.to, workspace.contract, workspace.first, rows)
            (sent,) = parties[state.to].handle(state.message)
            answers = server.handle(sent.message)
            for answer in answers:
                if answer.message.header.kind == "refusal":
                    raise LuthierError(f"the server refuses {state.to}: {answer.message.header.notes['says']}")
            work.finished(f"{state.to} in round {round + 1}")
        waiting = answers


# --- scoring ---


def _found(
    workspace: Workspace, clients: Mapping[str, Client], of_own: Mapping[str, Update], given: Mapping[str, Update], shared: Update
) -> dict[str, Any]:  # fmt: skip
    """Losses by model and client: on the client's own held-out rows, and the mean over those of all clients."""
    first, last = workspace.protocol.roles[0], workspace.protocol.roles[-1]

    def scored(role: str, update: Update | None) -> list[float]:
        return [workspace.loss(role, update, c.held) for c in clients.values()]

    table = {
        UNTOUCHED: dict.fromkeys(clients, scored(last, None)),
        ALONE: {n: scored(first, update) for n, update in of_own.items()},
        TOGETHER: {n: scored(last, update) for n, update in given.items()},
        SHARED: dict.fromkeys(clients, scored(last, shared)),
    }
    return {
        "losses": {m: {n: by[n][i] for i, n in enumerate(clients)} for m, by in table.items()},
        "everybody": {m: {n: float(np.mean(by[n])) for n in clients} for m, by in table.items()},
    }


def _on_the_way(workspace: Workspace, server: RoundServer, clients: Mapping[str, Client], out: Path) -> dict[str, Any]:
    """The loss after each arrival, and along the line from no update to the result, on all clients' held-out rows. Only for
    protocols whose result is the same for all."""
    end = server.so_far()
    if end is None:
        return {"arrivals": [], "line": []}
    role = workspace.protocol.roles[-1]

    def mean(update: Update) -> float:
        return float(np.mean([workspace.loss(role, update, c.held) for c in clients.values()]))

    again, arrivals = workspace.protocol.server(workspace.contract, list(clients), None, workspace.lab), []
    for message in Journal(out / "arrived", LIMIT):
        if message.header.kind == again.waits_for:
            again.handle(message)
            now, head = again.so_far(), message.header
            assert now is not None  # something has arrived
            arrivals.append({"round": head.round, "client": head.sender, "loss": mean(now)})
    losses = best_step(lambda step: mean(step * end), STEPS)[1]
    return {"arrivals": arrivals, "line": sorted(losses.items())}
