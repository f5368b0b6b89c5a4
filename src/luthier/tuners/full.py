"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.tuners.base import DenseTrainable, Tuner, as_view


class Full(Tuner):
    """Train every weight, from float32 masters.

    The model keeps its precision. After each step, the masters are written into it with stochastic rounding from the seed,
    because rounding to the nearest value would lose small changes.
    Cost: about 6 P FLOPs a token; 16 bytes for each weight, besides the model itself.
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}), needs=frozenset({"plain_weights"}), linear=True)
    source: ClassVar[Source] = Source(
        "Universal Language Model Fine-tuning for Text Classification", 2018, "arXiv:1801.06146"
    )

    train_embeddings: bool = True
    """False keeps the token embeddings fixed (and the head, if it is tied to them)."""
    seed: int = Field(0, ge=0)
    """Seed for stochastic rounding."""

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> DenseTrainable:
        view = as_view(model)
        skip = "" if self.train_embeddings else view.anatomy.embedding + "."
        names = [n for n in view.anatomy.parameters if not skip or not n.startswith(skip)]
        return DenseTrainable(view, names, self.seed)
