"""How a stage trains: the keys of a recipe that are not a method's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """Optimisation settings, under their usual names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Peak rate."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rows; not used where max_steps is set."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps, in place of epochs."""
    batch_size: int = Field(8, ge=1)
    """Rows an optimiser step, over all processes."""
    tokens_per_forward: int = Field(1024, ge=1)
    """Upper limit of tokens in one forward pass; a longer row goes alone. Lower it to save memory: the result is the same."""
    lr_scheduler_type: str = "linear"
    """A schedule of transformers by its name (linear, cosine, constant, constant_with_warmup, ...)."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the moment estimates."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    shuffle: bool = True
    """Draw a new order each epoch."""
    seed: int = Field(0, ge=0)
    """For order, starts and every draw."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate every so many steps; None: at the end only."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better loss; needs eval_steps."""
    load_best: bool = True
    """With eval_steps: end on the best evaluated state."""
    save_steps: int | None = Field(None, ge=1)
    """Checkpoint every so many steps; None: only when interrupted."""
    save_limit: int = Field(2, ge=1)
    """Checkpoints kept, beside the best."""
    logging_steps: int = Field(1, ge=1)
    """Log every so many steps."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite: stop with an error, or skip the step and count it."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Keep only each block's input and compute the rest again: less memory, about a third more time; "auto": where the
    forecast says that memory would not do without."""
    torch_compile: bool = False
    """Compile every block; pays off in long runs on GPUs. Needs a C++ compiler."""
