"""Mergers: how several updates become one."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Linear": "linear",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
