"""How a change to a model is taken back."""

from __future__ import annotations

from collections.abc import Callable

Undo = Callable[[], None]
