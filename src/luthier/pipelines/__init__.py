"""Pipelines: the stages of training, their order and their rows."""

from luthier.support.lazy import lazy

EXPORTS = {
    "List": "list",
    "Stages": "stages",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
