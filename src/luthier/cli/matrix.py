"""What combines with what: every pair of methods in a small recipe, asked of the checks that `luthier check` and runs ask."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from transformers import BertConfig, LlamaConfig

from luthier.federation.folder import refuse_unread
from luthier.method import registry as manifest
from luthier.method.base import Layout, Need
from luthier.method.building import Lines
from luthier.method.kinds import KINDS, LISTED
from luthier.model.anatomy import Anatomy
from luthier.pipelines.stages import Stage
from luthier.recipe import Recipe
from luthier.recipe.text import build
from luthier.run.ready import refuse_unfit
from luthier.support.errors import LuthierError, RecipeError

ROWS = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
OTHER_TASK = "the two have no task in common"


class Part(NamedTuple):
    """Something that a recipe may have: a method, or a setting.

    own     the keys that ask for it; beside: keys that it needs, which another part may set in another way
    tasks   in which it works; None: in all
    layout, processes  of the run
    """

    kind: str
    name: str
    own: Mapping[str, Any]
    beside: Mapping[str, Any]
    tasks: tuple[str, ...] | None = None
    layout: str | None = None
    processes: int = 1


class Pair(NamedTuple):
    """Two parts, and why no recipe may have both; None: they work together."""

    one: Part
    other: Part
    why: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        parts = [{"kind": p.kind, "name": p.name} for p in (self.one, self.other)]
        return {"of": parts, "works": self.why is None, "why": self.why}


SETTINGS = (
    Part("setting", "quantize: nf4", {"quantize": "nf4"}, {}),
    Part("setting", "two processes", {}, {}, processes=2),
    Part("setting", "padded layout", {}, {}, layout=str(Layout.PADDED)),
    Part("setting", "gradient_checkpointing: true", {"gradient_checkpointing": True}, {}),
    Part("setting", "torch_compile: true", {"torch_compile": True}, {}),
)


def parts(listed: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The listed methods that a recipe may name, kind by kind, and the settings."""
    return [*(_part(m) for kind in KINDS for m in listed if m["kind"] == kind and KINDS[kind].in_recipe), *SETTINGS]


def _part(entry: Mapping[str, Any]) -> Part:
    kind, name, needs = entry["kind"], entry["name"], entry["traits"]["needs"]
    lines = YAML(typ="safe", pure=True).load("\n".join(entry.get("recipe_lines", ()))) or {}
    asked: Any = {name: {n: f["example"] for n, f in entry["fields"].items() if f["required"]}}
    own = {kind: lines.pop(kind, [asked] if kind in LISTED else asked)}
    beside = {k: v for k, v in lines.items() if k != "task"}
    if kind == "evaluate":
        beside["data"] = {"eval": "eval.jsonl"}
    if Need.CLOSURE in needs or name == "seed-rounds":
        beside |= {"lr_scheduler_type": "constant", "warmup_fraction": 0.0}
    if name == "seed-rounds":
        beside["tuner"] = "fedkseed"
    if Need.POOL in needs:
        beside |= {"data": {"eval": "eval.jsonl", "pool": "pool.jsonl"}, "task": _pool_task(entry["traits"]["tasks"])}
    return Part(kind, name, own, beside, tuple(entry["traits"]["tasks"]))


def _pool_task(names: Collection[str]) -> Any:
    """The task with which a recipe labels a pool, as the first of these tasks that can writes it on pages of methods."""
    starters = (m["starter"] for m in manifest.read() if m["kind"] == "task" and m["name"] in names)
    return YAML(typ="safe", pure=True).load(next(s["pool_task"] for s in starters if "pool_task" in s))


def matrix(listed: Sequence[Mapping[str, Any]], asked: Collection[tuple[str, str]] | None = None) -> list[Pair]:
    """All pairs of parts of different kinds.

    listed  the methods, as the registry lists them
    asked   (kind, name) of methods; only the pairs with one of them
    """
    every = parts(listed)
    pairs = [(a, b) for i, a in enumerate(every) for b in every[i + 1 :] if a.kind != b.kind]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        return [Pair(a, b, refusal(folder, a, b)) for a, b in pairs if _asked(asked, a, b)]


