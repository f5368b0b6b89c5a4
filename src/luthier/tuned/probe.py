"""Compare a model that was written with the one that it was made from, by their logits for one sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SENTENCE = "The quick brown fox jumps over it."
# Largest accepted difference of logits, relative to their largest, between what was tuned and what was written.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


def probe_of(tokenizer: Any) -> Tensor:
    """The sentence as ids [1, T]."""
    return torch.tensor([tokenizer(SENTENCE)["input_ids"]])


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits, float32 on the CPU."""
    model.eval()
    found: Tensor = model(input_ids=ids.to(next(model.parameters()).device)).logits
    return found.float().cpu()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest logit of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))
