"""Train nothing of the model: for stages that train heads, or only measure."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view
from luthier.update import Update


class Frozen(Tuner):
    """Train no weight of the model. Modules that an objective adds still train.

    Cost: no weight gradient, no optimiser state for the model.
    """

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> FrozenTrainable:
        return FrozenTrainable(as_view(model))


class FrozenTrainable(Trainable):
    """No parameters."""

    def __init__(self, view: ModelView) -> None:
        super().__init__(view)
        self.freeze_base()

    def groups(self) -> list[ParamGroup]:
        return []

    def base_view(self) -> AbstractContextManager[None]:
        return nullcontext()

    def update(self) -> Update:
        return Update(self.base, ())
