"""`luthier check`: does the recipe hold together, and is the data what you think it is?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.data.batch import IGNORE
from luthier.data.rendering import Renderer
from luthier.model.loading import BUILTIN as BUILTIN_MODEL
from luthier.recipe import Recipe


def check_recipe(recipe: Recipe, base: Path) -> dict[str, Any]:
    """Everything that can be said before weights are loaded. Raises RecipeError for what would stop the run."""
    from luthier.run import outline

    renderer, config, data, anatomy = outline(recipe, base)
    train, held = data.train, data.held
    targets = matched_modules(recipe, anatomy)
    return {
        "recipe": recipe.as_dict(),
        "train": _census(train),
        "eval": None if held is None else _census(held),
        "matched": targets,
        "weights": anatomy.num_parameters,
        "destinations": destinations(recipe),
        "rows": [_tokens(renderer, r) for r in train.rows[:3]],
        "model_type": config.model_type,
    }


def _census(prepared: Any) -> dict[str, Any]:
    return asdict(prepared.census)


def matched_modules(recipe: Recipe, anatomy: Any) -> dict[str, int]:
    """Linear layers by target pattern. Raises LuthierError for a pattern that matches none."""
    patterns = getattr(recipe.tuner, "targets", None)
    if patterns is None:
        return {}
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    return {p: len(anatomy.match(p if p == "all-linear" else [p])) for p in listed}


def destinations(recipe: Recipe) -> list[str]:
    """Every place this recipe would contact."""
    out = []
    for what, name in (
        ("model", recipe.model),
        ("data.train", recipe.data.train),
        ("data.eval", recipe.data.eval),
    ):
        local = (
            name is None
            or name == BUILTIN_MODEL
            or name.startswith("builtin:")
            or Path(name).suffix != ""
            or Path(name).exists()
        )
        if not local:
            out.append(f"{what}: the Hub, to download {name}")
    return out + [f"report_to: {t}" for t in recipe.report_to if t != "none"]


def _tokens(renderer: Renderer, row: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(renderer.tokenizer.decode([i]), y != IGNORE) for i, y in zip(row["ids"], row["labels"], strict=True)]


def show(result: dict[str, Any]) -> None:
    """The findings as tables, and three rows with what is trained in green."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data")
    table.add_column("train", justify="right")
    table.add_column("eval", justify="right")
    held = result["eval"] or {}
    for key, value in result["train"].items():
        table.add_row(key.replace("_", " "), _text(value), _text(held.get(key, "")))
    console.print(table)
    for pattern, count in result["matched"].items():
        console.print(f"target {pattern}: {count} layers", markup=False)
    console.print(f"weights: {result['weights']:,}", markup=False)
    console.print("sent: " + ("nothing leaves this machine" if not result["destinations"] else ""), markup=False)
    for line in result["destinations"]:
        console.print(f"  {line}", markup=False)
    for row in result["rows"]:
        text = Text("\n")
        for piece, on in row:
            text.append(piece, style="green" if on else "dim")
        console.print(text)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
