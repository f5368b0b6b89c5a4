"""`luthier check`: is the recipe consistent, and is the data what you expect?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.data.reading import Tick, no_tick, on_hub
from luthier.federation.folder import refuse_unread
from luthier.model.loading import NEW_POOLER_TOLD, lacks_pooler
from luthier.recipe import Recipe
from luthier.report.token_view import SHOWN, tokens_of
from luthier.run.evaluations import BUILTIN
from luthier.run.folder import choose_folder
from luthier.run.forecast import Forecast, NoForecast, refuse_full_disk
from luthier.run.ready import admit
from luthier.run.rows import told, told_about
from luthier.support.units import in_bytes, in_time

NAMED = 20  # classes that are listed


def check_recipe(recipe: Recipe, base: Path, tick: Tick = no_tick, measure: bool = True) -> dict[str, Any]:
    """Everything that can be said before weights are loaded. Raises RecipeError for what would stop the run.

    measure  forecast memory and time with a small copy of the model
    """
    if recipe.collaborate is not None:
        refuse_unread(recipe)
    folder = choose_folder(recipe, "run", False, base)
    decided, gathered, anatomy, expected = admit(recipe, base, tick, measure=measure)
    renderer, config, data = gathered.renderer, gathered.config, gathered.data
    train, held = data.train, data.held
    matched, left_out = matched_modules(recipe, anatomy)
    if isinstance(expected, Forecast):
        refuse_full_disk(decided, expected, folder)
    new_pooler = lacks_pooler(gathered.located, config, recipe.task.auto(config), anatomy)
    draw = recipe.task.draw(renderer.tokenizer, recipe.seed)
    shown = [row if draw is None else draw(row, None) for row in train.rows[:SHOWN]]
    return {
        "recipe": recipe.as_dict(),
        "train": asdict(train.census),
        "eval": None if held is None else asdict(held.census),
        "sources": data.train.sources,
        "skipped": data.skipped,
        "forms": data.forms,
        "overlap": data.overlap,
        "pool_shared": data.pool_shared,
        "classes": data.classes,
        "head": data.head or (NEW_POOLER_TOLD if new_pooler else ""),
        "curated": [k.brief for k in data.kept],
        "matched": matched,
        "left_out": left_out,
        "weights": anatomy.num_parameters,
        "experts_left_out": anatomy.stacked_experts if matched else 0,
        "forecast": None if isinstance(expected, NoForecast) else asdict(expected),
        "no_forecast": expected.reason if isinstance(expected, NoForecast) else None,
        "destinations": destinations(recipe, base),
        "rows": [[(t["text"], t["on"]) for t in row] for row in tokens_of(renderer, shown, recipe.task, data.classes)],
        "model_type": config.model_type,
    }


def matched_modules(recipe: Recipe, anatomy: Any) -> tuple[dict[str, int], list[str]]:
    """(linear layers by target pattern, kinds of linear layers that no pattern matches).

    Raises LuthierError for a pattern that matches none.
    """
    patterns = getattr(recipe.tuner, "targets", None)
    if patterns is None or recipe.pipeline is not None:
        return {}, []
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found = {p: anatomy.match(p if p == "all-linear" else [p]) for p in listed}
    names = {x.module for layers in found.values() for x in layers}
    others = {x.module.rpartition(".")[2] for x in anatomy.linears if x.module not in names}
    return {p: len(layers) for p, layers in found.items()}, sorted(others)


def destinations(recipe: Recipe, base: Path) -> list[str]:
    """Every place that this recipe would contact."""
    out = []
    model = recipe.model
    here = model.startswith(BUILTIN) or model.endswith(".gguf") or (base / model).exists() or Path(model).exists()
    if not here:
        out.append(f"model: the Hub, to download {model}")
    if recipe.start is not None and not (base / recipe.start).exists():
        out.append(f"start: the Hub, to download {recipe.start}")
    named = [("train", s.path) for s in recipe.data.sources] + [("eval", recipe.data.eval), ("pool", recipe.data.pool)]
    out += [
        f"data.{key}: the Hub, to download {source}"
        for key, source in named
        if isinstance(source, str) and on_hub(source) and not (base / source).exists()
    ]
    if recipe.collaborate is not None:
        out.append(f"collaborate: the server gets {recipe.collaborate.leaves}")
    out += [f"evaluate.{e.key()}: {place}" for e in recipe.evaluators() for place in e.destinations()]
    return out + [f"report_to: {t}" for t in recipe.report_to if t != "none"]


def show(result: dict[str, Any]) -> None:
    """Print the findings as tables, and three rows with their trained tokens in green."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data")
    table.add_column("train", justify="right")
    table.add_column("eval", justify="right")
    held = result["eval"] or {}
    for key, value in result["train"].items():
        table.add_row(key.replace("_", " "), _text(value), _text(held.get(key, "")))
    console.print(table)
    for lines in (_about_data(result), _about_model(result)):
        for line in lines:
            console.print(line, markup=False)
    console.print("sent: " + ("nothing leaves this machine" if not result["destinations"] else ""), markup=False)
    for line in result["destinations"]:
        console.print(f"  {line}", markup=False)
    for row in result["rows"]:
        text = Text("\n")
        for piece, on in row:
            text.append(piece, style="green" if on else "dim")
        console.print(text)


def _about_data(result: dict[str, Any]) -> list[str]:
    out = told_about(result["forms"], result["overlap"])
    out += [f"source {s['name']}: {s['rows']:,} rows, {s['share']:.1%} of the draws" for s in result["sources"]]
    for step in result["curated"]:
        first, *counts = told(**step)
        out += [f"curate {first}", *counts]
    shared = result["pool_shared"]
    out += [f"pool: {shared:,} rows are left out, because they are also training rows"] if shared else []
    if classes := result["classes"]:
        more = len(classes) - NAMED
        out.append(f"classes: {', '.join(classes[:NAMED])}{f' and {more} more' if more > 0 else ''}")
    out += [f"classification head: {result['head']}"] if result["head"] else []
    return out + [f"skipped {line}" for line in result["skipped"]]


def _about_model(result: dict[str, Any]) -> list[str]:
    out = [f"target {pattern}: {count} layers" for pattern, count in result["matched"].items()]
    if result["left_out"]:
        out.append(f"linear layers left out: {', '.join(result['left_out'])}")
    if experts := result["experts_left_out"]:
        share = experts / result["weights"]
        out.append(
            f"experts left out: {experts:,} weights ({share:.0%}) are stacked in one tensor a block; tuner full trains them"
        )
    f = result["forecast"]
    if f is None:
        return [*out, f"weights: {result['weights']:,}", f"no forecast: {result['no_forecast']}"]
    share = f["trained_weights"] / result["weights"]
    out.append(f"weights: {result['weights']:,}, trained {f['trained_weights']:,} ({share:.2%})")
    parts = ", ".join(f"{n.replace('_', ' ')} {in_bytes(f[n])}" for n in ("weights", "trained_state", "activations"))
    out.append(f"memory: {in_bytes(f['memory_bytes'])} at most ({parts}, the rest libraries and buffers)")
    out.append(f"time: {in_time(f['seconds'])} of training, without evaluation")
    return out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
