"""The objective seam: what each token teaches.

An objective returns *sums* and the name of their denominator. Every denominator of an optimiser step is known, over all
micro-batches and ranks, before its first backward; so one batch of eight, eight of one, and two processes agree.
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
    """What a step minimises. `plan` may look at the whole window before any gradient; `loss` runs once a micro-batch."""

    def extend(self, view: ModelView, carried: Mapping[str, Tensor] | None = None) -> nn.Module | None:
        """Modules trained or used beside the model (heads, critics), dropped on export.

        carried  their state after an earlier stage, where the pipeline carries it here
        """
        return None

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        """Without gradient: pick rows and tokens, attach columns; return every local denominator of the step's terms.

        Where all of them are zero over all ranks, the window has nothing to teach: the loop skips the step.
        """
        return window, count(window.micro)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        """Named terms; the loop adds weight * sums / denominator. Rows may have weights: `weighed` puts them in, and the
        denominators of `count` hold them."""
        raise NotImplementedError

    def report(self) -> Mapping[str, float]:
        """Numbers of the last plan worth logging."""
        return {}

    def state_dict(self) -> dict[str, Tensor | float]:
        """What a resumed run needs of what the steps so far have left in the objective: tensors and plain numbers.

        The first rank's is saved and every rank takes it up, so it must be the same on all: add up with `window.total`.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        """Take up the state; tensors come on the CPU."""

    def fresh(self) -> Self:
        """The same fields without any state, as before a run; each run trains with its own."""
        cls: Any = type(self)
        made: Self = cls.model_construct(set(self.model_fields_set), **{n: getattr(self, n) for n in cls.model_fields})
        return made
