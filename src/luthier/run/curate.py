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
from luthier.run.rows import Step, as_lines, curation_lab, kept_by, steps, training_rows
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import whole


def curate(recipe: Recipe, base: Path, output: Path, tick: Tick = no_tick) -> dict[str, Any]:
    """Carry out the recipe's `curate` steps in a new folder. Returns a summary of each step.

    kept.jsonl       the rows of the curated set, in the form that the steps gave them; with "weight" if steps weighed them
    table.parquet    every original or new row: step, decision, score, reason, parent, weight, values
    decisions.jsonl  one line for each row and step: what the step decided
    report.html      counts, reasons, and a picture if a step decides in a plane
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
        write_curation(folder, output.name, recipe, len(rows), len(table))
    short = [{"step": k.step, "rows": k.rows, "of": k.of, "reasons": k.reasons} for k in told]
    return {"folder": str(output), "rows": len(table), "of": len(rows), "skipped": skipped, "steps": short}


def _lines(step: Step) -> Iterator[dict[str, Any]]:
    """Yield what a step decided about each row that it saw, and about each row that it made."""
    made = np.arange(len(step.before.entries), len(step.after.entries))
    for number in (*step.before.live.tolist(), *made.tolist()):
        line = step.after.line(number)
        yield {"step": step.name, **{k: line[k] for k in ("key", "score", "decision", "reason")}}
