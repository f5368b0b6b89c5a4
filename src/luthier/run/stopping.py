"""Handling of Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from luthier.support.signals import handled


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that the loop checks between steps. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        def remember(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        with handled(remember):
            yield self
