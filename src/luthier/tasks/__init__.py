"""Tasks: what a row is, and how a model is used on it."""

from luthier.support.lazy import lazy

EXPORTS = {
    "CausalLm": "causal_lm",
    "Classification": "classification",
    "MaskedLm": "masked_lm",
    "TokenClassification": "token_classification",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
