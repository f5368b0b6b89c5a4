"""Collaboration: several parties tune a model together without sharing rows."""

from luthier.support.lazy import lazy

EXPORTS = {
    "GradTransformer": "grad_transformer",
    "OneShot": "one_shot",
    "SeedRounds": "seed_rounds",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
