"""The output head on supervised rows only, in chunks: logits for all tokens never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.model.plain import is_plain

CHUNK = 128  # rows; measured: half the time of one piece on a CPU, and the [chunk, V] block stays in cache reach


class TokenScores(NamedTuple):
    """Per supervised row, float32: loss in nats and the predictive entropy in nats."""

    nll: Tensor  # [N]
    entropy: Tensor  # [N]


class _ChunkedNll(torch.autograd.Function):
    """Cross-entropy of a linear head, [N, D] x [V, D] -> [N], without keeping logits.

    For a frozen head the gradient of each row's loss, (p - onehot) W, is taken in the forward pass while the logits are
    at hand, and the backward only scales it. A trained head needs the incoming gradient first, so it computes again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        eager = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        grad = torch.empty_like(hidden) if eager else None
        for start in range(0, len(labels), CHUNK):
            s = slice(start, start + CHUNK)
            log_p = (hidden[s] @ weight.T).float().log_softmax(-1)  # [n, V]
            nll[s] = -log_p.gather(1, labels[s, None]).squeeze(1)
            if grad is not None:
                grad[s] = _minus_onehot(log_p.exp_(), labels[s]).to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(hidden, weight, labels)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # [N]
        if len(ctx.saved_tensors) == 1:
            (grad,) = ctx.saved_tensors
            return grad * g[:, None].to(grad.dtype), None, None
        hidden, weight, labels = ctx.saved_tensors
        gh = torch.empty_like(hidden)
        gw = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(labels), CHUNK):
            s = slice(start, start + CHUNK)
            p = (hidden[s] @ weight.T).float().softmax(-1)
            d = (_minus_onehot(p, labels[s]) * g[s, None]).to(weight.dtype)  # [n, V]
            gh[s] = d @ weight
            gw += (d.T @ hidden[s]).float()
        return gh, gw.to(weight.dtype), None


def _minus_onehot(p: Tensor, labels: Tensor) -> Tensor:
    p[torch.arange(len(labels), device=p.device), labels] -= 1
    return p


def token_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[N, D], [V, D], [N] -> [N] float32 nats.

    transform  what the model does to its logits (soft cap, scale); with it, or a bias, chunks are recomputed in the
               backward instead
    """
    if bias is None and transform is None and not is_plain():
        return _ChunkedNll.apply(hidden, weight, labels)

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(_logits(h, weight, bias, transform), y, reduction="none")

    if is_plain() or not torch.is_grad_enabled():
        pieces = [chunk(h, y) for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)]
    else:
        pieces = [
            checkpoint(chunk, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
    return torch.cat(pieces) if pieces else hidden.sum(-1).float()


def recomputes(weight: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor] | None) -> bool:
    """True where `token_nll` takes the logits a second time in its backward."""
    if is_plain():
        return False
    return bias is not None or transform is not None or weight.requires_grad


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits = F.linear(h, weight, bias).float()
    return logits if transform is None else transform(logits)


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> TokenScores:  # fmt: skip
    """Loss and entropy of every row in one pass over the head, without a gradient."""
    nll, entropy = (
        hidden.new_empty(len(labels), dtype=torch.float32),
        hidden.new_empty(len(labels), dtype=torch.float32),
    )
    start = 0
    for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        log_p = _logits(h, weight, bias, transform).log_softmax(-1)
        part = slice(start, start + len(y))
        nll[part] = -log_p.gather(1, y[:, None]).squeeze(1)
        entropy[part] = torch.special.entr(log_p.exp()).sum(-1)
        start += len(y)
    return TokenScores(nll, entropy)
