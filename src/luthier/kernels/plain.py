"""A scope, like `torch.no_grad`, in which ordinary operations replace the hand-written kernels.

Forward-mode derivatives need it, because they work only with ordinary operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PLAIN: ContextVar[bool] = ContextVar("luthier_plain_operations", default=False)


def is_plain() -> bool:
    """True inside `plain_operations`."""
    return _PLAIN.get()


@contextmanager
def plain_operations() -> Iterator[None]:
    """Ordinary operations for the calls inside."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)
