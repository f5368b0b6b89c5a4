"""Stages: the order in which a model is trained, and on what."""

from luthier.support.lazy import lazy

EXPORTS = {
    "List": "list",
    "Stages": "stages",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
