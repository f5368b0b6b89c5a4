"""Which rows, in which words."""

from luthier._lazy import lazy

EXPORTS = {
    "Random": "random",
    "Scdp": "scdp",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
