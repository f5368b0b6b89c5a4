"""What a stage, or a whole nested run, left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from luthier.step.progress import Progress
from luthier.update import Update

Rows = Sequence[Mapping[str, Any]]  # rendered rows, as `collate` takes them


@dataclass(frozen=True)
class Outcome:
    """What is left of a stage or of a nested run; what it did not make is None or empty.

    update   what changed, of the base
    rows     rows that were made: a labelled pool, a chosen set
    mask     [shape of the weight] bool by parameter name: which entries may move, for a later stage
    metrics  measures of the result, by name
    state    of the trainable, for a stage that goes on with the same tuner
    beside   state of modules beside the model (heads), where the objective trained any
    """

    name: str
    update: Update | None = None
    rows: Rows | None = None
    mask: Mapping[str, Tensor] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] | None = None
    progress: Progress | None = None
