"""Greedy decoding: the most likely token each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from luthier.decoding.base import MODEL, Decoder
from luthier.inference.generation import generate
from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.step.lab import Completion, Lab


class Greedy(Decoder):
    """Write the most likely token each time. Other settings of the model's generation_config are not used.

    Cost: a forward pass over the prompt, and one over a single token for each token of the answer.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source("Sequence to Sequence Learning with Neural Networks", 2014, "arXiv:1409.3215")

    def decode(
        self, views: Mapping[str, ModelView], prompts: Sequence[Sequence[int]], lab: Lab, max_new_tokens: int
    ) -> list[Completion]:
        return generate(views[MODEL], prompts, lab.renderer, max_new_tokens, tick=lab.tick)
