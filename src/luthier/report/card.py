"""The model card for the Hub, made from what the run measured. huggingface_hub writes its front matter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier.data.reading import on_hub
from luthier.recipe import Recipe
from luthier.report.card_rules import LICENCES

BUILTIN = {"builtin:smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
UNSAID = "The licence is the base model's; read it before you share this."


class Base(NamedTuple):
    """The base model as the Hub knows it, or by the name of its folder or file; and its licence, where its own card says it."""

    name: str
    licence: str | None


class Score(NamedTuple):
    """A result for the Hub's tables. data: name of the rows; hub: whether that is a data set on the Hub."""

    task: str
    data: str
    hub: bool
    measure: str
    value: float


def card(folder: Path, state: Mapping[str, Any], recipe: Recipe, base_name: str, relation: str) -> str:
    """The card: front matter, how the model was made, how it is loaded, scores before and after, cost, and the recipe.

    relation  the Hub's word: "adapter", "finetune" or "merge"
    """
    before, after = state.get("before") or {}, state.get("after") or {}
    rows = [
        f"| {n.replace('_', ' ')}, {m['unit']} | {before[n]['value']:.4g} | {m['value']:.4g} |"
        for n, m in after.items()
    ]
    census, peft = state["census"], (folder / "adapter_config.json").exists() and relation == "adapter"
    base, task = base_of(recipe.model, base_name), recipe.task.pipeline_tag
    lines = [
        *front(
            base, folder.name, relation, peft, (recipe.tuner.key(), recipe.objective.key()), task,
            sorted({s.path for s in recipe.data.sources if on_hub(s.path)}), _scores(recipe, after),
        ),
        "",
        f"# {folder.name}",
        "",
        f"Tuned by luthier {state['luthier']} from {base.name} (weights {state['base']['weights'][:16]}) "
        f"on {census['rows']} rows "
        f"(data {state['data_hash'][:16]}; {census['dropped']} dropped, {census['cut']} cut): {state['steps']} steps, "
        f"{state['tokens']} tokens, {state['train_seconds']:.0f} s, {state['peak_memory_bytes'] / 1e9:.1f} GB at most.",
        "",
        *loading(folder.name, relation, peft, task),
        *(["| measure | before | after |", "|---|---|---|", *rows, ""] if rows else []),
        UNSAID if base.licence is None else f"Licence: {base.licence}, as the base model's card says.",
        "",
        "<details><summary>Recipe</summary>",
        "",
        "```yaml",
        (folder / "recipe.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "</details>",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def front(
    base: Base, name: str, relation: str, peft: bool, tags: Sequence[str], task: str | None = None,
    datasets: Sequence[str] = (), scores: Sequence[Score] = (),
) -> list[str]:  # fmt: skip
    """The lines of the front matter."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=s.task, dataset_type=s.data, dataset_name=s.data.rpartition("/")[2], metric_type=s.measure,
            metric_name=s.measure.replace("_", " "), metric_value=float(f"{s.value:.6g}"),
        )
        for s in scores
    ]  # fmt: skip
    licence, name_of_licence = _licence_keys(base.licence)
    data = ModelCardData(
        base_model=base.name, base_model_relation=relation, license=licence, license_name=name_of_licence,
        library_name="peft" if peft else "transformers", pipeline_tag=task, tags=["luthier", *tags],
        datasets=list(datasets) or None, model_name=name if results else None, eval_results=results or None,
    )  # fmt: skip
    return ["---", *data.to_yaml().splitlines(), "---"]


def _licence_keys(licence: str | None) -> tuple[str | None, str | None]:
    """A licence as the Hub takes it: (one of its own names, None), or ("other", a name)."""
    if licence is None or licence in LICENCES:
        return licence, None
    return "other", re.sub(r"[^a-z0-9.+-]+", "-", licence.lower()).strip("-") or "unnamed"


def loading(name: str, relation: str, peft: bool, task: str | None) -> list[str]:
    """How the model is loaded, as lines of a card. Forms that are luthier's own need luthier."""
    if task is None or (relation == "adapter" and not peft):
        return ["```", f'luthier generate {name} "a question"', "```", ""]
    needs = "  # needs peft" if peft else ""
    return [
        "```python",
        f"from transformers import pipeline{needs}",
        "",
        f'model = pipeline("{task}", model="{name}")',
        "```",
        "",
    ]


def _scores(recipe: Recipe, after: Mapping[str, Any]) -> list[Score]:
    """The measures on held-out rows that have a number."""
    rows = recipe.data.eval
    if rows is None:
        return []
    if isinstance(rows, float):
        sources = ", ".join(s.path if on_hub(s.path) else Path(s.path).name for s in recipe.data.sources)
        hub, data = False, f"{rows:.0%} of {sources}"
    else:
        hub = on_hub(rows)
        data = rows if hub else Path(rows).name
    found = [Score(recipe.task.pipeline_tag, data, hub, n, m["value"]) for n, m in after.items()]
    return [s for s in found if math.isfinite(s.value)]


def base_of(model: str, shown: str) -> Base:
    """The base model of a card: never a path of this machine.

    model  as the recipe names it
    shown  as the loaded model calls itself: a Hub id with a revision, a path, the name of a GGUF file
    """
    if model in BUILTIN:
        return Base(*BUILTIN[model])
    place = Path(shown)
    if place.is_dir():
        return Base(_of_folder(place), _licence(place / "README.md"))
    if shown.count("/") == 1 and not place.is_absolute():
        name = shown.partition("@")[0]
        return Base(name, _licence(_cached(name)))
    return Base(_plain(shown.removesuffix(" (dequantised)").rpartition("/")[2].removesuffix(".gguf")), None)


def _of_folder(place: Path) -> str:
    """The Hub id of a snapshot in the Hub's cache; of another folder its name."""
    parts = place.resolve().parts
    stored = next((p for p in reversed(parts) if p.startswith("models--")), None)
    return _plain(parts[-1]) if stored is None else "/".join(stored.split("--")[1:])


def _plain(name: str) -> str:
    """A name that the Hub takes for that of a model."""
    return name if HUB_ID.fullmatch(name) else re.sub(r"[^\w.-]+", "-", name).strip("-.") or "base"


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md")
    return Path(found) if isinstance(found, str) else None


def _licence(file: Path | None) -> str | None:
    """The licence in the front matter of a model card."""
    if file is None or not file.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except ValueError:  # front matter that is no YAML
        return None
    return found if isinstance(found, str) else None
