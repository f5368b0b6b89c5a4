"""Attention over sequences laid end to end: each sees itself only, nothing is padded.

Registered with transformers as `luthier`. Short sequences on a CPU take a custom autograd function over batched matrix
products (the fused bf16 kernel's backward is slow there), others the fused kernel once a sequence; inside
`plain_operations` it is made of ordinary ones.
The lengths travel as a keyword argument of the model call; no mask tensor is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.model.plain import is_plain

SHORT = 384  # tokens; above this the [H, L, L] probabilities kept for the backward cost more than they save


def _groups(query: Tensor, num_kv_heads: int) -> Tensor:
    """[1, H, L, d] -> [H_kv, G*L, d]: query heads that share a key head sit in one matrix product."""
    _, heads, length, dim = query.shape
    return query.reshape(num_kv_heads, heads // num_kv_heads * length, dim)


def _blocked(length: int, groups: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """[G*L, L] bool, True where a query may not look; None where all may."""
    if not causal and window is None:
        return None
    i = torch.arange(length, device=device)
    away = i[:, None] - i[None, :]  # [L, L]
    blocked = away < 0 if causal else torch.zeros_like(away, dtype=torch.bool)
    if window is not None:
        blocked = blocked | (away.abs() >= window)
    return blocked.repeat(groups, 1)


def _probabilities(q: Tensor, k: Tensor, scale: float, blocked: Tensor | None) -> Tensor:
    """[H_kv, G*L, d] x [H_kv, L, d] -> [H_kv, G*L, L], softmax taken in float32."""
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
    if blocked is not None:
        scores.masked_fill_(blocked, float("-inf"))
    return scores.softmax(-1).to(q.dtype)


class _ShortAttention(torch.autograd.Function):
    """Per-sequence attention that keeps its probabilities; [1, H, T, d] in and out."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        scale: float,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        num_kv, out, kept, masks = key.shape[1], torch.empty_like(query), [], {}
        groups, start = query.shape[1] // num_kv, 0
        for length in lengths:
            part = slice(start, start + length)
            if length not in masks:
                masks[length] = _blocked(length, groups, causal, window, query.device)
            p = _probabilities(_groups(query[:, :, part], num_kv), key[0, :, part], scale, masks[length])
            out[:, :, part] = torch.bmm(p, value[0, :, part]).view(1, query.shape[1], length, -1)
            kept.append(p)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, *kept = ctx.saved_tensors
        num_kv, start = key.shape[1], 0
        gq, gk, gv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for length, p in zip(ctx.lengths, kept, strict=True):
            part = slice(start, start + length)
            g = _groups(grad[:, :, part], num_kv)  # [H_kv, G*L, d]
            gv[0, :, part] = torch.bmm(p.transpose(1, 2), g)
            gp = torch.bmm(g, value[0, :, part].transpose(1, 2)).float()  # [H_kv, G*L, L]
            pf = p.float()
            gs = gp.sub_((gp * pf).sum(-1, keepdim=True)).mul_(pf).mul_(ctx.scale).to(query.dtype)
            gq[:, :, part] = torch.bmm(gs, key[0, :, part]).view(1, query.shape[1], length, -1)
            gk[0, :, part] = torch.bmm(gs.transpose(1, 2), _groups(query[:, :, part], num_kv))
            start += length
        return gq, gk, gv, None, None, None, None


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, dropout: float) -> Tensor:
    """One sequence through torch's fused kernel; [1, H, L, d]."""
    blocked = None if window is None else _blocked(q.shape[2], 1, causal, window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if blocked is None else ~blocked, dropout_p=dropout, scale=scale,
        is_causal=causal and blocked is None, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, dropout: float) -> Tensor:
    """One sequence from ordinary operations; [1, H, L, d]."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)).float() * scale
    blocked = _blocked(length, 1, causal, window, q.device)
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    return F.dropout(scores.softmax(-1).to(q.dtype), dropout) @ v


def flat_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, sequence_lengths: tuple[int, ...] | None = None,
    is_causal: bool | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over one flat row: [1, H, T, d] -> [1, T, H, d].

    Raises ValueError where the model did not hand on `sequence_lengths`: the layout probe then chooses padding.
    """
    if sequence_lengths is None:
        raise ValueError("this model does not hand keyword arguments on to its attention function")
    if softcap is not None:
        raise ValueError("attention soft caps are not supported in the flat layout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = sliding_window if sliding_window is not None and max(sequence_lengths) > sliding_window else None
    short = max(sequence_lengths) <= SHORT and query.device.type == "cpu" and dropout == 0.0
    if short and not is_plain():
        out = _ShortAttention.apply(query, key, value, sequence_lengths, scale, causal, window)
        return out.transpose(1, 2).contiguous(), None
    one = _plain if is_plain() else _fused
    parts = zip(*(x.split(sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
    out = torch.cat([one(q, k, v, scale, causal, window, dropout) for q, k, v in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("luthier", flat_attention)
