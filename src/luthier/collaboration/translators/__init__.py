"""Translators: from a small model's update to a large model's update."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Pairs": "base",
    "Ridge": "ridge",
    "Transformer": "transformer",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
