"""The compute seam: fewer tokens or pairs in the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from luthier.method import Method
from luthier.model.view import ModelView


class Compute(Method):
    """Changes what a forward pass computes while training; evaluation and generation stay dense."""

    def patch(self, view: ModelView, phase: str) -> AbstractContextManager[Any]:
        """Around one forward (and its backward) of phase "train", "score" or "generate". Yields a state to report."""
        raise NotImplementedError
