"""Compute methods: fewer tokens or pairs in the forward pass."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Lemo": "lemo",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
