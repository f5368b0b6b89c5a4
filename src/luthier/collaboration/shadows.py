"""Shadow sets: both models tuned on the same public rows, many times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luthier.collaboration.privacy import Privacy, tuning
from luthier.model.view import ModelView
from luthier.step.outcome import RenderedRows
from luthier.step.settings import TrainSettings
from luthier.support.progress import OnProgress, no_progress, steps
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora


def draw(
    sorts: Sequence[str], count: int, size: int, streams: Streams, concentration: float | None = None
) -> list[list[int]]:
    """`count` shadow sets of `size` indices each: drawn without replacement in a set; sets are independent of each other.

    sorts          the kind of each row
    concentration  of a Dirichlet over kinds: each set has its own shares; None: all rows are equal
    Raises ValueError if a set would need more rows than there are.
    """
    if size > len(sorts):
        raise ValueError(f"a shadow set of {size} rows cannot be drawn from {len(sorts)}; lower its size or add rows")
    names, which, counts = np.unique(np.asarray(sorts), return_inverse=True, return_counts=True)
    out = []
    for k in range(count):
        generator, chances = streams.at("shadow", k), None
        if concentration is not None:
            # A small share of each kind, so that a set can always be filled.
            shares = 0.999 * generator.dirichlet([concentration] * len(names)) + 0.001 / len(names)
            chances = (shares / counts)[which]
            chances = chances / chances.sum()
        out.append(generator.choice(len(sorts), size=size, replace=False, p=chances).tolist())
    return out


def tuned(
    view: ModelView, rows: RenderedRows, tuner: Lora, settings: TrainSettings, snapshots: int = 1,
    privacy: Privacy | None = None, progress: OnProgress = no_progress,
) -> Tensor:  # fmt: skip
    """[snapshots, L, d] float32: the update after each of the last optimiser steps.

    privacy   the limit that is kept while tuning; every snapshot is as private as the last
    progress  is called after every step
    The base model is restored afterwards, bit for bit. Raises ValueError for more snapshots than steps.
    """
    total = Loop.length(rows, settings)
    if snapshots > total:
        raise ValueError(f"{snapshots} snapshots of a run of {total} steps; lower snapshots or train longer")
    seen: list[Tensor] = []
    with tuning(view, rows, tuner, settings, privacy) as (trainable, take_step):
        for step in steps(total, progress):
            take_step()
            if step >= total - snapshots:
                seen.append(trainable.update().coordinates())
    return torch.stack(seen)
