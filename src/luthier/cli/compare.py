"""`luthier compare`: the comparison from the command line, and its table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.comparison.execute import Bench
from luthier.comparison.judge import Standing
from luthier.comparison.page import lead, shown
from luthier.comparison.plan import Comparison, Search, checked, load, moved, varied
from luthier.recipe.text import apply_overrides, parse, read_text
from luthier.support.errors import LuthierError, RecipeError


def planned(words: Sequence[str], vary: Sequence[str], options: dict[str, Any]) -> tuple[Comparison, Path, str]:
    """(what to compare, the folder paths are relative to, its name). Raises RecipeError."""
    files = [w for w in words if "=" not in w and not w.startswith("~")]
    overrides = [w for w in words if w not in files]
    if not files:
        raise RecipeError("command line", "names no recipe", "write luthier compare recipe.yaml --vary key=value,value")
    paths = [Path(f) for f in files]
    trees = [parse(read_text(p), str(p))[0] for p in paths]
    options = {k: v for k, v in options.items() if v is not None}
    if "arms" in trees[0]:
        if len(files) > 1 or vary:
            raise RecipeError(files[0], "names its own arms", "leave out --vary and other files")
        plan, base = load(paths[0])
        values = plan.model_dump(mode="json", exclude_unset=True)
        apply_overrides(values, overrides)
        return checked({**values, **options}, files[0]), base, paths[0].stem
    if len(trees) == 1:
        apply_overrides(trees[0], overrides)
        if not vary:
            raise RecipeError(
                files[0], "is one recipe, with nothing to compare", "add --vary key=value,value or a second recipe"
            )
        return varied(trees[0], vary, **options), paths[0].parent, paths[0].stem
    if vary:
        raise RecipeError("command line", "--vary works with one recipe", "leave it out, or name one recipe")
    arms = {}
    for path, tree in zip(paths, trees, strict=True):
        arms[path.stem] = moved(tree, path.parent.resolve())
        apply_overrides(arms[path.stem], overrides)
    return checked({"recipe": {}, "arms": arms, **options}, "command line"), Path(), "-".join(arms)


def budget_from(text: str | None) -> dict[str, float] | None:
    """Parse "flops=1e13"."""
    if text is None:
        return None
    unit, _, amount = text.partition("=")
    try:
        return {unit: float(amount)}
    except ValueError as error:
        raise LuthierError(f"--budget {text!r}: write flops=1e13, tokens=100000, seconds=60 or bytes=1e6") from error


def searching(planned: Search | None, wanted: bool, rows: int | None) -> Search | None:
    """The search for learning rates, after the options --search and --search-rows."""
    if rows is None:
        return planned if wanted else None
    if not wanted or planned is None:
        raise LuthierError(f"--search-rows {rows}: is not read without a search; leave out one of the two")
    if planned.data is not None:
        raise LuthierError(f"--search-rows {rows}: is not read beside search.data; leave out one of the two")
    return planned.model_copy(update={"rows": rows})


def seeds_from(text: str | None) -> list[int] | None:
    """Parse seeds: "5" means 0 to 4; "1,4,7" means these."""
    if text is None:
        return None
    try:
        return [int(x) for x in text.split(",") if x] if "," in text else list(range(int(text)))
    except ValueError as error:
        raise LuthierError(f"--seeds {text!r}: write how many, or 0,1,2") from error


def nothing_compared(plan: Comparison, standings: Sequence[Standing]) -> bool:
    """Whether the baseline, or every other arm, has no finished run."""
    failed = {s.arm for s in standings if not s.seeds}
    return plan.base_arm in failed or len(failed) >= len(plan.arms) - 1 > 0


def show(bench: Bench, standings: Sequence[Standing]) -> None:
    """Print the standings as a table, and the result in words."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    primary = bench.plan.primary
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", primary.replace("_", " "), "better by", "verdict", "rate", "work", "time", "memory"):
        table.add_column(column, overflow="fold")
    for s in standings:
        a = shown(s, primary)
        table.add_row(
            a["name"], a["value"], a["better_by"], a["verdict"], a["rate"], a["flops"], a["seconds"], a["peak"]
        )
    console.print(table)
    for line in lead(bench, standings):
        console.print(line, markup=False)
    for s in standings:
        for error in s.errors:
            console.print(f"failed: {s.arm} {error}", markup=False)
