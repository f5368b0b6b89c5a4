"""Experiment trackers under Trainer's names: transformers' own integrations, called by luthier's loop.

A tracker never stops a run: if one fails, luthier warns once and drops it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from luthier.method.building import nearest
from luthier.support.errors import RecipeError

log = logging.getLogger(__name__)


def check(names: Sequence[str]) -> None:
    """Raises RecipeError for a tracker that is unknown, or whose package is missing, before anything starts."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name != "none" and name not in INTEGRATION_TO_CALLBACK:
            remedy = nearest(name, ["none", *INTEGRATION_TO_CALLBACK])
            raise RecipeError("report_to", f"there is no tracker {name!r}", remedy)
        if name != "none" and name not in get_available_reporting_integrations():
            raise RecipeError("report_to", f"the package of {name} is not installed", f"pip install {name}")


class Trackers:
    """The trackers of one run; without names it does nothing."""

    def __init__(self, names: Sequence[str], folder: Path, run_name: str, total_steps: int, model: Any) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        wanted = [n for n in names if n != "none"]
        self._live = {n: INTEGRATION_TO_CALLBACK[n]() for n in wanted}
        self._model = model
        if wanted:
            self._args = TrainingArguments(output_dir=str(folder), run_name=run_name, report_to="none", use_cpu=True)
            # The line before has reset the state that all accelerators share.
            Accelerator(cpu=not torch.cuda.is_available())
            self._state = TrainerState(max_steps=total_steps, is_local_process_zero=True, is_world_process_zero=True)
            self._control = TrainerControl()
        self._call("on_train_begin")

    def _call(self, event: str, **more: Any) -> None:
        for name, callback in list(self._live.items()):
            try:
                getattr(callback, event)(self._args, self._state, self._control, model=self._model, **more)
            except Exception as error:  # a tracker may raise anything, and must not stop the run
                log.warning("tracker %s failed (%s) and is dropped", name, error)
                del self._live[name]

    def step(self, entry: Mapping[str, float]) -> None:
        """One log entry."""
        if self._live:
            self._state.global_step, self._state.epoch = int(entry["step"]), float(entry.get("epoch", 0.0))
            self._call("on_log", logs=dict(entry))

    def close(self) -> None:
        """At the end of training."""
        self._call("on_train_end")
