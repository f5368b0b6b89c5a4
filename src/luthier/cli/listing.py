"""Tables of methods, and a method's page in the terminal."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.method import Facts
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS, LISTED


def table_of_methods(entries: list[dict[str, Any]]) -> None:
    """Print all methods, one line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "name", "what it does", "source"):
        table.add_column(column, overflow="fold")
    for e in entries:
        source = e["source"]
        key = KINDS[e["kind"]].command or e["kind"]
        table.add_row(key, e["name"], e["summary"], f"{source['year']}, {source['reference']}" if source else "")
    Console(highlight=False).print(table)


def one_method(entry: dict[str, Any]) -> None:
    """Print a method's page: its text, its fields with defaults, and a recipe to start from."""
    console = Console(highlight=False)
    console.print(f"{entry['kind']}: {entry['name']}\n", style="bold", markup=False)
    console.print(flowing(entry["doc"]) + "\n", markup=False)
    if entry["source"]:
        s = entry["source"]
        console.print(f"Source: {s['title']} ({s['year']}), {s['reference']}\n", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for name, f in entry["fields"].items():
        table.add_row(name, str(f["default"]), f["about"])
    console.print(table)
    console.print("\n" + starter(entry), markup=False)


def starter(entry: dict[str, Any]) -> str:
    """A runnable recipe with this method, or the command that takes it."""
    if KINDS[entry["kind"]].command is not None:
        return command_line(entry)
    tasks, usual = entry["traits"]["tasks"], Facts().task
    task = usual if usual in tasks else tasks[0]
    first = {m["name"]: m["starter"] for m in manifest.read() if m["kind"] == "task"}[task]
    is_task = entry["kind"] == "task"
    if "pool" in entry["traits"]["needs"]:
        first = {**first, "task": first["pool_task"], "data": first["pool_data"]}
    asked = [] if usual in tasks and not is_task else [f"task: {first['task']}"]
    lines = ["luthier: 1", f"model: {first['model']}", *asked, f"data: {first['data']}"]
    if is_task:
        return "\n".join(lines)
    required = ", ".join(f"{n}: {json.dumps(x)}" for n, x in examples_of(entry).items())
    method = f"{{{entry['name']}: {{{required}}}}}" if required else entry["name"]
    if entry["kind"] == "translate":
        return "\n".join([*lines, f"collaborate: {{grad-transformer: {{translator: {method}}}}}"])
    if entry["name"] == "seed-rounds":
        lines.append("tuner: fedkseed")
    lines.append(f"{entry['kind']}: [{method}]" if entry["kind"] in LISTED else f"{entry['kind']}: {method}")
    if "closure" in entry["traits"]["needs"] or entry["name"] == "seed-rounds":
        lines += ["lr_scheduler_type: constant", "warmup_fraction: 0.0"]
    return "\n".join(lines)


def command_line(entry: dict[str, Any]) -> str:
    """The command that uses a method without a key in recipes."""
    kind = KINDS[entry["kind"]]
    fields = [f"--set {n}={json.dumps(x)}" for n, x in examples_of(entry).items()]
    return " ".join([f"{kind.command} {kind.takes} --method {entry['name']}", *fields])


def examples_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A value for each required field: its own example, or a placeholder to fill in."""
    return {n: f.get("example", "FILL IN") for n, f in entry["fields"].items() if f["required"]}


def flowing(text: str) -> str:
    """Join each paragraph into one line, for the terminal to wrap. Lines that start with a word and a colon stay separate."""
    out: list[str] = []
    for line in text.splitlines():
        fresh = not line.strip() or not out or not out[-1].strip() or re.match(r"[A-Z][a-z]+: |\s|[-*|]", line)
        out = [*out, line] if fresh else [*out[:-1], f"{out[-1]} {line}"]
    return "\n".join(out)
