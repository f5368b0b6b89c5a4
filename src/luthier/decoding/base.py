"""The base class of decoders: how the next token of an answer is chosen, with one model or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from luthier.inference.services import lab_around
from luthier.method import Method
from luthier.model.view import ModelView
from luthier.step.lab import Completion, Lab

MODEL = "model"  # the role of the model that answers, among the views


class Decoder(Method):
    """Generates answers."""

    def decode(
        self, views: Mapping[str, ModelView], prompts: Sequence[Sequence[int]], lab: Lab, max_new_tokens: int
    ) -> list[Completion]:
        """Answers to tokenised prompts, in their order.

        views  models by role; the one that answers is called "model"
        An answer depends only on its prompt and the lab's seed, not on its batch.
        """
        raise NotImplementedError  # the seam: every decoder has its own

    def answer(
        self, model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], max_new_tokens: int = 64, seed: int = 0
    ) -> list[str]:
        """Answers of a plain transformers model. Its chat template is used if it has one."""
        lab = lab_around(model, tokenizer, seed)
        prompts = [lab.renderer.prompt_ids({"prompt": t}) for t in texts]
        return [c.text for c in self.decode({MODEL: lab.view()}, prompts, lab, max_new_tokens)]


@dataclass(frozen=True)
class Written:
    """A decoder in the form of a lab's `Generator`."""

    decoder: Decoder
    lab: Lab

    def __call__(self, view: ModelView, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        return self.decoder.decode({MODEL: view}, prompts, self.lab, max_new_tokens)


def writing_with(lab: Lab, decoder: Decoder) -> Lab:
    """The lab, with this decoder as its generator."""
    return replace(lab, answering=Written(decoder, lab))
