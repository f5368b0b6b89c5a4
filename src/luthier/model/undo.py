"""How a change to a model is taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Undo = Callable[[], None]


def in_turn(undo: Sequence[Undo]) -> Undo:
    """One undo for several, last first."""

    def all_of_them() -> None:
        for step in reversed(undo):
            step()

    return all_of_them
