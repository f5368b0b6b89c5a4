"""The training settings of a stage: the recipe keys that do not belong to a method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """Optimisation settings, under their usual names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Passes over the rows; not used if max_steps is set."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimiser steps, instead of epochs."""
    batch_size: int = Field(8, ge=1)
    """Rows in each optimiser step, over all processes."""
    tokens_per_forward: int = Field(1024, ge=1)
    """Largest number of tokens in one forward pass; a longer row goes alone. A lower value saves memory, with the same result."""
    lr_scheduler_type: Schedule = "linear"
    """The schedule of the learning rate, under transformers' names; those that need more than the warm-up are not among them."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The global gradient norm is clipped to this value."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the moment estimates."""
    adam_eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    shuffle: bool = True
    """Use a new order in each epoch."""
    seed: int = Field(0, ge=0)
    """Seed for order, start values and all draws."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate after every so many steps; null: only at the end."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a lower loss; needs eval_steps."""
    load_best: bool = True
    """With eval_steps: end with the best evaluated state."""
    save_steps: int | None = Field(None, ge=1)
    """Save a checkpoint after every so many steps; null: only when interrupted."""
    save_limit: int = Field(2, ge=1)
    """Number of checkpoints kept, besides the best one."""
    logging_steps: int = Field(1, ge=1)
    """Log after every so many steps."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What happens when a loss or gradient is not finite: stop with an error, or skip the step and count it."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Keep only each block's input and compute the rest again: less memory, about a third more time; "auto": only if the
    forecast says that memory would not be enough."""
    torch_compile: bool = False
    """Compile every block; useful in long runs on GPUs. Needs a C++ compiler."""

    def unread(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, why, what to do) for each key that was set but that training would not read."""
        own = {n: getattr(self, n) != f.default for n, f in type(self).model_fields.items()}
        if own["epochs"] and own["max_steps"]:
            yield "epochs", "is not read beside max_steps", "set one of the two"
        if self.lr_scheduler_type == "constant" and own["warmup_fraction"] and self.warmup_fraction:
            yield "warmup_fraction", "is not read by lr_scheduler_type constant", "set constant_with_warmup"
        if self.early_stopping_patience and not self.eval_steps:
            yield "early_stopping_patience", "needs evaluations during training", "set eval_steps"
        if not self.load_best and not self.eval_steps:
            yield "load_best", "needs evaluations during training", "set eval_steps"
