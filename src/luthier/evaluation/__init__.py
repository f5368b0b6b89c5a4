"""Evaluators: how good a model is, at what, and what it forgot."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Bleu": "bleu",
    "Calibration": "calibration",
    "Classification": "classification",
    "Editing": "editing",
    "ExactMatch": "exact_match",
    "Forgetting": "forgetting",
    "FunctionCalls": "function_calls",
    "Knowledge": "knowledge",
    "LmEval": "lm_eval",
    "Loss": "loss",
    "MaskedAccuracy": "masked_accuracy",
    "PassAtK": "pass_at_k",
    "Retrieval": "retrieval",
    "Rouge": "rouge",
    "Tagging": "tagging",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
