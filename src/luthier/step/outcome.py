"""The result of a stage, or of a whole nested run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from luthier.method import Method
from luthier.step.progress import Progress
from luthier.update import Update

RenderedRows = Sequence[Mapping[str, Any]]  # rendered rows, as `collate` takes them


@dataclass(frozen=True)
class Outcome:
    """The result of a stage or of a nested run. Parts that it did not make are None or empty.

    update    all that differs from the base, what the stage started from included
    rows      rows that were made: a labelled pool, a chosen set
    mask      [shape of the weight] bool by parameter name: which entries may move, for a later stage
    metrics   measures of the result, by name
    tuner     which one trained, and its `state`: a stage with the same tuner goes on from there
    under     the update that was in place while the stage trained, which its state does not hold
    beside    state of modules beside the model (heads), where the objective trained any
    progress  steps and what they took; of a stage without training, what its work took
    """

    name: str
    update: Update | None = None
    rows: RenderedRows | None = None
    mask: Mapping[str, Tensor] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tuner: Method | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    under: Update | None = None
    beside: Mapping[str, Tensor] | None = None
    progress: Progress = field(default_factory=Progress)
