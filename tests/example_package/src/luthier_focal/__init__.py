"""Focal loss, as somebody else would bring it to luthier."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from luthier.method import Source, Traits
from luthier.objectives.base import Forward, Objective, Term


def focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma nll, p = exp(-nll)."""
    return (1 - (-nll).exp()).pow(gamma) * nll


class Focal(Objective):
    """Turn the loss of tokens that are right already down.

    Cost: that of sft.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source("Focal Loss for Dense Object Detection", 2017, "arXiv:1708.02002", "eq. 4")

    gamma: float = Field(2.0, ge=0)
    """Focusing strength; 0 is sft."""

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        return {"loss": Term(focal(fwd.nll(), self.gamma).sum(), "tokens")}
