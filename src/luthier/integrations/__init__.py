"""Methods in your own loop or in transformers' Trainer, and trackers."""

from luthier.support.lazy import lazy

EXPORTS = {"Loss": "own_loop", "Tuning": "own_loop"}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