def _asked(asked: Collection[tuple[str, str]] | None, *both: Part) -> bool:
    return asked is None or any((p.kind, p.name) in asked for p in both)


def refusal(folder: Path, one: Part, other: Part) -> str | None:
    """What the checks say against a recipe with both, in the first task that both know; None if one task lets them work.

    folder  of the recipe; the files that methods name are made there
    """
    first = None
    for task in _tasks(one, other):
        said = _refusal_in(folder, task, one, other)
        if said is None:
            return None
        first = first or said
    return first or OTHER_TASK


def _tasks(*both: Part) -> list[str]:
    return [t for t in manifest.names("task") if all(p.tasks is None or t in p.tasks for p in both)]


def _kind_for(recipe: Recipe) -> Any:
    """A decoder, or an encoder where the task refuses a decoder."""
    decoder: Any = LlamaConfig
    return BertConfig if recipe.task.check(recipe.facts(model_config=decoder(**SIZES))) else decoder


def _refusal_in(folder: Path, task: str, *both: Part) -> str | None:
    try:
        recipe = recipe_of(folder, task, *both)
        for part in both:
            _refuse_unused(recipe, part)
        kind = _kind_for(recipe)
        config = kind(**SIZES)
        anatomy = _anatomy(recipe.task.auto(config), kind)
        layout = next((p.layout for p in both if p.layout), None)
        refuse_unfit(recipe, config, range(ROWS), layout, max(p.processes for p in both), anatomy)
        if recipe.collaborate is not None:
            refuse_unread(recipe)
    except RecipeError as error:
        names = [p.name for p in both]
        about = f"{error.what}; {error.remedy}" if error.remedy else error.what
        key = error.where.rpartition(" ")[2]
        started = about.startswith(("is ", "needs ", "would "))  # a sentence whose subject is the key
        return f"{key} {about}" if started else _without_names(about, names)
    except LuthierError as error:
        return str(error)
    return None


def _without_names(text: str, names: Sequence[str]) -> str:
    """The reason, with "it" for the method that it begins with: the same reason of several methods is listed once."""
    name = next((n for n in names if text.startswith(f"{n} ")), None)
    return text if name is None else f"it{text.removeprefix(name)}"


def recipe_of(folder: Path, task: str, *both: Part) -> Recipe:
    """The smallest recipe with these parts. Raises RecipeError if it cannot be read."""
    values: dict[str, Any] = {"model": "some/model", "task": task, "data": {"train": "train.jsonl"}}
    ordered = sorted(both, key=lambda one: one.kind != "pipeline")  # stages first: the other part goes into one of them
    for keys in (*(p.beside for p in ordered if "pipeline" in p.beside), *(p.own for p in ordered)):
        if "pipeline" in keys:
            values = {**values, "pipeline": deepcopy(keys["pipeline"])}
            break
    for keys in (*(p.beside for p in ordered), *(p.own for p in ordered)):
        values = _placed(values, {k: v for k, v in keys.items() if k != "pipeline" or k not in values})
    for name in _files(values):
        (folder / name).touch()
    return build(values, Lines("recipe", {}, frozenset()), base=folder)


def _files(values: Mapping[str, Any]) -> list[str]:
    """The files that evaluators name."""
    out = []
    for name, fields in (item for listed in values.get("evaluate", ()) for item in listed.items()):
        method: Any = manifest.find("evaluate", name)
        out += [fields[field] for field in method.paths if field in fields]
    return out


