"""The base class of objectives: the loss of each token.

An objective returns *sums* and the name of their denominator. All denominators of an optimiser step, over all micro-batches and
ranks, are known before its first backward pass. So one batch of eight, eight of one, and two processes agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.forward import Forward, sequence_sum, weighed, weighed_rows
from luthier.step.probe import Probe
from luthier.step.window import Clock, Term, Window, count, mean_of

__all__ = [
    "Clock", "Forward", "Objective", "Probe", "Term", "Window", "count", "mean_of", "sequence_sum", "weighed", "weighed_rows",
]  # fmt: skip


class Objective(Method):
    """What a step minimises. `plan` may use the whole window before any gradient; `loss` runs once for each micro-batch."""

    def extend(self, view: ModelView, carried: Mapping[str, Tensor] | None = None) -> nn.Module | None:
        """Modules that are trained or used beside the model (heads, critics) and dropped on export.

        carried  their state after an earlier stage, if the pipeline carries it here
        """
        return None

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        """Choose rows and tokens and attach columns, without gradient. Return every local denominator of the step's terms.

        If all of them are zero over all ranks, the window has no loss, and the loop skips the step.
        """
        return window, count(window.micro)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        """Named terms. The loop adds weight * sums / denominator. Rows may have weights: `weighed` applies them, and the
        denominators of `count` include them."""
        raise NotImplementedError  # the seam: every objective has its own

    def report(self) -> Mapping[str, float]:
        """Numbers of the last plan worth logging."""
        return {}

    def state_dict(self) -> dict[str, Tensor | float]:
        """State that the steps so far left in the objective and that a resumed run needs: tensors and plain numbers.

        The state of the first rank is saved and every rank loads it, so it must be equal on all: add up with `window.total`.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        """Load the state; tensors are on the CPU."""

    def fresh(self) -> Self:
        """The same fields without any state, as before a run. Each run trains with its own."""
        cls: Any = type(self)
        made: Self = cls.model_construct(set(self.model_fields_set), **{n: getattr(self, n) for n in cls.model_fields})
        return made
