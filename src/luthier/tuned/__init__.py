"""Use a finished run: open it, generate, score, export."""

from luthier.support.lazy import lazy

EXPORTS = {"Tuned": "open", "answers": "open", "open_run": "open", "scores": "open"}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
