"""The model card for the Hub, made from what the run measured. The licence is not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.recipe import Recipe


def card(folder: Path, state: Mapping[str, Any], recipe: Recipe, base_name: str, relation: str) -> str:
    """The card: front matter, how the model was made, scores before and after, cost, and the recipe.

    relation  the Hub's word: "adapter", "finetune" or "merge"
    """
    before, after = state.get("before") or {}, state.get("after") or {}
    rows = [
        f"| {n.replace('_', ' ')}, {m['unit']} | {before[n]['value']:.4g} | {m['value']:.4g} |"
        for n, m in after.items()
    ]
    census, peft = state["census"], (folder / "adapter_config.json").exists() and relation == "adapter"
    lines = [
        *front(recipe.model, base_name, relation, peft, (recipe.tuner.key(), recipe.objective.key())),
        "",
        f"# {folder.name}",
        "",
        f"Tuned by luthier {state['luthier']} from {base_name} (weights {state['base']['weights'][:16]}) "
        f"on {census['rows']} rows "
        f"(data {state['data_hash'][:16]}; {census['dropped']} dropped, {census['cut']} cut): {state['steps']} steps, "
        f"{state['tokens']} tokens, {state['train_seconds']:.0f} s, {state['peak_memory_bytes'] / 1e9:.1f} GB at most.",
        "",
        *(["| measure | before | after |", "|---|---|---|", *rows, ""] if rows else []),
        "The licence is the base model's; read it before you share this.",
        "",
        "<details><summary>Recipe</summary>",
        "",
        "```yaml",
        (folder / "recipe.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def front(model: str, base_name: str, relation: str, peft: bool, tags: Sequence[str]) -> list[str]:
    """The lines of the front matter. They name `model` if it is a Hub id, else `base_name`."""
    return [
        "---",
        f"base_model: {model if model.count('/') == 1 else base_name}",
        f"base_model_relation: {relation}",
        f"library_name: {'peft' if peft else 'transformers'}",
        f"tags: [{', '.join(('luthier', *tags))}]",
        "---",
    ]
