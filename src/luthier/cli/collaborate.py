"""`luthier collaborate`: one command for each role in a protocol between parties."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.shared import HELP, Debug, Json, Overrides, RecipePath, load, to_json
from luthier.support.environment import quiet
from luthier.support.errors import LuthierError

app = typer.Typer(
    no_args_is_help=True,
    context_settings=HELP,
    help="Tune together without sharing rows. Each role in a protocol has a command.",
)

Folder = Annotated[Path, typer.Argument(help="The collaboration's folder.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="small=PATH: where a model of the contract is on this machine.")
]


Held = Annotated[str | None, typer.Option(help="Rows of the same kind that are not tuned on, for the audit.")]
Canaries = Annotated[int, typer.Option(min=0, help="Made-up records tuned on beside yours, for the audit.")]
Others = Annotated[int, typer.Option(min=1, help="Made-up secrets that each of them is ranked among.")]
SendAnyway = Annotated[bool, typer.Option("--send-anyway", help="Send the message although its audit failed.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _workspace(folder: Path, models: list[str] | None = None) -> Any:
    from luthier.federation.folder import Workspace

    return Workspace(folder, _named(models or [], "--model", "small=./tiny"))


def _named(items: list[str], what: str, instance: str) -> dict[str, str]:
    """Split name=path words. Raises LuthierError for other words, or a name that is given twice."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals:
            raise LuthierError(f"{what} {item!r}: write name=path, for example {instance}")
        if name in named:
            raise LuthierError(f"{what} {item!r}: {name} is given twice")
        named[name] = path
    return named


def _table(found: dict[str, Any]) -> None:
    """Print the results of a simulation as a table."""
    from luthier.federation.simulation_page import lead, mean

    names = list(found["losses"]["alone"])
    print(f"{'':10}" + "".join(f"{n[:12]:>14}" for n in names) + f"{'mean':>14}")
    for model, by in found["losses"].items():
        print(f"{model:10}" + "".join(f"{x:14.4f}" for x in by.values()) + f"{mean(by):14.4f}")
    print(lead(found))


