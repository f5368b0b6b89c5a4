"""The base class of compute methods: fewer tokens or pairs in the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from luthier.method import Method
from luthier.model.view import ModelView


class Compute(Method):
    """Changes what a forward pass computes, in some phases."""

    def patch(self, view: ModelView, phase: str) -> AbstractContextManager[Any]:
        """Entered around every forward pass and its backward pass. Yields a state to report.

        phase  "train", "score" or "generate"; a method for training changes nothing in the other two
        """
        raise NotImplementedError
