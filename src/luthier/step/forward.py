"""The forward pass over one micro-batch, for objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.data.batch import IGNORE, WEIGHT, Batch
from luthier.kernels.head import TokenScores, recomputes, token_nll, token_scores
from luthier.kernels.plain import is_plain
from luthier.model.view import ModelView, Trace

R = TypeVar("R", bound=tuple[int, int, int])


class Forward:
    """What an objective gets for one micro-batch. It runs inside the wrapped module.

    batch  the micro-batch; view  the model; extra  the module from `extend`
    """

    def __init__(self, batch: Batch, view: ModelView, extra: nn.Module | None = None) -> None:
        self.batch, self.view, self.extra = batch, view, extra
        self._traces: dict[tuple[int, Any, tuple[int, ...]], Trace] = {}

    def trace(self, *layers: int, embeds: Tensor | None = None, view: ModelView | None = None) -> Trace:
        """Run the model's trunk and keep these layers. Unless `embeds` are given, a repeated call does not run it again.

        view  another model; the forward's own by default
        """
        view = view or self.view
        if embeds is not None:
            return view.trace(self.batch, layers, embeds)
        key = (id(view), view.standing, layers)
        if key not in self._traces:
            self._traces[key] = view.trace(self.batch, layers)
        return self._traces[key]

    def hidden(self, layer: int = -1, embeds: Tensor | None = None, view: ModelView | None = None) -> Tensor:
        """[T, D]: the final state (-1), or the input of block `layer`."""
        asked = view or self.view
        for (owner, standing, layers), trace in self._traces.items():
            if embeds is None and owner == id(asked) and standing == asked.standing and layer in layers:
                return trace.hidden[layer]
        return self.trace(layer, embeds=embeds, view=view).hidden[layer]

    def nll(self, hidden: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[N] float32 nats at the supervised positions.

        hidden  [T, D]; the final state by default
        labels  [T]; the batch's by default
        """
        hidden = self.hidden() if hidden is None else hidden
        labels = self.batch.labels if labels is None else labels
        rows = (labels != IGNORE).nonzero().squeeze(1)  # [N]
        view = self.view
        if view.anatomy.tags_tokens:
            return nn.functional.cross_entropy(view.token_logits(hidden[rows]), labels[rows], reduction="none")
        picked = view.head_input(hidden[rows])  # [T, D] -> [N, D]
        view.meter.head(picked, view.head_weight, recomputes(view.head_weight, view.head_bias, view.head_transform()))
        return token_nll(picked, view.head_weight, labels[rows], view.head_bias, view.head_transform())

    def map_logits(self, f: Callable[[Tensor, R], Tensor], runs: Sequence[R]) -> Tensor:
        """[N]: f(logits [n, V], run) over runs of supervised rows, one after another.

        runs  (sequence, first row within it, n); their n sum to N
        The logits of a run exist only while f works; the backward pass computes them again.
        """
        rows, hidden = self.batch.supervised, self.hidden()
        sizes = [run[2] for run in runs]
        out = []
        for part, run in zip(rows.split(sizes), runs, strict=True):

            def piece(h: Tensor, part: Tensor = part, run: R = run) -> Tensor:
                return f(self.logits(part, h), run)

            again = torch.is_grad_enabled() and not is_plain()
            out.append(checkpoint(piece, hidden, use_reentrant=False) if again else piece(hidden))
        return torch.cat(out) if out else hidden.sum(-1).float()[:0]

    def scores(self) -> TokenScores:
        """Loss and entropy of every supervised token, without a gradient."""
        rows, view = self.batch.supervised, self.view
        if not len(rows):  # a trunk may refuse a batch without tokens
            return TokenScores(torch.zeros(0, device=rows.device), torch.zeros(0, device=rows.device))
        if view.anatomy.tags_tokens:
            log_p = view.token_logits(self.hidden()[rows]).log_softmax(-1)  # [N, C]
            loss = nn.functional.nll_loss(log_p, self.batch.labels[rows], reduction="none")
            return TokenScores(loss, -(log_p.exp() * log_p).sum(-1))
        picked = view.head_input(self.hidden()[rows])
        view.meter.head(picked, view.head_weight, False)
        return token_scores(picked, view.head_weight, self.batch.labels[rows], view.head_bias, view.head_transform())

    def logits(self, rows: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """float32 logits: [N, V] (or [N, C] of tags) at these token positions; without any, [S, C] of the classification head."""
        hidden = self.hidden() if hidden is None else hidden
        if rows is None:
            return self._class_logits(hidden)
        if self.view.anatomy.tags_tokens:
            return self.view.token_logits(hidden[rows])
        self.view.meter.head(hidden[rows], self.view.head_weight, False)
        return self.view.head_logits(hidden[rows])

    def _class_logits(self, hidden: Tensor) -> Tensor:
        """[S, C]: the vocabulary's scores of the label words at the answer slot, or the classification head's."""
        if "slot" not in self.batch.row:
            return self.view.class_logits(hidden, self.batch)
        words = self.batch.row["words"][0]  # [C]; a task has one set of label words
        at = hidden[self.batch.starts + self.batch.row["slot"]]  # [S, D]
        if self.view.head_transform() is not None:  # it may differ from word to word
            return self.view.head_logits(at)[:, words]
        picked = self.view.head_input(at)
        bias = self.view.head_bias
        bias = None if bias is None else bias[words]
        return nn.functional.linear(picked, self.view.head_weight[words], bias).float()


def sequence_sum(values: Tensor, batch: Batch) -> Tensor:
    """[N] at the supervised positions -> [S], summed by sequence."""
    return torch.zeros(batch.num_sequences, device=values.device).index_add(0, batch.seq[batch.supervised], values)


def weighed(values: Tensor, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """[N] losses at the supervised positions, multiplied by the weights of their rows if rows have weights.

    labels  [T] labels that mark the supervised positions; the batch's by default
    """
    weight = batch.row.get(WEIGHT)
    if weight is None:
        return values
    rows = batch.supervised if labels is None else (labels != IGNORE).nonzero().squeeze(1)
    return values * weight[batch.seq[rows]]


def weighed_rows(values: Tensor, batch: Batch) -> Tensor:
    """[S] losses multiplied by the weights of their rows, if rows have weights."""
    weight = batch.row.get(WEIGHT)
    return values if weight is None else values * weight
