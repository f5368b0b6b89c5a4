"""Runs: carry out a recipe in a folder."""

from luthier.support.lazy import lazy

EXPORTS = {"gather": "ready", "make_ready": "ready", "outline": "ready", "run": "execute"}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
