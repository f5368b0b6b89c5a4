"""Masked thought: hide part of the solution that the model has written so far, but never the question or the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.data.batch import IGNORE, Batch
from luthier.data.rendering import special_ids
from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward, Objective, Term, Window, count, weighed
from luthier.step.probe import Probe
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams

# --- the mathematics ---


def masking_rate(step: int, total: int, max_rate: float, warmup_share: float) -> float:
    """min(p, p s / (rho S + 1)): from 0 in a line to `max_rate` over the first `warmup_share` of the steps."""
    return min(max_rate, max_rate * step / (warmup_share * total + 1))


def solution(batch: Batch) -> Tensor:
    """[T] bool: input tokens that the position before them predicts."""
    out = torch.zeros_like(batch.labels, dtype=torch.bool)
    out[1:] = (batch.labels[:-1] != IGNORE) & (batch.seq[1:] == batch.seq[:-1])
    return out


def allowed_ids(size: int, special: set[int]) -> np.ndarray:
    """[M] ids below `size` that are not special: a token may be replaced by them."""
    return np.setdiff1d(np.arange(size), list(special))


# --- the method ---


class Vector(nn.Module):
    """What stands for a hidden token: the mean of all embeddings at first, trained with the rest."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.vector = nn.Parameter(embedding.weight.float().mean(0))


class MaskedThought(Objective):
    """Cross-entropy on clean targets, with a random part of the solution's input tokens replaced.

    A solution token is replaced with a probability that rises from 0 over the first two thirds of the run. The tokens are
    drawn again each time a row is used, keyed by step and row. Targets are the clean tokens at all positions, also right
    after hidden ones. Question, template and padding are never changed, and the tuned model has no hidden tokens.
    A token is replaced by a random word of the vocabulary, or by a trained vector (see random_share). The source adds a token
    for the vector, whose output row only gets gradients that lower its probability. Here the vector is kept beside the
    embeddings, so the vocabulary does not grow and nothing of it remains in the tuned model.
    Needs more epochs than sft (the source: 10 instead of 3).
    Cost: that of sft.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), needs=frozenset({"total_steps"}))
    source: ClassVar[Source] = Source(
        "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of LMs",
        2024,
        "arXiv:2403.02178",
        "official code",
    )

    max_rate: float = Field(0.2, ge=0, lt=1)
    """Share of solution tokens replaced at the end of the warm-up; 0.4 suits plain-language reasoning."""
    warmup_share: float = Field(2 / 3, gt=0, le=1)
    """Part of the run over which the share rises (rho)."""
    random_share: float = Field(1.0, ge=0, le=1)
    """Share of the replaced tokens that become random words; the others become the mask vector. Use 1 for small sets."""
    loss_on: Literal["all", "clean"] = "all"
    """"all": every solution token is a target; "clean": not the replaced ones."""
    seed: int = Field(0, ge=0)
    """Seed for the choice of tokens and words."""

    @property
    def trains_beside(self) -> bool:
        return self.random_share < 1 and self.max_rate > 0

    def extend(self, view: ModelView, carried: Mapping[str, Tensor] | None = None) -> nn.Module | None:
        return Vector(view.embedding).to(view.device) if self.trains_beside else None

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        rate = masking_rate(window.clock.step, window.clock.total, self.max_rate, self.warmup_share)
        words = allowed_ids(probe.view.embedding.num_embeddings, _special(probe.view))
        micro = [self._noisy(b, window.clock, rate, words) for b in window.micro]
        return window.with_micro(micro), count(micro)

    def _noisy(self, batch: Batch, clock: Clock, rate: float, words: np.ndarray) -> Batch:
        """The batch with replaced inputs, and the columns "masked" (all of them) and "vector" (those without a word)."""
        part, streams = solution(batch), Streams(self.seed)
        _refuse_whole(batch, part)
        masked, ids = torch.zeros_like(part), batch.ids.clone()
        vector = torch.zeros_like(part)
        for s, key in enumerate(batch.keys):
            at = (part & (batch.seq == s)).nonzero().squeeze(1)
            generator = streams.at("masked-thought", clock.step, key)
            hidden = torch.from_numpy(generator.random(len(at)) < rate).to(at.device)
            chosen = at[hidden]
            word = torch.from_numpy(generator.random(len(chosen)) < self.random_share).to(at.device)
            drawn = torch.from_numpy(words[generator.integers(len(words), size=len(chosen))]).to(at.device)
            masked[chosen] = True
            vector[chosen] = ~word
            ids[chosen] = torch.where(word, drawn, ids[chosen])
        labels = batch.labels
        if self.loss_on == "clean":
            labels = labels.clone()
            labels[masked.nonzero().squeeze(1) - 1] = IGNORE
        return replace(batch, ids=ids, labels=labels).with_columns(token={"masked": masked, "vector": vector})

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        hidden, extra = fwd.batch.token["vector"], fwd.extra
        if not isinstance(extra, Vector):
            return {"loss": Term(weighed(fwd.nll(), fwd.batch).sum(), "tokens")}
        if not bool(hidden.any()):  # every rank's backward reaches the vector
            return {"loss": Term(weighed(fwd.nll(), fwd.batch).sum() + 0.0 * extra.vector.sum(), "tokens")}
        plain = fwd.view.embedding(fwd.batch.ids)  # [T, D]
        embeds = torch.where(hidden[:, None], extra.vector.to(plain.dtype), plain)
        return {"loss": Term(weighed(fwd.nll(fwd.hidden(embeds=embeds)), fwd.batch).sum(), "tokens")}


def _refuse_whole(batch: Batch, part: Tensor) -> None:
    """Raises LuthierError for a row without a question: nothing would be left to reason from."""
    question = batch.token["prompt"].bool() if "prompt" in batch.token else ~part
    asked = torch.zeros(batch.num_sequences, device=part.device).index_add(0, batch.seq, question.float())
    # Without the column, only the predicted tokens are known; the first token is never predicted, and is no question.
    whole = (asked <= (0 if "prompt" in batch.token else 1)).nonzero().squeeze(1).tolist()
    if whole:
        raise LuthierError(
            f"masked-thought: row {batch.keys[whole[0]]} has no question, all of it is trained on; give prompt and completion"
        )


def _special(view: ModelView) -> set[int]:
    """Ids that stand for no text: special tokens, and rows of the embedding that no token has."""
    if view.tokenizer is not None:
        return special_ids(view.tokenizer) | set(range(len(view.tokenizer), view.embedding.num_embeddings))
    config = view.module.config.get_text_config()
    named = (getattr(config, n, None) for n in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return {i for n in named if n is not None for i in (n if isinstance(n, list) else [n])}
