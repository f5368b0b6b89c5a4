"""Sampling: each token is drawn from the model's own distribution, changed by temperature and top_p."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.decoding.base import MODEL, Decoder
from luthier.inference.generation import drawn, generate
from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.step.lab import Completion, Lab


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """[S, V] logits, those outside of the smallest set of likeliest tokens with at least this probability at -inf."""
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, float("-inf"))


class Sample(Decoder):
    """Draw each token from softmax(logits / temperature), limited to the nucleus of probability top_p.

    The draws are keyed by the seed and the prompt, so batches and the order of prompts do not change an answer.
    Cost: that of greedy decoding, and a sort of the vocabulary for each token if top_p is below 1.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "The Curious Case of Neural Text Degeneration", 2019, "arXiv:1904.09751", "eq. 2-3"
    )

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Below 1, likely tokens become more likely."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Total probability of the tokens to draw from; 1 draws from all."""

    def decode(
        self, views: Mapping[str, ModelView], prompts: Sequence[Sequence[int]], lab: Lab, max_new_tokens: int
    ) -> list[Completion]:
        draw = drawn([lab.streams.torch("sample", _key(p)) for p in prompts], 1.0)

        def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
            cooled = logits / self.temperature  # [S, V]
            return draw(cooled if self.top_p == 1 else nucleus(cooled, self.top_p), rows)

        return generate(views[MODEL], prompts, lab.renderer, max_new_tokens, choose=choose, tick=lab.tick)


def _key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(str(list(prompt)).encode()).hexdigest()
