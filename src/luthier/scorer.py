"""Asking a model: mean loss over rows, and answers compared with the wanted ones."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.data.batch import Batch, collate
from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.generation import Completion, generate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward
from luthier.recipe import EvaluateSettings
from luthier.training.order import micro_batches

WINDOW = 256  # rows sorted into forwards together


@dataclass
class Scores:
    """Of a set of rows: mean loss in nats a token (or a row), and where answers were generated, the share right."""

    loss: float
    right: int | None = None
    of: int | None = None
    stopped: int | None = None
    seconds: float = 0.0
    per_row: list[float] = field(default_factory=list)


@torch.no_grad()
def mean_loss(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, task: str, tick: Tick = no_tick
) -> tuple[float, list[float]]:
    """(mean loss over all supervised tokens, or rows; per row means). One forward at a time, running sums only."""
    per_row: list[float] = []
    total, count, training = 0.0, 0.0, view.module.training
    view.module.eval()
    try:
        for start in range(0, len(rows), WINDOW):
            part = rows[start : start + WINDOW]
            tick("scoring", start, f"rows {start + 1} to {start + len(part)}")
            means = [0.0] * len(part)
            for places in micro_batches([len(r["ids"]) for r in part], tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(view.device)
                sums, n = _row_losses(Forward(batch, view), batch, task)
                total, count = total + float(sums.sum()), count + float(n.sum())
                for i, value in zip(places, (sums / n.clamp_min(1)).tolist(), strict=True):
                    means[i] = value
            per_row += means
    finally:
        view.module.train(training)
    return total / max(count, 1.0), per_row


def _row_losses(fwd: Forward, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """([S] summed losses, [S] how many were summed)."""
    if task == "classification":
        values = torch.nn.functional.cross_entropy(fwd.logits(), batch.row["label"], reduction="none")
        return values, torch.ones_like(values)
    where, nll = batch.seq[batch.supervised], fwd.nll()
    sums = torch.zeros(batch.num_sequences, device=nll.device).index_add(0, where, nll)
    return sums, torch.bincount(where, minlength=batch.num_sequences).float()


def answers(
    view: ModelView, rows: Sequence[Row], renderer: Renderer, settings: EvaluateSettings, tick: Tick = no_tick
) -> tuple[list[Completion], list[bool]]:
    """Generated answers, and which of them count as right."""
    prompts = [renderer.prompt_ids(r.values) for r in rows]
    out = generate(view, prompts, renderer, settings.max_new_tokens, tick=tick)
    wanted = [renderer.answer(r.values) for r in rows]
    return out, [matched(a.text, w, settings.match) for a, w in zip(out, wanted, strict=True)]


def evaluate(
    view: ModelView, rows: Sequence[Any], sources: Sequence[Row], renderer: Renderer, settings: EvaluateSettings, *,
    tokens_per_forward: int, task: str, tick: Tick = no_tick,
) -> tuple[Scores, list[Completion]]:  # fmt: skip
    """Loss on held-out rows, and answers to the first `settings.generate` of them."""
    started = time.perf_counter()
    loss, per_row = mean_loss(view, rows, tokens_per_forward, task, tick)
    scores = Scores(loss, per_row=per_row)
    out: list[Completion] = []
    wanted = min(settings.generate, len(sources))
    if wanted and task == "causal-lm":
        out, right = answers(view, sources[:wanted], renderer, settings, tick)
        scores.right, scores.of, scores.stopped = sum(right), wanted, sum(a.stopped for a in out)
    scores.seconds = time.perf_counter() - started
    return scores, out


def matched(output: str, answer: str, how: str) -> bool:
    """True for an answer that counts as right."""
    if how == "text":
        return output.strip() == answer.strip()
    try:
        return json.loads(output) == json.loads(answer)
    except (ValueError, RecursionError):
        return False
