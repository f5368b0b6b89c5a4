"""Ctrl-C and SIGTERM for as long as something runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Both signals call the handler, also where a shell's background job ignores the first; then what was before."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, earlier in before.items():
            signal.signal(s, earlier)
