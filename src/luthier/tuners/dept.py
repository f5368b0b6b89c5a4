"""DePT: a shorter soft prompt, and low-rank offsets of the embeddings of the prompt's tokens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.inputs import patch_model, soft_prompt
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view
from luthier.update import Prompt, Update


def budget_rank(budget_length: int, length: int, width: int, max_length: int) -> int:
    """Largest rank r with m d + (s + d) r <= l d; 0 or less where no rank fits."""
    return (budget_length - length) * width // (max_length + width)


def scale(alpha: float, rank: int) -> float:
    """c = alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rank else 0.0


class Dept(Tuner):
    """Train `length` vectors before the input, and a rank-r offset for each position of the prompt tokens' embeddings.

    It trains as many numbers as a plain soft prompt of `budget_length` vectors, but adds fewer tokens to each sequence. The
    offset starts at zero. Positions count the real tokens of a sequence, so padding changes nothing. Offsets are on the
    prompt side only, so training and generation have the same inputs (in the official code for decoders neither is true).
    Cost: `length` more tokens a sequence; activation gradients through all blocks, no weight gradients.
    Refuses: budgets that leave no rank.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), claims=frozenset({"inputs_embeds"}))
    source: ClassVar[Source] = Source(
        "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning",
        2023,
        "arXiv:2309.05173",
        "official code",
    )

    budget_length: int = Field(20, ge=1)
    """Length of the plain soft prompt with the same number of trained values (l)."""
    length: int = Field(12, ge=0)
    """Vectors before the input (m)."""
    max_length: int = Field(64, ge=1)
    """Prompt positions that get an offset (s); later ones get none."""
    rank: int | None = Field(None, ge=0)
    """Rank of the offsets; null: the largest within the budget, 0: none (plain prompt tuning)."""
    alpha: float = Field(8.0, gt=0)
    """Offsets are multiplied by alpha / sqrt(rank)."""
    prompt_learning_rate: float = Field(1e-2, gt=0)
    """Learning rate of the vectors; embeddings of T5 need 0.3, those of Llama-like models much less."""
    offset_learning_rate: float = Field(5e-4, gt=0)
    """Learning rate of the offsets' two matrices."""
    init_text: str = "classify the text"
    """The vectors start from the embeddings of this text, repeated or cut; without a tokenizer from random rows of the table."""
    seed: int = 0
    """Seed for the start of A."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if facts.model_config is not None:
            width = facts.model_config.get_text_config().hidden_size
            if self.rank is None and self.rank_for(width) < 1:
                problems.append(
                    Problem(
                        "length",
                        f"leaves no rank: l = {self.budget_length}, m = {self.length}, s = {self.max_length}, d = {width}",
                        "shorten length or max_length, or raise budget_length",
                    )
                )
        return problems

    def rank_for(self, width: int) -> int:
        """Rank of the offsets in a model of this width; below 1 if none fits into the budget."""
        return budget_rank(self.budget_length, self.length, width, self.max_length) if self.rank is None else self.rank

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> DeptTrainable:
        view = as_view(model)
        self.refuse(Facts(model_config=view.module.config))
        return DeptTrainable(self, view)


class DeptTrainable(Trainable):
    """vectors [M, D], A [S, R], B [R, D]; all float32."""

    def __init__(self, tuner: Dept, view: ModelView) -> None:
        self.tuner, streams, width = tuner, Streams(tuner.seed), view.anatomy.hidden_size
        start = self._start(view, streams)
        super().__init__(view)
        self.freeze_base()
        rank = tuner.rank_for(width)
        self.rank, self.scale = rank, scale(tuner.alpha, rank)
        self.vectors = nn.Parameter(start)
        limit = 1 / math.sqrt(rank) if rank else 0.0
        a = torch.empty(tuner.max_length, rank).uniform_(-limit, limit, generator=streams.torch("dept"))
        self.a = nn.Parameter(a.to(view.device))
        self.b = nn.Parameter(torch.zeros(rank, width, device=view.device))
        for name, p in (("prompt", self.vectors), ("offset_a", self.a), ("offset_b", self.b)):
            self.add_parameter(view.embedding, name, p)
        hook = soft_prompt(lambda: self.vectors, self.offsets if rank else None)
        self.put(view.hook_inputs(hook))
        self.put(patch_model(view))

    def _start(self, view: ModelView, streams: Streams) -> Tensor:
        """[M, D] float32."""
        table, m = view.embedding.weight.detach().float(), self.tuner.length
        if view.tokenizer is None:
            ids = torch.randint(len(table), (m,), generator=streams.torch("dept-ids"))
        else:
            text = view.tokenizer(self.tuner.init_text, add_special_tokens=False)["input_ids"]
            if not text:
                raise RecipeError(
                    "tuner.dept.init_text", f"{self.tuner.init_text!r} holds no token", "write some words"
                )
            ids = torch.tensor((text * (m // len(text) + 1))[:m], dtype=torch.long)
        return table[ids.to(table.device)].clone()

    def offsets(self) -> Tensor:
        """[S, D]."""
        return self.scale * (self.a @ self.b)

    def groups(self) -> list[ParamGroup]:
        t = self.tuner
        groups = [ParamGroup([self.vectors], learning_rate=t.prompt_learning_rate)] if t.length else []
        return [*groups, ParamGroup([self.a, self.b], learning_rate=t.offset_learning_rate)] if self.rank else groups

    def update(self) -> Update:
        with torch.no_grad():
            offsets = self.offsets().cpu() if self.rank else None
            return Update(self.base, (Prompt(self.vectors.detach().cpu().clone(), offsets),))
