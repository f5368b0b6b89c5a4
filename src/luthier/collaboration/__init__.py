"""Who holds what, and what leaves."""

from luthier._lazy import lazy

EXPORTS = {
    "FedKSeed": "fedkseed",
    "GradTransformer": "grad_transformer",
    "OneShot": "one_shot",
    "SeedRounds": "seed_rounds",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
