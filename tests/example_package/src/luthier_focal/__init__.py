"""Focal loss, as a package of its own adds it to luthier."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from luthier.method import Source, Traits
from luthier.objectives.base import Forward, Objective, Term, weighed


def focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma nll, p = exp(-nll)."""
    return (1 - (-nll).exp()).pow(gamma) * nll


class Focal(Objective):
    """Lower the loss of tokens that the model predicts well already.

    Cost: that of sft.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source("Focal Loss for Dense Object Detection", 2017, "arXiv:1708.02002", "eq. 4")

    gamma: float = Field(2.0, ge=0, allow_inf_nan=False)
    """Focusing strength; 0 is sft."""

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        return {"loss": Term(weighed(focal(fwd.nll(), self.gamma), fwd.batch).sum(), "tokens")}
