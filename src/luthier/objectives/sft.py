"""Supervised fine-tuning: the next token of the answer, or the class of the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F

from luthier.method import Source
from luthier.objectives.base import Forward, Objective, Term, weighed, weighed_rows


class Sft(Objective):
    """Cross-entropy on the supervised tokens, or on the class if rows have one.

    The mean is over all supervised tokens of the optimiser step, over all micro-batches and ranks. If rows have weights,
    it is the weighted mean.
    Cost: that of the model.
    """

    source: ClassVar[Source] = Source("Maximum likelihood", 1922, "https://doi.org/10.1098/rsta.1922.0009")

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        if "label" in fwd.batch.row:
            label = fwd.batch.row["label"]
            losses = F.cross_entropy(fwd.logits(), label, reduction="none")  # [S]
            return {"loss": Term(weighed_rows(losses, fwd.batch).sum(), "sequences")}
        return {"loss": Term(weighed(fwd.nll(), fwd.batch).sum(), "tokens")}
