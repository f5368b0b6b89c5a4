"""Greedy answers in batches, from the same prompt ids that training saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.model.view import ModelView
from luthier.step.lab import Completion
from luthier.support.rng import Streams


@contextmanager
def _quick_head(view: ModelView) -> Iterator[None]:
    """Let the head want a gradient while generating under no_grad.

    Where no weight wants one, the sliced hidden state sends the head through a batched product that copies its weight
    once a row: six times slower and seven times larger, measured.
    """
    weight = view.head_weight
    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        yield
    finally:
        weight.requires_grad_(before)


def left_padded(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [S, L]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[fill] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def generate(
    view: ModelView,
    prompts: Sequence[Sequence[int]],
    renderer: Renderer,
    max_new_tokens: int,
    batch_size: int = 25,
    tick: Tick = no_tick,
    chooser: Callable[[list[int]], LogitsProcessor] | None = None,
) -> list[Completion]:
    """Greedy completions of tokenised prompts, in their order; longest first inside, so that batches are even.

    chooser  for the prompts of a batch, by position: what is done to their logits before the largest is taken
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Completion] = {}
    training = view.module.training
    view.module.eval()
    fill, stops = renderer.tokenizer.pad_token_id or 0, list(renderer.stop_ids)
    try:
        with _quick_head(view):
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                tick("answering", start, f"prompts {start + 1} to {start + len(part)}")
                ids, mask = left_padded([prompts[i] for i in part], fill)
                out = view.module.generate(  # type: ignore[operator]
                    input_ids=ids.to(view.device), attention_mask=mask.to(view.device), max_new_tokens=max_new_tokens,
                    do_sample=False, use_cache=True, pad_token_id=fill, eos_token_id=stops,
                    temperature=None, top_p=None, top_k=None,
                    logits_processor=None if chooser is None else LogitsProcessorList([chooser(part)]),
                )  # fmt: skip
                for i, tokens in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                    done[i] = _cut(tokens, stops, renderer)
    finally:
        view.module.train(training)
    return [done[i] for i in range(len(prompts))]


class Keyed(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature, so that taking the largest draws from the softmax; one generator a row,
    so that neither batches nor order change what a row draws."""

    def __init__(self, generators: Sequence[torch.Generator], temperature: float) -> None:
        self.generators, self.temperature = generators, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.rand(scores.shape[1], generator=g, device=g.device) for g in self.generators]
        uniform = torch.stack(draws).to(scores.device).clamp_(1e-20, 1 - 1e-7)  # [S, V]
        return scores.float() / self.temperature - (-uniform.log()).log()


def sampled(
    view: ModelView, prompts: Sequence[Sequence[int]], renderer: Renderer, max_new_tokens: int, count: int, temperature: float,
    streams: Streams, keys: Sequence[str], tick: Tick = no_tick,
) -> list[list[str]]:  # fmt: skip
    """`count` drawn answers to each prompt."""
    several = [p for p in prompts for _ in range(count)]
    names = [(key, i) for key in keys for i in range(count)]

    def chooser(part: list[int]) -> LogitsProcessor:
        return Keyed([streams.torch("sample", *names[i]) for i in part], temperature)

    out = [c.text for c in generate(view, several, renderer, max_new_tokens, tick=tick, chooser=chooser)]
    return [out[i : i + count] for i in range(0, len(out), count)]


def _cut(tokens: list[int], stops: list[int], renderer: Renderer) -> Completion:
    end = next((i for i, t in enumerate(tokens) if t in stops), None)
    text = renderer.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Completion(text, end is not None, len(tokens) if end is None else end)


@dataclass(frozen=True)
class Generation:
    """Greedy answers in batches: a lab's `Generator`."""

    renderer: Renderer
    tick: Tick = no_tick

    def __call__(self, view: ModelView, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        return generate(view, prompts, self.renderer, max_new_tokens, tick=self.tick)
