"""How a change to a model is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

Undo = Callable[[], None]


def in_turn(steps: Iterable[Undo]) -> Undo:
    """One undo for steps that are taken as they come, last first. Where one fails, those before it are taken back."""
    with ExitStack() as stack:
        for undo in steps:
            stack.callback(undo)
        return stack.pop_all().close
