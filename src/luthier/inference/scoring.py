"""Compute the loss of rows with a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from luthier.data.batch import IGNORE, collate
from luthier.data.reading import Tick, no_tick
from luthier.kernels.head import CHUNK, TokenScores
from luthier.model.view import ModelView, evaluating
from luthier.step.forward import Forward
from luthier.step.lab import Choices, Continuation, Pair, RowScore
from luthier.step.order import micro_batches
from luthier.tasks.base import Draw, Task
from luthier.tasks.causal_lm import CausalLm

T = TypeVar("T")
WINDOW = 256  # rows that are sorted into micro-batches together
USUAL = CausalLm()


@dataclass(frozen=True)
class Scoring:
    """Scores rendered rows with a frozen model, in their order, one batch at a time: a lab's `Scorer`.

    draw  from the task: makes the version of a row that is always scored; None if rows do not change
    """

    tokens_per_forward: int = 2048
    task: Task = USUAL
    tick: Tick = no_tick
    draw: Draw | None = None

    def losses(self, view: ModelView, rows: Sequence[Any]) -> Iterator[RowScore]:
        return _in_order(view, rows, self.tokens_per_forward, self.task.scores, self.tick, self.draw)

    def tokens(self, view: ModelView, rows: Sequence[Any]) -> Iterator[TokenScores]:
        return _in_order(view, rows, self.tokens_per_forward, _token_scores, self.tick, self.draw)

    def choices(self, view: ModelView, rows: Sequence[Any]) -> Iterator[Choices]:
        return _in_order(view, rows, self.tokens_per_forward, self.task.choices, self.tick, self.draw)

    def continuations(self, view: ModelView, pairs: Sequence[Pair]) -> list[Continuation]:
        return continuations(view, pairs, self.tokens_per_forward, self.tick)


def _token_scores(fwd: Forward) -> list[TokenScores]:
    """[N] scores of a forward, cut by sequence."""
    found, counts = fwd.scores(), fwd.batch.supervised_counts.tolist()
    return [TokenScores(*parts) for parts in zip(*(column.split(counts) for column in found), strict=True)]


@torch.no_grad()
def _in_order(
    view: ModelView, rows: Sequence[Any], tokens_per_forward: int, of: Callable[[Forward], list[T]], tick: Tick,
    draw: Draw | None = None,
) -> Iterator[T]:  # fmt: skip
    """The results of `of`, which gets a forward pass and gives one for each sequence, in the order of rows; dropout is off."""
    with evaluating(view.module):
        for start in range(0, len(rows), WINDOW):
            part = [r if draw is None else draw(r, None) for r in rows[start : start + WINDOW]]
            tick("scoring", start, f"rows {start + 1} to {start + len(part)}")
            done: dict[int, T] = {}
            for places in micro_batches([len(r["ids"]) for r in part], tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(view.device)
                with view.phase("score"):
                    done |= zip(places, of(Forward(batch, view)), strict=True)
            yield from (done[i] for i in range(len(part)))


def mean_loss(scored: Iterable[RowScore]) -> float:
    """The mean over all supervised tokens, or rows."""
    total, count = 0.0, 0.0
    for s in scored:
        total, count = total + s.total, count + s.over
    return total / max(count, 1.0)


def continuations(
    view: ModelView, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_forward: int, tick: Tick = no_tick
) -> list[Continuation]:
    """The loss of each continuation, and whether it is the greedy one; a pair is (token ids before, token ids after).

    Pairs that differ only in their last token share a forward pass. The answers of a multiple choice often do.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (before, after) in enumerate(pairs):
        groups.setdefault((len(before), *before, *after[:-1]), []).append(i)
    rows, lasts = [], []
    for number, members in enumerate(groups.values()):
        before, after = pairs[members[0]]
        prompt = [1] * len(before) + [0] * len(after)
        labels = [IGNORE] * len(before) + list(after)
        rows.append({"ids": [*before, *after], "labels": labels, "key": str(number), "token": {"prompt": prompt}})
        lasts.append([pairs[i][1][-1] for i in members])
    found = _in_order(view, rows, tokens_per_forward, lambda fwd: _continued(fwd, lasts), tick)
    out: dict[int, Continuation] = {}
    for members, values in zip(groups.values(), found, strict=True):
        out |= zip(members, values, strict=True)
    return [out[i] for i in range(len(pairs))]


def _continued(fwd: Forward, lasts: Sequence[Sequence[int]]) -> list[list[Continuation]]:
    """For each sequence, a continuation for each of its last tokens."""
    batch, rows = fwd.batch, fwd.batch.supervised
    owner = batch.seq[rows]
    is_last = torch.cat([owner[1:] != owner[:-1], owner.new_ones(1).bool()])
    groups = [lasts[int(k)] for k in batch.keys]
    total, greedy = [0.0] * len(groups), [True] * len(groups)
    out: list[list[Continuation]] = [[] for _ in groups]
    for part, mine, ends in zip(rows.split(CHUNK), owner.split(CHUNK), is_last.split(CHUNK), strict=True):
        log_p = fwd.logits(part).log_softmax(-1)  # [n, V] at a time
        best = log_p.argmax(-1).tolist()
        said = log_p.gather(1, batch.labels[part].unsqueeze(1)).squeeze(1).tolist()
        for n, (s, end) in enumerate(zip(mine.tolist(), ends.tolist(), strict=True)):
            if end:
                out[s] = [
                    Continuation(total[s] - p, greedy[s] and best[n] == t)
                    for t, p in zip(groups[s], log_p[n, groups[s]].tolist(), strict=True)
                ]
            else:
                total[s] -= said[n]
                greedy[s] = greedy[s] and best[n] == int(batch.labels[part[n]])
    return out
