"""The server's work with files: refuse bad messages, average or translate the others, and write an update for each sender."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier.collaboration.grad_transformer import Provider
from luthier.collaboration.messages import Message, decode, refuse_name
from luthier.collaboration.parties import Tick
from luthier.collaboration.rounds import RoundServer
from luthier.federation.folder import LIMIT, Workspace
from luthier.federation.outcome import write_outcome
from luthier.federation.translation_page import write_translation
from luthier.support.errors import LuthierError
from luthier.support.files import whole, write_text
from luthier.support.progress import Say

SO_FAR = "so-far"


class Arrivals(NamedTuple):
    """results   sender -> folder of its result
    refused   file -> the reason
    report    of the server, by sender
    """

    results: dict[str, Path]
    refused: dict[str, str]
    report: Any


def one_round(workspace: Workspace, files: Sequence[Path], out: Path, say: Say = lambda _: None) -> Arrivals:
    """Carry out one round from files. A message that cannot be used is refused, and the others count.

    Raises LuthierError if no message can be used, or if the protocol needs several rounds.
    """
    refuse_rounds(workspace)
    refused: dict[str, str] = {}
    messages: dict[Path, Message] = {}
    for file in files:
        try:
            message = decode(file.read_bytes(), LIMIT)
            refuse_name(message.header.sender)
            messages[file] = message
        except LuthierError as error:
            refused[str(file)] = str(error)
    names = sorted({m.header.sender for m in messages.values()})
    if not names:
        raise LuthierError(_none(refused))
    server = workspace.protocol.server(workspace.contract, names, None, workspace.lab)
    results = []
    for file, message in messages.items():
        for sent in server.handle(message):
            if sent.message.header.kind == "refusal":
                refused[str(file)] = str(sent.message.header.notes["says"])
            else:
                results.append(sent)
    results = results or server.handle(Tick())
    if not results:
        raise LuthierError(_none(refused))
    for name, why in refused.items():
        say(f"refused {name}: {why}")
    return Arrivals(write_results(workspace, server, out, refused), refused, server.report)


def refuse_rounds(workspace: Workspace) -> None:
    """Raises LuthierError if the protocol needs several rounds. Files carry one round only."""
    if workspace.protocol.turns != 1:
        raise LuthierError(f"{workspace.protocol.key()} asks for several rounds; run it over a network (serve, join)")


def write_results(
    workspace: Workspace, server: RoundServer, out: Path, refused: Mapping[str, str] | None = None
) -> dict[str, Path]:
    """Write a finished server's results, by sender, and the report."""
    folders, role = {}, workspace.protocol.roles[-1]
    for name in (s.to for s in server.results()):
        folders[name] = write_outcome(workspace, role, server.outcome(name), out / name, name)
    cosine = server.cosine if isinstance(server, Provider) else None
    found = {"report": server.report, "cosine": cosine, "refused": refused or {}}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(found, indent=1, default=str))
    write_translation(out / "report.html", workspace, found, _judged(workspace))
    return folders


def write_so_far(workspace: Workspace, server: RoundServer, out: Path) -> None:
    """Write SO-FAR in the results' folder: what all would get if no other client came, if the protocol can say that."""
    update = server.so_far()
    if update is None:
        return
    shutil.rmtree(out / SO_FAR, ignore_errors=True)
    with whole(out / SO_FAR) as temporary:
        write_outcome(workspace, workspace.protocol.roles[-1], update, temporary, SO_FAR)


def _none(refused: dict[str, str]) -> str:
    first = next(iter(refused.items()), ("", "there is no message"))
    return f"{first[0]}: {first[1]}; no message could be used"


def _judged(workspace: Workspace) -> dict[str, Any] | None:
    file = workspace.path / "judged.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found
