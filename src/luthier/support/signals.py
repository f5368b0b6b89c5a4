"""Handle Ctrl-C and SIGTERM in a block of code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Both signals call the handler, even if a shell's background job ignores the first. Afterwards the old handlers return."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, earlier in before.items():
            signal.signal(s, earlier)
