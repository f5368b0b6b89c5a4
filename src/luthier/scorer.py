"""Asking a frozen model for the loss of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from luthier.data.batch import collate
from luthier.data.reading import Tick, no_tick
from luthier.model.view import ModelView
from luthier.objectives.base import Forward, sequence_sum
from luthier.training.head import CHUNK
from luthier.training.order import micro_batches

T = TypeVar("T")
WINDOW = 256  # rows sorted into forwards together


class RowScore(NamedTuple):
    """Of one row: summed loss in nats, over how many tokens (1 for a class), and the most likely class."""

    total: float
    over: float
    best: int | None


def row_scores(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, task: str, tick: Tick = no_tick
) -> Iterator[RowScore]:
    """Rows in their order, one forward at a time."""
    return _in_order(view, rows, tokens_per_forward, lambda fwd: _forward_scores(fwd, task), tick)


@torch.no_grad()
def _in_order(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, of: Callable[[Forward], list[T]], tick: Tick
) -> Iterator[T]:
    """What `of` says of each sequence of a forward, for the rows in their order; dropout off."""
    training = view.module.training
    view.module.eval()
    try:
        for start in range(0, len(rows), WINDOW):
            part = rows[start : start + WINDOW]
            tick("scoring", start, f"rows {start + 1} to {start + len(part)}")
            done: dict[int, T] = {}
            for places in micro_batches([len(r["ids"]) for r in part], tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(view.device)
                done |= zip(places, of(Forward(batch, view)), strict=True)
            yield from (done[i] for i in range(len(part)))
    finally:
        view.module.train(training)


def mean_loss(scored: Iterable[RowScore]) -> float:
    """Over all supervised tokens, or rows."""
    total, count = 0.0, 0.0
    for s in scored:
        total, count = total + s.total, count + s.over
    return total / max(count, 1.0)


def first_choices(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, task: str, tick: Tick = no_tick
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each row, over its supervised tokens (or its class): probability of the likeliest, whether it is right, and the
    right one.
    """
    return _in_order(view, rows, tokens_per_forward, lambda fwd: _choices(fwd, task), tick)


def continuations(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, tick: Tick = no_tick
) -> Iterator[tuple[float, bool]]:
    """For each row, over its supervised tokens: their loss in nats, and whether each is the likeliest."""
    return _in_order(view, rows, tokens_per_forward, _continued, tick)


def _continued(fwd: Forward) -> list[tuple[float, bool]]:
    batch, rows = fwd.batch, fwd.batch.supervised
    nll, best = [], []
    for part in rows.split(CHUNK):  # [n, V] at a time
        logits = fwd.logits(part)
        nll.append(torch.nn.functional.cross_entropy(logits, batch.labels[part], reduction="none"))
        best.append(logits.argmax(-1))
    counts = torch.bincount(batch.seq[rows], minlength=batch.num_sequences).tolist()
    right = torch.cat(best) == batch.labels[rows]
    return [
        (float(n.sum()), bool(r.all())) for n, r in zip(torch.cat(nll).split(counts), right.split(counts), strict=True)
    ]


def _choices(fwd: Forward, task: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    batch = fwd.batch
    if task == "classification":
        top, best = fwd.logits().softmax(-1).max(-1)
        right, counts = batch.row["label"], [1] * batch.num_sequences
    else:
        rows = batch.supervised
        pieces = [fwd.logits(part).softmax(-1).max(-1) for part in rows.split(CHUNK)]  # [n, V] at a time
        top, best = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
        right = batch.labels[rows]
        counts = torch.bincount(batch.seq[rows], minlength=batch.num_sequences).tolist()
    columns = (top.double(), (best == right).double(), right)
    return list(zip(*([p.cpu().numpy() for p in c.split(counts)] for c in columns), strict=True))


def _forward_scores(fwd: Forward, task: str) -> list[RowScore]:
    batch = fwd.batch
    if task == "classification":
        logits = fwd.logits()
        losses = torch.nn.functional.cross_entropy(logits, batch.row["label"], reduction="none")
        return [RowScore(x, 1.0, c) for x, c in zip(losses.tolist(), logits.argmax(-1).tolist(), strict=True)]
    sums = sequence_sum(fwd.nll(), batch)
    counts = torch.bincount(batch.seq[batch.supervised], minlength=batch.num_sequences)
    return [RowScore(x, float(n), None) for x, n in zip(sums.tolist(), counts.tolist(), strict=True)]
