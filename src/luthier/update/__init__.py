"""Updates: frozen values that hold what a run changed."""

from luthier.update.base import Order, Part
from luthier.update.compositions import Modules, PeftPart, Prompt, Replace
from luthier.update.packing import Chart
from luthier.update.structure import Structure
from luthier.update.update import Update, add
from luthier.update.vectors import Dense, LowRank, Seeds, Sparse

__all__ = [
    "Chart",
    "Dense",
    "LowRank",
    "Modules",
    "Order",
    "Part",
    "PeftPart",
    "Prompt",
    "Replace",
    "Seeds",
    "Sparse",
    "Structure",
    "Update",
    "add",
]
