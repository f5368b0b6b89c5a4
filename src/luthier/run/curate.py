"""`luthier curate`: choose and change rows without training, and give a reason for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.reading import Tick, no_tick
from luthier.data.table import Table
from luthier.recipe import Recipe
from luthier.report.page import write_curation
from luthier.run.ready import tokens_and_config, untouched
from luthier.run.rows import CurateStep, as_lines, curation_lab, kept_by, steps, training_rows
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import whole


def curate(recipe: Recipe, base: Path, output: Path, tick: Tick = no_tick) -> dict[str, Any]:
    """Carry out the recipe's `curate` steps in a new folder. Returns a summary of each step.

    kept.jsonl       the rows of the curated set, in the form that the steps gave them; with "weight" if steps weighed them
    table.parquet    every original or new row: step, decision, score, reason, parent, weight, values
    decisions.jsonl  one line for each row that a step decided about, in the order of the rows; no line for rows that it left
    report.html      counts, reasons, rows before and after a change, and a picture if a step decides in a plane
    Raises RecipeError for a recipe without steps, LuthierError if the folder exists.
    """
    if not recipe.curate:
        raise RecipeError("curate", "has no steps", "write curate: [scdp: {keep_fraction: 0.5}]")
    if output.exists():
        raise LuthierError(f"{output}: is there already; name a new folder")
    located, renderer, config = tokens_and_config(recipe, base)
    rows, skipped, _ = training_rows(recipe.data, base, recipe.task.shapes, tick)
    lab = curation_lab(recipe, renderer, untouched(recipe, located, renderer, config), tick)
    told, table = [], Table.of(rows)
    with whole(output) as folder:
        with (folder / "decisions.jsonl").open("w", encoding="utf-8") as file:
            for step in steps(recipe, table, lab):
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(step))
                told.append(kept_by(step))
                table = step.after
        with (folder / "kept.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(as_lines(table.weighed, recipe.data.carried))
        table.write(folder / "table.parquet")
        (folder / "curation.json").write_text(json.dumps([k._asdict() for k in told]), encoding="utf-8")
        write_curation(folder, output.name, recipe, table)
    return {
        "folder": str(output), "rows": len(table), "of": len(rows), "skipped": skipped, "steps": [k.brief for k in told],
    }  # fmt: skip


def _lines(step: CurateStep) -> Iterator[dict[str, Any]]:
    """Yield what a step decided about rows, in their order. Rows that it made follow the row that they were made from."""
    after = step.after
    for number in in_family_order(after, step.before.live, len(step.before.entries)):
        if after.turn[number] == len(after.steps):
            line = after.line(number)
            yield {k: line[k] for k in ("step", "key", "score", "decision", "reason")}


def in_family_order(table: Table, seen: np.ndarray, first: int) -> Iterator[int]:
    """Yield the numbers of a step's entries: each entry that it saw, followed by the entries that it made from that one, and
    at the end those that were made from none.

    seen   numbers of the entries that the step saw
    first  the number of the first entry that it made
    """
    children: dict[int, list[int]] = {}
    for number in range(first, len(table.entries)):
        children.setdefault(int(table.parent[number]), []).append(number)
    waiting = [*reversed(children.get(-1, [])), *reversed(seen.tolist())]
    while waiting:
        number = waiting.pop()
        yield number
        waiting += reversed(children.get(number, []))
