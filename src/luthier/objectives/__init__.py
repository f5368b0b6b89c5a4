"""Objectives: the loss of each token."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Caft": "caft",
    "Distill": "distill",
    "MaskedThought": "masked_thought",
    "Otr": "otr",
    "QTuning": "q_tuning",
    "Sft": "sft",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
