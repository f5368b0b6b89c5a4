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

    update    all changes from the base, with those that the stage started from
    rows      rows that were made: a labelled pool, a chosen set
    mask      [shape of the weight] bool by parameter name: which entries a later stage may train
    metrics   measures of the result, by name
    tuner     the tuner that trained
    state     the tuner's state: a stage with the same tuner continues from it
    under     the update that was in place while the stage trained; it is not part of the state
    beside    state of modules beside the model (heads), if the objective trained any
    progress  the steps and their cost; for a stage without training, the cost of its work
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
