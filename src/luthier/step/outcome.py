"""The result of a stage, or of a whole nested run."""

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
    """The result of a stage or of a nested run. Parts that it did not make are None or empty.

    update   the difference to the base
    rows     rows that were made: a labelled pool, a chosen set
    mask     [shape of the weight] bool by parameter name: entries that a later stage may train
    metrics  measures of the result, by name
    state    of the trainable, for a stage that continues with the same tuner
    beside   state of modules beside the model (heads), if the objective trained any
    """

    name: str
    update: Update | None = None
    rows: Rows | None = None
    mask: Mapping[str, Tensor] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] | None = None
    progress: Progress | None = None
