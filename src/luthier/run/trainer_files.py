"""Scores and log of a finished run in the files of transformers' Trainer, for tools that read those."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from luthier.recipe import Recipe
from luthier.step.progress import Progress


def trainer_files(
    recipe: Recipe, progress: Progress, measures: Mapping[str, float], rows: Mapping[str, int], seconds: float, total_steps: int
) -> dict[str, str]:  # fmt: skip
    """File name -> text: trainer_state.json, train_results.json, eval_results.json and all_results.json.

    measures  after training, by name
    rows      how many are trained on ("train") and held out ("eval")
    seconds   of the evaluation after training
    """
    epoch = max((e["epoch"] for e in progress.log if "epoch" in e), default=0.0)
    losses = [e["loss"] for e in progress.log if "loss" in e]
    spent = sum(progress.flops.values())
    trained = _results(
        epoch, total_flos=spent, train_loss=sum(losses) / len(losses) if losses else None,
        train_runtime=progress.seconds, train_samples=rows["train"],
        train_samples_per_second=progress.step * recipe.batch_size / max(progress.seconds, 1e-9),
        train_steps_per_second=progress.step / max(progress.seconds, 1e-9),
    )  # fmt: skip
    scored = _results(
        epoch, **{f"eval_{name}": value for name, value in measures.items()}, eval_runtime=seconds,
        eval_samples=rows["eval"], eval_samples_per_second=rows["eval"] / max(seconds, 1e-9),
    )  # fmt: skip
    from transformers import TrainerState  # brings peft along, which training has loaded by now

    asked = {n: getattr(recipe, n) for n in ("logging_steps", "eval_steps", "save_steps") if getattr(recipe, n)}
    ends = [
        {**_without(scored, "eval_samples"), "step": progress.step},
        {**_without(trained, "train_samples"), "step": progress.step},
    ]
    state = TrainerState(
        epoch=epoch, global_step=progress.step, max_steps=total_steps, num_train_epochs=math.ceil(epoch),
        train_batch_size=recipe.batch_size, num_input_tokens_seen=progress.tokens, total_flos=spent,
        log_history=[*progress.log, *ends], best_metric=progress.best_loss, best_global_step=progress.best_step, **asked,
    )  # fmt: skip
    texts = {
        "trainer_state": asdict(state),
        "train_results": trained,
        "eval_results": scored,
        "all_results": {**trained, **scored},
    }
    return {f"{name}.json": json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in texts.items()}


def _results(epoch: float, **values: float | None) -> dict[str, float]:
    """The values that there are, with the epoch."""
    return {"epoch": epoch, **{name: value for name, value in values.items() if value is not None}}


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Entries of the log do not count rows."""
    return {n: v for n, v in values.items() if n != name}
