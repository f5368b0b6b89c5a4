"""The objective seam: what each token teaches.

An objective returns *sums* and the name of their denominator. Every denominator of an optimiser step is known, over all
micro-batches and ranks, before its first backward; so one batch of eight, eight of one, and two processes agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.forward import Forward, sequence_sum, weighed, weighed_rows
from luthier.step.probe import Probe
from luthier.step.window import Clock, Term, Window, count

__all__ = [
    "Clock", "Forward", "Objective", "Probe", "Term", "Window", "count", "sequence_sum", "weighed", "weighed_rows",
]  # fmt: skip


class Objective(Method):
    """What a step minimises. `plan` may look at the whole window before any gradient; `loss` runs once a micro-batch."""

    def extend(self, view: ModelView, carried: Mapping[str, Tensor] | None = None) -> nn.Module | None:
        """Modules trained or used beside the model (heads, critics), dropped on export.

        carried  their state after an earlier stage, where the pipeline carries it here
        """
        return None

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        """Without gradient: pick rows and tokens, attach columns; return every local denominator of the step."""
        return window, count(window.micro)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        """Named terms; the loop adds weight * sums / denominator. Rows may have weights: `weighed` puts them in, and the
        denominators of `count` hold them."""
        raise NotImplementedError

    def report(self) -> Mapping[str, float]:
        """Numbers of the last plan worth logging."""
        return {}
