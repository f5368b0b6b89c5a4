"""Who holds what, and what leaves."""

from luthier.support.lazy import lazy

EXPORTS = {
    "GradTransformer": "grad_transformer",
    "OneShot": "one_shot",
    "SeedRounds": "seed_rounds",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
