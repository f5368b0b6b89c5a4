"""Runs: carry out a recipe in a folder."""

from luthier.support.lazy import lazy

EXPORTS = {"admit": "ready", "gather": "ready", "make_ready": "ready", "run": "execute"}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
