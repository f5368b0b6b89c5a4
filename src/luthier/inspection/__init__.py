"""Inspectors: what tuning did to a model."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Norms": "norms",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
