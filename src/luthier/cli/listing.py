"""Tables of methods, and a method's page in the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.method import Facts
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS, LISTED
from luthier.recipe.schema import FILE


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
    editors = [] if KINDS[entry["kind"]].command else [editor_line()]
    console.print("\n".join(["", *editors, starter(entry)]), markup=False, soft_wrap=True)


def table_of_measures(measures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print measures with their 95% intervals, beside the base model's."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    with_base = any(m["base"] is not None for m in measures.values())
    for column in (
        "measure",
        *(("base",) if with_base else ()),
        "tuned",
        "95%",
        *(("change",) if with_base else ()),
        "over",
    ):
        table.add_column(column, overflow="fold")
    for name, m in measures.items():
        change = m["change"]
        by = "" if change is None else f"{change['value']:+.4g} ({change['low']:+.3g} to {change['high']:+.3g})"
        ends = "" if m["low"] is None else f"{m['low']:.4g} to {m['high']:.4g}"
        base = "" if m["base"] is None else f"{m['base']:.4f}"
        row = [name, *((base,) if with_base else ()), f"{m['value']:.4f}", ends, *((by,) if with_base else ())]
        table.add_row(*row, f"{m['rows']:,} rows, {m['unit']}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table)


def starter(entry: dict[str, Any]) -> str:
    """A runnable recipe with this method, or the command that takes it."""
    if KINDS[entry["kind"]].command is not None:
        return command_line(entry)
    tasks, usual = entry["traits"]["tasks"], Facts().task
    task = usual if usual in tasks else tasks[0]
    first = {m["name"]: m["starter"] for m in manifest.read() if m["kind"] == "task"}[task]
    if entry.get("recipe_lines"):
        return "\n".join(["luthier: 1", f"model: {first['model']}", *entry["recipe_lines"]])
    is_task = entry["kind"] == "task"
    if "pool" in entry["traits"]["needs"]:
        first = {**first, "task": first["pool_task"], "data": first["pool_data"]}
    if entry["kind"] in ("collaborate", "translate"):  # parties hold no rows out
        first = {**first, "data": re.sub(r", eval: [^,}]+", "", first["data"])}
    asked = [] if usual in tasks and not is_task else [f"task: {first['task']}"]
    lines = ["luthier: 1", f"model: {first['model']}", *asked, f"data: {first['data']}"]
    return "\n".join(lines if is_task else [*lines, *_method_lines(entry)])


def _method_lines(entry: dict[str, Any]) -> list[str]:
    """The lines of a recipe that name a method, and those that it needs beside."""
    required = ", ".join(f"{n}: {json.dumps(x)}" for n, x in examples_of(entry).items())
    method = f"{{{entry['name']}: {{{required}}}}}" if required else entry["name"]
    if entry["kind"] == "translate":
        return [f"collaborate: {{grad-transformer: {{translator: {method}}}}}"]
    lines = [f"{entry['kind']}: [{method}]" if entry["kind"] in LISTED else f"{entry['kind']}: {method}"]
    if "closure" in entry["traits"]["needs"]:
        lines += ["lr_scheduler_type: constant", "warmup_fraction: 0.0"]
    return lines


def editor_line() -> str:
    """The first line of a recipe, which tells editors (the YAML language server) where the schema is."""
    return f"# yaml-language-server: $schema={FILE}"


def command_line(entry: dict[str, Any]) -> str:
    """The command that uses a method without a key in recipes."""
    kind = KINDS[entry["kind"]]
    fields = [f"--set {n}={json.dumps(x)}" for n, x in examples_of(entry).items()]
    return " ".join([f"{kind.command} {kind.takes} --method {entry['name']}", *fields])


def examples_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A value for each required field: its own example."""
    return {n: f["example"] for n, f in entry["fields"].items() if f["required"]}


def flowing(text: str) -> str:
    """Join each paragraph into one line, for the terminal to wrap. Lines that start with a word and a colon stay separate."""
    out: list[str] = []
    for line in text.splitlines():
        fresh = not line.strip() or not out or not out[-1].strip() or re.match(r"[A-Z][a-z]+: |\s|[-*|]", line)
        out = [*out, line] if fresh else [*out[:-1], f"{out[-1]} {line}"]
    return "\n".join(out)
