"""Attention over sequences laid end to end: each sees itself only, nothing is padded.

Registered with transformers as `luthier`. Short sequences that are trained on a CPU take a custom autograd function over
batched matrix products (the fused bf16 kernel's backward is slow there), half precision on a GPU torch's variable-length
kernel, others the fused kernel once a sequence: without a backward it is up to twice as fast as the products, in bf16 two
to six times. Inside `plain_operations` it is made of ordinary ones.
The lengths travel as a keyword argument of the model call; no mask tensor is ever built.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.kernels.plain import is_plain
from luthier.model import meter as meters

VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
VARLEN_KEYS = {"scale", "window_size"}  # which the first versions of that kernel did not take
SHORT = 384  # tokens; above this the [H, L, L] probabilities kept for the backward cost more than they save


class _Bins(NamedTuple):
    """Sequences of similar length side by side, so that each layer makes a few large products instead of many small.

    source   [S, L] position in the flat row of every token; padding points at position 0
    valid    [S, L] bool, False for padding
    where    positions of the real tokens in the padded rectangle, in the flat order of this bin
    tokens   the flat positions of this bin, in the same order
    blocked  [S, 1, L, L] or [1, 1, L, L] bool, True where a query may not look
    """

    source: Tensor
    valid: Tensor
    where: Tensor
    tokens: Tensor
    blocked: Tensor


@lru_cache(maxsize=4)  # of a forward, for its layers and their backward; more would leave holes in the heap
def _bins(lengths: tuple[int, ...], causal: bool, window: int | None, device: torch.device) -> tuple[_Bins, ...]:
    """Cut a flat row into bins whose padding wastes at most half of the scores."""
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] ** 2 * 2 >= lengths[groups[-1][0]] ** 2:
            groups[-1].append(i)
        else:
            groups.append([i])
    return tuple(_one_bin([(starts[i], lengths[i]) for i in group], causal, window, device) for group in groups)


def _one_bin(pieces: list[tuple[int, int]], causal: bool, window: int | None, device: torch.device) -> _Bins:
    width = max(n for _, n in pieces)
    start = torch.tensor([s for s, _ in pieces], device=device)[:, None]
    length = torch.tensor([n for _, n in pieces], device=device)[:, None]
    column = torch.arange(width, device=device)[None, :]
    valid = column < length  # [S, L]
    index = torch.where(valid, start + column, 0)
    away = column.T - column  # [L, L]
    blocked = away < 0 if causal else torch.zeros_like(away, dtype=torch.bool)
    if window is not None:
        blocked = blocked | (away.abs() >= window)
    # Padding keys are hidden from real queries; a padding query sees its own place, so that no row is all blocked.
    blocked = (blocked[None] | ~valid[:, None, :]) & ~torch.eye(width, dtype=torch.bool, device=device)
    where = valid.reshape(-1).nonzero().squeeze(1)
    return _Bins(index, valid, where, index.reshape(-1)[where], blocked[:, None])


def _gathered(x: Tensor, bins: _Bins, groups: int) -> Tensor:
    """[1, H, T, d] -> [S * H / groups, groups * L, d]: heads that share a key head sit in one product."""
    s, width = bins.source.shape
    heads, dim = x.shape[1], x.shape[3]
    rows = x[0].transpose(0, 1).index_select(0, bins.source.reshape(-1))  # [S * L, H, d]
    return rows.view(s, width, heads, dim).transpose(1, 2).reshape(s * heads // groups, groups * width, dim)


def _scattered(out: Tensor, x: Tensor, bins: _Bins) -> None:
    """[S * H / groups, groups * L, d] into the flat out [T, H, d]."""
    s, width = bins.source.shape
    heads, dim = out.shape[1], out.shape[2]
    rows = x.view(s, heads, width, dim).transpose(1, 2).reshape(s * width, heads, dim)
    out.index_copy_(0, bins.tokens, rows.index_select(0, bins.where))


def _probabilities(q: Tensor, k: Tensor, bins: _Bins) -> Tensor:
    """[S * H_kv, G * L, d] queries, scaled, and [S * H_kv, L, d] keys -> [S * H_kv, G * L, L] in their dtype.

    torch's softmax adds up in float32 whatever the dtype, so the scores are looked through once.
    """
    s, width = bins.source.shape
    scores = torch.bmm(q, k.transpose(1, 2))
    shaped = scores.view(s, -1, width, width)  # [S, H, L, L]
    return shaped.masked_fill_(bins.blocked, float("-inf")).softmax(-1).view_as(scores)


class _ShortAttention(torch.autograd.Function):
    """Attention of short sequences that keeps its probabilities; [1, H, T, d] in, [1, T, H, d_v] out."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, causal: bool,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, d_v]
        kept, ctx.bins = [], _bins(lengths, causal, window, query.device)
        for bins in ctx.bins:
            q, k, v = (_gathered(x, bins, g) for x, g in ((query, groups), (key, 1), (value, 1)))
            p = _probabilities(q * scale, k, bins)
            _scattered(out, torch.bmm(p, v), bins)
            kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.groups = scale, groups
        return out.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)  # [1, T, H, d] -> [1, H, T, d]
        gq, gk, gv = (x.new_empty(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))
        for bins, p in zip(ctx.bins, kept, strict=True):
            q, k, v = (_gathered(x, bins, g) for x, g in ((query, ctx.groups), (key, 1), (value, 1)))
            g = _gathered(grad, bins, ctx.groups) * _rows(bins, ctx.groups, query.shape[1])
            _scattered(gv, torch.bmm(p.transpose(1, 2), g), bins)
            gp = torch.bmm(g, v.transpose(1, 2))  # [S * H_kv, G * L, L]
            gs = torch.ops.aten._softmax_backward_data(gp, p, -1, p.dtype)
            _scattered(gq, torch.bmm(gs, k).mul_(ctx.scale), bins)
            _scattered(gk, torch.bmm(gs.transpose(1, 2), q * ctx.scale), bins)
        return (*(g.transpose(0, 1).unsqueeze(0) for g in (gq, gk, gv)), None, None, None, None)


