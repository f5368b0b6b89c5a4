"""Updates: frozen values that say what a run changed."""

from luthier.update.parts import Chart, Dense, LowRank, Modules, Part, PeftPart, Prompt, Replace, Seeds, Sparse
from luthier.update.update import Update, add

__all__ = [
    "Chart",
    "Dense",
    "LowRank",
    "Modules",
    "Part",
    "PeftPart",
    "Prompt",
    "Replace",
    "Seeds",
    "Sparse",
    "Update",
    "add",
]
