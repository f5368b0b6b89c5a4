"""Decoders: how answers are generated."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Greedy": "greedy",
    "Sample": "sample",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
