"""The output head on supervised rows only, in chunks: logits for all tokens never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.kernels.plain import is_plain

CHUNK = 128  # rows; measured: half the time of one piece on a CPU, and the [chunk, V] block stays in cache reach
CPU_ROWS = 32  # of a chunk whose softmax is taken at a time; measured: 136 ms, by 8 169, the whole chunk 145


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
        eager = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        grad = torch.empty_like(hidden) if eager else None
        scale = torch.ones(len(labels), device=hidden.device) if eager else None
        block, wide = _blocks(hidden, weight)
        pieces = []
        for start in range(0, len(labels), CHUNK):
            s = slice(start, start + CHUNK)
            z = _product(hidden[s], weight, block)  # [n, V]
            pieces.append(_losses(z, labels[s], wide, None if scale is None else scale[s]))
            if grad is not None:
                grad[s] = z.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(hidden, weight, labels)
        return torch.cat(pieces) if pieces else wide.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # [N]
        if len(ctx.saved_tensors) == 1:
            (grad,) = ctx.saved_tensors
            return grad * g[:, None].to(grad.dtype), None, None
        hidden, weight, labels = ctx.saved_tensors
        gh = torch.empty_like(hidden)
        gw = torch.zeros_like(weight, dtype=torch.float32)
        block, wide = _blocks(hidden, weight)
        for start in range(0, len(labels), CHUNK):
            s = slice(start, start + CHUNK)
            z = _product(hidden[s], weight, block)
            _losses(z, labels[s], wide, g[s])
            d = z.to(weight.dtype)  # [n, V]
            gh[s] = d @ weight
            gw += (d.T @ hidden[s]).float()
        return gh, gw.to(weight.dtype), None


def _blocks(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, V] for the logits of a chunk, and [rows, V] float32 where a few rows of them at a time are worked on.

    All chunks use the same memory. New blocks for each chunk left holes of up to 25 MB in the heap, which smaller tensors
    then used (290 of 1,170 MB when a 135M model scores 2,400 rows), and took a third more time.
    """
    rows = CPU_ROWS if weight.device.type == "cpu" else CHUNK
    wide = torch.empty(rows, len(weight), dtype=torch.float32, device=weight.device)
    return hidden.new_empty(min(CHUNK, len(hidden)), len(weight)), wide


def _product(hidden: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """[n, D] x [V, D] -> [n, V], in the block, except where autocast chooses what it is computed in."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden @ weight.T
    return torch.mm(hidden, weight.T, out=block[: len(hidden)])


def _losses(z: Tensor, labels: Tensor, wide: Tensor, scale: Tensor | None = None) -> Tensor:
    """Logits [n, V], labels [n] -> [n] float32 nats; z is overwritten, with a scale [n] by scale * (softmax(z) - onehot)."""
    nll = wide.new_empty(len(labels))
    for start in range(0, len(labels), len(wide)):
        s = slice(start, start + len(wide))
        y = labels[s, None]
        f = z[s] if z.dtype == wide.dtype else wide[: len(y)].copy_(z[s])
        right, top = f.gather(1, y), f.amax(-1, keepdim=True)
        total = f.sub_(top).exp_().sum(-1, keepdim=True)
        nll[s] = (total.log() + (top - right)).squeeze(1)
        if scale is not None:
            z[s] = f.mul_(scale[s, None] / total).scatter_add_(1, y, -scale[s, None])
    return nll


def token_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[N, D], [V, D], [N] -> [N] float32 nats.

    transform  what the model does to its logits (soft cap, scale); with it, or a bias, chunks are recomputed in the
               backward instead
    """
    if bias is None and transform is None and not is_plain():
        apply: Callable[..., Tensor] = _ChunkedNll.apply
        return apply(hidden.to(weight.dtype), weight, labels)  # autocast hands on two dtypes

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(_logits(h, weight, bias, transform), y, reduction="none")

    if is_plain() or not torch.is_grad_enabled():
        pieces = [chunk(h, y) for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)]
    else:
        pieces = [
            checkpoint(chunk, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
    return torch.cat(pieces)


def recomputes(weight: Tensor, bias: Tensor | None, transform: Callable[[Tensor], Tensor] | None) -> bool:
    """True if `token_nll` computes the logits again in its backward pass."""
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
