"""Who holds what, and what leaves."""

from luthier._lazy import lazy

EXPORTS = {
    "FedKSeed": "fedkseed",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
