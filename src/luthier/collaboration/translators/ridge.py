"""Kernel ridge: the linear translator, in closed form."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.collaboration.translators.base import Fitted, Pairs, Standard, Translator
from luthier.method import Source
from luthier.step.lab import Lab


def dual_weights(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """(G + strength * mean(diag G) I)^-1 y with G = x x^T, in float64; x [n, D], y [n, E], both centred -> [n, E]."""
    x, y = x.double(), y.double()
    gram = x @ x.T  # [n, n]
    gram.diagonal().add_(strength * gram.diagonal().mean())
    found: Tensor
    found = torch.linalg.lstsq(gram, y, driver="gelsd").solution if strength == 0 else torch.linalg.solve(gram, y)
    return found


class Ridge(Translator):
    """A linear map from all coordinates of the small update to all of the large one, regularised by a ridge.

    It is solved over pairs, not coordinates, so it takes seconds and needs no learning rate. The default with few shadow sets.
    Cost: n^2 (d_S L_S + d_T L_T) products to fit, n (d_S L_S + d_T L_T) to translate; it keeps the training pairs.
    """

    source: ClassVar[Source] = Source(
        "Gradient Transformer: Learning to Generate Updates for LLMs", 2026, "arXiv:2605.27591", "a control; our design"
    )

    strength: float = Field(0.3, ge=0, allow_inf_nan=False)
    """Ridge, in units of the kernel's mean diagonal."""

    def fit(self, pairs: Pairs, lab: Lab | None = None) -> FittedRidge:
        pairs = pairs.checked()
        x, y = self.standards(pairs)
        return FittedRidge(x, y, x.apply(pairs.x).flatten(1), y.apply(pairs.y), self.strength)


class FittedRidge(Fitted):
    """A fitted ridge. rows [n, D] are the training inputs in standard form, weights [n, E] in float64."""

    def __init__(self, x: Standard, y: Standard, rows: Tensor, targets: Tensor, strength: float) -> None:
        super().__init__(x, y)
        self.middle, self.middle_y = rows.mean(0), targets.mean(0)  # zero, except for rounding, if standardised
        self.rows = rows - self.middle
        self.weights = dual_weights(self.rows, (targets - self.middle_y).flatten(1), strength)

    def translate(self, x: Tensor) -> Tensor:
        kernel = (x.flatten(1) - self.middle).double() @ self.rows.double().T  # [N, n]
        return (kernel @ self.weights).float().view(len(x), *self.middle_y.shape) + self.middle_y
