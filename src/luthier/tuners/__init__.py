"""Tuners: which weights are trained, and in which form."""

from luthier.support.lazy import lazy

EXPORTS = {
    "Adapter": "adapter",
    "Dept": "dept",
    "FedKSeed": "fedkseed",
    "Frozen": "frozen",
    "Full": "full",
    "GreenTrainer": "green_trainer",
    "Hft": "hft",
    "Layerwise": "layerwise",
    "Lift": "lift",
    "Lora": "lora",
    "Peft": "peft",
    "Spiel": "spiel",
}
__getattr__, __dir__, __all__ = lazy(__name__, EXPORTS)