@app.command()
def contract(
    recipe: RecipePath, folder: Annotated[Path, typer.Argument(help="A new folder.")], overrides: Overrides = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write the contract: models, tuner, settings and starts, with hashes. Send contract.json of the folder to every party."""
    from luthier.federation.folder import Workspace

    quiet(debug)
    workspace = Workspace.create(load(recipe, overrides), recipe.parent, folder)
    _say(
        f"contract {workspace.contract.digest[:12]}: {workspace.protocol.key()} over {', '.join(workspace.models.values())}"
    )
    target = folder / "contract.json"
    found = {"contract": str(target), "digest": workspace.contract.digest, "models": workspace.models}
    print(to_json(found) if as_json else target)


@app.command()
def shadow(
    folder: Folder, processes: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core.")] = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Provider: tune both models on shadow sets of public rows. After a stop, the same command continues."""
    from luthier.federation.provider import make_shadows

    quiet(debug)
    make_shadows(_workspace(folder), processes, _say)
    target = folder / "shadows"
    print(to_json({"shadows": str(target), "sets": len(list(target.iterdir()))}) if as_json else target)


@app.command()
def translator(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Provider: is a translated update better than updates that need no client? It is judged on held-out shadow sets."""
    from luthier.federation.provider import judge, open_provider

    quiet(debug)
    found = judge(open_provider(_workspace(folder)), _say)
    if as_json:
        print(to_json(found))
        return
    for name, f in found["judged"].items():
        print(f"{name:30} loss {f['loss']:.4f}   {f['share']:7.1%} of the true gain")
    print(found["verdict"])


@app.command()
def tune(
    folder: Folder, data: Annotated[str, typer.Argument(help="Your rows; they stay here.")],
    name: Annotated[str, typer.Option(help="Your name in the contract's messages.")],
    held: Held = None, output: Annotated[Path, typer.Option(help="Where the message is written.")] = Path(),
    canaries: Canaries = 100, others: Others = 100, models: Models = None, send_anyway: SendAnyway = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Client: tune on your rows, audit the message, and write NAME.message. This command sends nothing."""
    from luthier.collaboration.messages import refuse_name
    from luthier.federation.client import AuditSettings, prepared, send
    from luthier.federation.server import refuse_rounds

    quiet(debug)
    refuse_name(name)
    workspace = _workspace(folder, models)
    refuse_rounds(workspace)
    rows, kept = workspace.rows_in(data), workspace.rows_in(held) if held else []
    audited = prepared(workspace, name, rows, AuditSettings(kept, canaries, others), say=_say)
    for a in audited.answers:
        _say(f"\n{a.question}")
        for line in a.lines:
            _say(f"  {line}")
    target = send(audited, output, send_anyway)
    page = output / f"{name}.html"
    _say(f"\nverdict {audited.verdict.outcome}; the audit's report: {page}")
    found = {"message": str(target), "verdict": audited.verdict.outcome, "report": str(page)}
    print(to_json(found) if as_json else target)


@app.command()
def translate(
    folder: Folder, messages: Annotated[list[Path], typer.Argument(help="What clients sent.")],
    output: Annotated[Path, typer.Option(help="A folder for results.")] = Path("results"), models: Models = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Server: read messages, and write an update for each sender: translated, or averaged (one-shot)."""
    from luthier.federation.server import one_round

    quiet(debug)
    found = one_round(_workspace(folder, models), messages, output, _say)
    if as_json:
        results = {name: str(where) for name, where in found.results.items()}
        print(to_json({"results": results, "report": str(output / "report.html")}))
        return
    for name, where in found.results.items():
        print(f"{name}: {where}")
    print(output / "report.html")


Certificates = Annotated[
    Path | None, typer.Option(help="A folder with ca.pem; for the server server.pem and server.key.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow connections to other machines that others can read.")]


@app.command()
def serve(
    folder: Folder, clients: Annotated[str, typer.Option(help="Names that may take part: clinic,library.")],
    listen: Annotated[str, typer.Option("--address", help="host:port to listen at.")] = "127.0.0.1:9092",
    patience: Annotated[float, typer.Option(help="Seconds that a round waits for answers; then it closes.")] = 3600.0,
    output: Annotated[Path, typer.Option(help="A folder for results.")] = Path("results"), models: Models = None,
    certificates: Certificates = None, insecure: Insecure = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Server, over flwr: wait for clients and carry out the rounds. After a kill, the same command continues."""
    from luthier.collaboration.messages import refuse_name
    from luthier.federation.network import address
    from luthier.federation.network import serve as served

    quiet(debug)
    workspace = _workspace(folder, models)
    for name in clients.split(","):
        refuse_name(name)
    served(folder, clients.split(","), address(listen, certificates, insecure), patience, output, _say, workspace.given)
    page = output / "report.html"
    print(to_json({"report": str(page)}) if as_json else page)


@app.command()
def join(
    folder: Folder, data: Annotated[str, typer.Argument(help="Your rows; they stay here.")],
    name: Annotated[str, typer.Option(help="Your name, one of the server's --clients.")],
    server: Annotated[str, typer.Option("--address", help="host:port of the server.")] = "127.0.0.1:9092",
    held: Held = None, canaries: Canaries = 100, others: Others = 100, models: Models = None,
    send_anyway: SendAnyway = False, certificates: Certificates = None, insecure: Insecure = False, as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Client, over flwr: tune when asked, audit the message and send it, until the server gives a result."""
    from luthier.collaboration.messages import refuse_name
    from luthier.federation.network import Client, address
    from luthier.federation.network import join as joined

    quiet(debug)
    refuse_name(name)
    workspace = _workspace(folder, models)
    for file in (data, held):
        if file is not None:
            workspace.rows(file, Path())
    client = Client(name, data, held, canaries, others, send_anyway, workspace.given)
    result = joined(folder, client, address(server, certificates, insecure), _say)
    print(to_json({"result": str(result)}) if as_json else result)


@app.command()
def split(
    data: Annotated[str, typer.Argument(help="Rows: a file, a folder, a Hub id.")],
    output: Annotated[Path, typer.Argument(help="A new folder, for client-1.jsonl and so on.")],
    clients: Annotated[int, typer.Option(min=2, help="How many.")] = 4,
    alpha: Annotated[float, typer.Option(help="Concentration: small for clients that differ, large for equal ones.")] = 0.5,
    by: Annotated[str | None, typer.Option(help="The field that clients differ in; without it, in size only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another split.")] = 0,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Divide rows among made-up clients by a Dirichlet distribution, to simulate a protocol with unlike clients."""
    from luthier.federation.splitting import split_rows

    quiet(debug)
    found = split_rows(data, output, clients, alpha, by, seed)
    if as_json:
        print(to_json(found))
        return
    kinds = list(dict.fromkeys(kind for counts in found["clients"].values() for kind in counts))
    print(f"{'rows':14}" + "".join(f"{kind[:12]:>14}" for kind in kinds))
    for name, counts in found["clients"].items():
        print(f"{name:14}" + "".join(f"{counts.get(kind, 0):14,}" for kind in kinds))
    print(f"luthier collaborate simulate CONTRACT {' '.join(f'{n}={f}' for n, f in found['files'].items())}")


@app.command()
def simulate(
    folder: Folder, clients: Annotated[list[str], typer.Argument(help="name=rows of each: clinic=clinic.jsonl")],
    held: Annotated[float, typer.Option(min=0, max=1, help="Share of each client's rows that is held out for scoring.")] = 0.2,
    output: Annotated[Path, typer.Option(help="A folder; finished work in it is not done again.")] = Path("simulated"),
    models: Models = None, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Simulate all parties in one process: each client alone, together, and with all rows shared."""
    from luthier.collaboration.messages import refuse_name
    from luthier.federation.simulation import simulate as simulated

    quiet(debug)
    files = _named(clients, "rows", "clinic=clinic.jsonl")
    for name in files:
        refuse_name(name)
    page = simulated(_workspace(folder, models), files, held, output, _say)
    found = json.loads((output / "found.json").read_text(encoding="utf-8"))
    if as_json:
        print(to_json({**found, "page": str(page)}))
    else:
        _table(found)
        print(page)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A folder; finished work in it is not done again.")] = Path("runs/private"),
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core.")] = None,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Three organisations and a provider, all made by the command: from separate rows to one report, in a quarter of an hour."""
    from luthier.demos.private import USUAL
    from luthier.demos.private import demo as carried_out

    quiet(debug)
    page = carried_out(output, USUAL, _say, processes)
    print(to_json({"report": str(page)}) if as_json else page)
