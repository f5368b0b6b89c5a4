"""Train nothing of the model: for stages that train heads, or only measure."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from transformers import PreTrainedModel

from luthier.method import Facts, Problem
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view
from luthier.update import Update


class Frozen(Tuner):
    """Train no weight of the model. Modules that an objective adds still train.

    Cost: no weight gradient, no optimiser state for the model.
    """

    recipe_lines: ClassVar[tuple[str, ...]] = (
        "task: classification",
        "data: {train: train.jsonl, eval: test.jsonl}  # rows of text and label",
        "tuner: frozen  # only the new head trains",
    )

    def check(self, facts: Facts) -> list[Problem]:
        problems, anatomy = super().check(facts), facts.anatomy
        head = anatomy is None or anatomy.task_head  # every tuner trains a task head
        if not head and facts.others and not any(m.trains_beside for m in facts.others):
            names = [m.key() for m in facts.others if m is not self] or ["no other method"]
            add = "add" if len(names) > 1 else "adds"
            what = f"nothing trains: {' and '.join(names)} {add} no trained modules to the frozen model"
            problems.append(Problem("", what, "choose another tuner"))
        return problems

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
