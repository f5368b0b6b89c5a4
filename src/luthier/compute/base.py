"""The base class of compute methods: fewer tokens or pairs in the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from luthier.method import Method
from luthier.model.view import ModelView

PHASES = ("train", "score", "generate")


class Compute(Method):
    """Changes what a forward pass computes, in the phases that it is for.

    phases  of PHASES, in which it changes what is computed; in the others the model computes as without it, to the bit
    """

    phases: ClassVar[frozenset[str]] = frozenset({"train"})

    def patch(self, view: ModelView, phase: str) -> AbstractContextManager[Any]:
        """Entered around every forward pass and its backward pass. Yields a state to report.

        phase  one of PHASES; a method for training alone leaves the other two as they are
        """
        raise NotImplementedError  # the seam: every compute method has its own
