"""A finished run: open it, ask it, score it, export it, merge it with others, look into what changed."""

from luthier.support.lazy import lazy

EXPORTS = {"Tuned": "open", "answers": "open", "open_run": "open", "scores": "open"}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