def _rows(bins: _Bins, groups: int, heads: int) -> Tensor:
    """[S * H / groups, groups * L, 1]: 0 for padding queries, whose gathered gradient is another token's."""
    s, width = bins.source.shape
    return bins.valid[:, None, :].expand(s, heads, width).reshape(s * heads // groups, groups * width, 1)


def _blocked(x: Tensor, causal: bool, window: int | None, places: Tensor | None) -> Tensor | None:
    """[L, L] bool, True where a query of x [1, H, L, d] may not look; None where all may.

    places  [L] where the tokens stand, rising; None: one after another
    """
    if not causal and window is None:
        return None
    places = torch.arange(x.shape[2], device=x.device) if places is None else places
    away = places[:, None] - places[None, :]
    blocked = away < 0 if causal else torch.zeros_like(away, dtype=torch.bool)
    return blocked if window is None else blocked | (away.abs() >= window)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, dropout: float,
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One sequence through torch's fused kernel; [1, H, L, d]."""
    blocked = None if window is None else _blocked(q, causal, window, places)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if blocked is None else ~blocked, dropout_p=dropout, scale=scale,
        is_causal=causal and blocked is None, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def has_varlen(query: Tensor) -> bool:
    """True where torch has a kernel for sequences end to end: half precision on an NVIDIA GPU."""
    return VARLEN and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _varlen_keys() >= VARLEN_KEYS


@lru_cache(maxsize=1)
def _varlen_keys() -> frozenset[str]:
    """What the kernel of this version of torch can be asked for."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, causal: bool, window: int | None
) -> Tensor:
    """All sequences through one kernel; [1, H, T, d] -> [1, T, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=q.device)
    before = -1 if window is None else window - 1  # keys a query sees beside its own
    grouped: dict[str, Any] = {}
    if "enable_gqa" in _varlen_keys():
        grouped["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # as many key heads as query heads are wanted
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # [1, H, T, d] -> [T, H, d]
    out = varlen_attn(
        q, k, v, ends, ends, max(lengths), max(lengths), scale=scale, window_size=(before, 0 if causal else before), **grouped
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, dropout: float,
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One sequence from ordinary operations; [1, H, L, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)).float() * scale
    blocked = _blocked(q, causal, window, places)
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    return F.dropout(scores.softmax(-1).to(q.dtype), dropout) @ v


def flat_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, sequence_lengths: tuple[int, ...] | None = None,
    is_causal: bool | None = None, kept_places: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface over one flat row: [1, H, T, d] -> [1, T, H, d].

    kept_places  [T] where each token stood in its sequence before others were left out: windows count in these
    Raises ValueError where the model did not hand on `sequence_lengths`: the layout probe then chooses padding.
    """
    if sequence_lengths is None:
        raise ValueError("this model does not hand keyword arguments on to its attention function")
    if softcap is not None:
        raise ValueError("attention soft caps are not supported in the flat layout")
    if (meter := module.__dict__.get(meters.KEY)) is not None:
        meter.attention(query, key, value, sequence_lengths)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    longest = max(sequence_lengths)
    if sliding_window is not None and kept_places is not None:
        longest = int(kept_places.max()) + 1
    window = sliding_window if sliding_window is not None and longest > sliding_window else None
    places = kept_places if window is not None else None  # the kernels for many sequences at once take none
    short = max(sequence_lengths) <= SHORT and query.device.type == "cpu" and dropout == 0.0
    if short and torch.is_grad_enabled() and not is_plain() and places is None:
        apply: Callable[..., Tensor] = _ShortAttention.apply
        return apply(query, key, value, sequence_lengths, scale, causal, window), None
    if has_varlen(query) and dropout == 0.0 and not is_plain() and places is None:
        return _varlen(query, key, value, sequence_lengths, scale, causal, window), None
    one = _plain if is_plain() else _fused
    stand = [None] * len(sequence_lengths) if places is None else places.split(sequence_lengths)
    parts = zip(*(x.split(sequence_lengths, dim=2) for x in (query, key, value)), stand, strict=True)
    out = torch.cat([one(q, k, v, scale, causal, window, dropout, at) for q, k, v, at in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


# Not compiled: its loops follow the lengths of every batch, and each would be compiled anew.
AttentionInterface.register("luthier", torch.compiler.disable(flat_attention, recursive=True))
