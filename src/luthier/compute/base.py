"""The compute seam: fewer tokens or pairs in the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from luthier.method import Method
from luthier.model.view import ModelView


class Compute(Method):
    """Changes what a forward pass computes, in the phases that it is for."""

    def patch(self, view: ModelView, phase: str) -> AbstractContextManager[Any]:
        """Entered around every forward, its backward too where there is one; yields a state to report.

        phase  "train", "score" or "generate"; a method for training alone leaves the other two as they are
        """
        raise NotImplementedError
