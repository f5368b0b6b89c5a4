"""Methods in other training loops: an objective as a loss over transformers' batches, a tuner as a Trainer callback."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from luthier.compute.base import Compute
from luthier.data.batch import IGNORE, Batch, collate, front_of
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Objective, Window
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.training.loop import Wrapped
from luthier.tuners.base import Trainable, as_view

KNOWN = ("input_ids", "labels", "attention_mask")


class Loss(nn.Module):
    """An objective as a module: it takes a batch as transformers collates it, and returns the loss.

    `parameters()` are those that the objective trains beside the model, if any. Each call counts as a step, for objectives
    whose weights change over the run.

    total_steps  all optimiser steps of the run
    lab          rows by name, for objectives that need some
    compute      a method that shortens the forward pass; the backward pass must run inside `thinned()`
    """

    def __init__(
        self, objective: Objective, model: PreTrainedModel | ModelView, total_steps: int = 1, lab: Lab | None = None,
        compute: Compute | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._view = as_view(model)
        self._objective, self._lab = objective, lab or Lab()
        if compute is not None:
            self._view.phases.append(partial(compute.patch, self._view))
        self.extra = objective.extend(self._view, None)
        self.probe = Probe(self._view, objective, self.extra)
        # In a list, so that the model's weights are not parameters of this module.
        self._wrapped = [Wrapped(self._view, objective, self.extra)]
        self.step, self.total_steps = 0, total_steps

    def window(self, inputs: Mapping[str, Any]) -> Window:
        """A batch of transformers as a window of luthier, which `Trainable.before_window` takes."""
        batch = as_batch(inputs).to(self._view.device)
        return Window([batch], Clock(self.step, self.total_steps), self._lab)

    def thinned(self) -> contextlib.AbstractContextManager[Any]:
        """A scope for forward and backward pass, if a compute method is used."""
        return self._view.phase("train")

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """The mean loss. Its gradients are those of a step in luthier's own loop."""
        with torch.no_grad():
            window, denominators = self._objective.plan(self.window(inputs), self.probe)
        self.step += 1
        total = torch.zeros((), device=self._view.device)
        for batch in window.micro:
            if batch.num_tokens:
                total = total + self._wrapped[0](batch, denominators)[0]
        return total


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """[S, L] input_ids, labels (IGNORE where there is no loss) and attention_mask as a Batch. Other [S, ...] tensors become
    row columns.
    """
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    labels = inputs.get("labels", torch.full_like(ids, IGNORE))
    beside = {k: v for k, v in inputs.items() if k not in KNOWN}
    rows = []
    for i in range(len(ids)):
        tokens, targets = ids[i][real[i]].tolist(), labels[i][real[i]].tolist()
        front = front_of(targets)
        prompt = [1] * front + [0] * (len(tokens) - front)
        row = {k: v[i] for k, v in beside.items()}
        rows.append({"ids": tokens, "labels": targets, "key": str(i), "token": {"prompt": prompt}, "row": row})
    return collate(rows)


class Tuning(TrainerCallback):
    """Calls a Trainable at the right times in transformers' Trainer: give it as `callbacks`, its optimiser as `optimizers`."""

    def __init__(self, trainable: Trainable) -> None:
        self.trainable = trainable

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainable.before_window(None, None)  # type: ignore[arg-type]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainable.after_backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainable.after_step(Clock(state.global_step + 1, state.max_steps))
