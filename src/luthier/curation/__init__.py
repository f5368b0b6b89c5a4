"""Curators: which rows are used, and in which form."""

from luthier.support.lazy import lazy

EXPORTS = {
    "QTuningOffline": "q_tuning_offline",
    "Random": "random",
    "Scdp": "scdp",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
