"""`luthier curate`: only the choice of rows, with a reason for every one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.curation.base import Base
from luthier.data.reading import Tick, no_tick
from luthier.recipe import Recipe
from luthier.report.page import write_curation
from luthier.run.ready import tokens_and_config, untouched
from luthier.run.rows import decisions, kept_by, training_rows
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import whole


def curate(recipe: Recipe, base: Path, output: Path, tick: Tick = no_tick) -> dict[str, Any]:
    """Carry out the recipe's `curate` steps into a new folder; returns what each step left.

    kept.jsonl       the rows that stayed, as they came
    decisions.jsonl  one line a row and step: step, key, score, decision, reason
    report.html      counts, reasons, and the plane where a step decides on one
    Raises RecipeError for a recipe without steps, LuthierError where the folder is there already.
    """
    if not recipe.curate:
        raise RecipeError("curate", "names no step", "write curate: [scdp: {keep_fraction: 0.5}]")
    if output.exists():
        raise LuthierError(f"{output}: is there already; name a new folder")
    located, renderer, config = tokens_and_config(recipe, base)
    rows, skipped, _ = training_rows(recipe.data, base, recipe.task.shapes, tick)
    model = Base(untouched(recipe, located, renderer, config), renderer, 2 * recipe.tokens_per_forward, tick)
    told, left = [], rows
    with whole(output) as folder:
        with (folder / "decisions.jsonl").open("w", encoding="utf-8") as file:
            for step, seen, chosen in decisions(recipe, rows, model):
                inside = set(chosen.keep.tolist())
                for i, row in enumerate(seen):
                    decision = "kept" if i in inside else "left out"
                    line = {
                        "step": step, "key": row.key, "score": float(chosen.score[i]), "decision": decision,
                        "reason": chosen.reason[i],
                    }  # fmt: skip
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                told.append(kept_by(step, len(seen), chosen))
                left = seen.take(chosen.keep)
        with (folder / "kept.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(r.values, ensure_ascii=False, default=str) + "\n" for r in left)
        (folder / "curation.json").write_text(json.dumps([k._asdict() for k in told]), encoding="utf-8")
        write_curation(folder, output.name, recipe, len(rows), len(left))
    steps = [{"step": k.step, "rows": k.rows, "of": k.of, "reasons": k.reasons} for k in told]
    return {"folder": str(output), "rows": len(left), "of": len(rows), "skipped": skipped, "steps": steps}
