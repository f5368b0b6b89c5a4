"""Asking a model: mean loss over rows, and answers compared with the wanted ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from luthier.data.batch import collate
from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.generation import Completion, generate
from luthier.model.view import ModelView
from luthier.objectives.base import Forward, sequence_sum
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


class RowScore(NamedTuple):
    """Of one row: summed loss in nats, over how many tokens (1 for a class), and the most likely class."""

    total: float
    over: float
    best: int | None


@torch.no_grad()
def row_scores(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, task: str, tick: Tick = no_tick
) -> Iterator[RowScore]:
    """Rows in their order, one forward at a time."""
    training = view.module.training
    view.module.eval()
    try:
        for start in range(0, len(rows), WINDOW):
            part = rows[start : start + WINDOW]
            tick("scoring", start, f"rows {start + 1} to {start + len(part)}")
            done: dict[int, RowScore] = {}
            for places in micro_batches([len(r["ids"]) for r in part], tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(view.device)
                done |= zip(places, _forward_scores(Forward(batch, view), task), strict=True)
            yield from (done[i] for i in range(len(part)))
    finally:
        view.module.train(training)


def mean_loss(scored: Iterable[RowScore]) -> tuple[float, list[float]]:
    """(mean loss over all supervised tokens, or rows; the mean of each row)."""
    per_row, total, count = [], 0.0, 0.0
    for s in scored:
        per_row.append(s.total / max(s.over, 1.0))
        total, count = total + s.total, count + s.over
    return total / max(count, 1.0), per_row


def _forward_scores(fwd: Forward, task: str) -> list[RowScore]:
    batch = fwd.batch
    if task == "classification":
        logits = fwd.logits()
        losses = torch.nn.functional.cross_entropy(logits, batch.row["label"], reduction="none")
        return [RowScore(x, 1.0, c) for x, c in zip(losses.tolist(), logits.argmax(-1).tolist(), strict=True)]
    sums = sequence_sum(fwd.nll(), batch)
    counts = torch.bincount(batch.seq[batch.supervised], minlength=batch.num_sequences)
    return [RowScore(x, float(n), None) for x, n in zip(sums.tolist(), counts.tolist(), strict=True)]


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
) -> tuple[Scores, list[str]]:  # fmt: skip
    """Loss on held-out rows, and answers: to the first `settings.generate` of them, or the class of each."""
    started = time.perf_counter()
    scored = list(row_scores(view, rows, tokens_per_forward, task, tick))
    loss, per_row = mean_loss(scored)
    scores, texts, wanted = Scores(loss, per_row=per_row), [], min(settings.generate, len(sources))
    if task == "classification":
        texts = [view.classes[s.best] for s in scored if s.best is not None]
        scores.right = sum(s.best == r["row"]["label"] for s, r in zip(scored, rows, strict=True))
        scores.of = len(scored)
    elif wanted:
        out, right = answers(view, sources[:wanted], renderer, settings, tick)
        texts = [a.text for a in out]
        scores.right, scores.of, scores.stopped = sum(right), wanted, sum(a.stopped for a in out)
    scores.seconds = time.perf_counter() - started
    return scores, texts


def asked(row: Row, renderer: Renderer, task: str) -> tuple[str, str]:
    """(what the model was asked, the answer that is right) as texts."""
    if task == "classification":
        return row.values["text"], str(row.values["label"])
    return renderer.messages(row.values)[-2]["content"], renderer.answer(row.values)


def matched(output: str, answer: str, how: str) -> bool:
    """True for an answer that counts as right."""
    if how == "text":
        return output.strip() == answer.strip()
    try:
        return json.loads(output) == json.loads(answer)
    except (ValueError, RecursionError):
        return False