def _placed(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The values with more keys. What a stage can have goes into the last stage, where there are stages."""
    out, new = deepcopy(dict(values)), deepcopy(dict(more))
    if "data" in new:
        new["data"] = {**out["data"], **new["data"]}
    if "stages" in out.get("pipeline", {}):
        last = out["pipeline"]["stages"]["stages"][-1]
        inside = {k: new.pop(k) for k in list(new) if k in Stage.model_fields}
        last |= {k: v for k, v in inside.items() if not _names(last.get(k), v)}
    return {**out, **new}


def _names(there: Any, asked: Any) -> bool:
    """Whether a value that is there names the method that is asked for, perhaps with more fields."""
    name = next(iter(asked)) if isinstance(asked, Mapping) else asked
    return bool(there == name or (isinstance(there, Mapping) and name in there))


def _refuse_unused(recipe: Recipe, chosen: Part) -> None:
    """Raises RecipeError for a method with its default values that a pipeline does not use: it has its own instead."""
    if recipe.pipeline is None or chosen.kind not in ("tuner", "objective", "compute"):
        return
    stages = getattr(recipe.pipeline, "stages", ())
    used = [getattr(stage, kind) for stage in stages for kind in ("tuner", "objective")]
    if all(method.key() != chosen.name for method in used):
        raise RecipeError(chosen.kind, f"is not read beside pipeline {recipe.pipeline.key()}", "remove it")


@cache
def _anatomy(auto: Any, config: Any) -> Anatomy:
    with torch.device("meta"):
        return Anatomy(auto.from_config(config(**SIZES)))


# --- as text ---


def grouped(pairs: Iterable[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """The pairs by their two kinds."""
    out: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        out.setdefault((pair.one.kind, pair.other.kind), []).append(pair)
    return out


def table(pairs: Sequence[Pair]) -> tuple[list[list[str]], list[str]]:
    """(lines of cells, the first one names the columns; the reasons that cells count)."""
    reasons = list(dict.fromkeys(p.why for p in pairs if p.why not in (None, OTHER_TASK)))
    lines = [["", *dict.fromkeys(p.other.name for p in pairs)]]
    for name in dict.fromkeys(p.one.name for p in pairs):
        lines.append([name, *(_cell(p.why, reasons) for p in pairs if p.one.name == name)])
    return lines, [str(r) for r in reasons]


def _cell(why: str | None, reasons: Sequence[str | None]) -> str:
    return "✓" if why is None else "–" if why == OTHER_TASK else str(reasons.index(why) + 1)


def show(pairs: Sequence[Pair]) -> None:
    """Print the tables."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for (kind, other), found in grouped(pairs).items():
        lines, reasons = table(found)
        shown = Table(box=None, pad_edge=False, header_style="bold", title=f"{kind} and {other}", title_justify="left")
        for column in lines[0]:
            shown.add_column(column, overflow="fold")
        for line in lines[1:]:
            shown.add_row(*line)
        console.print(shown)
        for i, why in enumerate(reasons, 1):
            console.print(f"  {i}: {why}", markup=False)
        console.print()


def page() -> str:
    """The page of the docs."""
    out = [
        "# What combines with what", "",
        "`luthier methods --matrix` prints these tables, also with the methods of installed packages; `luthier methods NAME",
        "--matrix` prints those of one method, and `--json` gives values. The tables are computed: each cell is the answer of",
        f"`luthier check` and `luthier run` to a recipe with both, a small model and {ROWS} rows, before weights are loaded.",
        "A real model and real rows can add reasons; `luthier check` says them.", "",
        '✓: they work together. –: they have no task in common. A number: the reason below the table, where "it" is the',
        "method.", "",
    ]  # fmt: skip
    for (kind, other), found in grouped(matrix(manifest.read())).items():
        lines, reasons = table(found)
        out += [f"## {kind} and {other}", ""]
        if all(p.why is None for p in found):
            out += [f"All {len(found)} pairs work together.", ""]
            continue
        out += [f"| {' | '.join(lines[0])} |", "|---" * len(lines[0]) + "|"]
        out += [f"| {' | '.join(line)} |" for line in lines[1:]] + [""]
        out += [*(f"{i}. {why[:1].upper()}{why[1:]}." for i, why in enumerate(reasons, 1)), *([""] if reasons else [])]
    return "\n".join(out).rstrip() + "\n"
