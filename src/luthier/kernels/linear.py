"""Linear layers with trained parts: a low-rank addition, or a few of their own entries.

Each function computes y = x W_eff^T + b and hand-writes its backward, because autograd would keep copies that are not
needed: casts of float32 masters, or a dense gradient of a frozen weight. Weights are [out, in] here; a transposed
layer (GPT-2's Conv1D) passes weight.T, a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.plain import is_plain


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """[T, out] -> [..., out] like x [..., in]. Not as a view, which a model could not write into (Falcon's rotary code does)."""
    shaped: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))
    return shaped


class _LowRank(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T; W frozen, A and B float32 masters computed with in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        low = flat @ a.to(x.dtype).T  # [T, R]
        # The small term first: the large product then adds to it before the only rounding. In the other order, the result is
        # rounded already, and rounding again would remove most of the term of a new adapter.
        out = (low * scale) @ b.to(x.dtype).T  # [T, out]
        out.addmm_(flat, weight.T)
        if bias is not None:
            out += bias
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return _shaped(out, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        g = grads[0].reshape(-1, weight.shape[0])  # [T, out]
        g_low = g @ b.to(g.dtype)  # [T, R]
        grad_a = (g_low.T @ flat).float().mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        # (low^T g)^T: the thin matrix first is nearly twice as fast.
        grad_b = (low.T @ g).T.float().mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ((g_low * ctx.scale) @ a.to(g.dtype)).addmm_(g, weight).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[..., in] -> [..., out]; a [R, in], b [out, R] float32 masters.

    The hand-written backward has no gradient of weight [out, in] and bias: if these train, autograd does all of it.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        low = scale * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T  # first, for the one rounding
        out = torch.addmm(low.view(-1, low.shape[-1]), x.reshape(-1, x.shape[-1]), weight.T).view_as(low)
        return out if bias is None else out + bias
    if is_plain():
        return F.linear(x, weight, bias) + scale * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    apply: Callable[..., Tensor] = _LowRank.apply
    return apply(x, weight, bias, a, b, scale)


class _Sparse(torch.autograd.Function):
    """x W^T + b, where W already holds the trained entries. The backward pass returns only their gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor,
        observe: Callable[[Tensor], None] | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        out = torch.addmm(bias, flat, weight.T) if bias is not None else flat @ weight.T
        ctx.save_for_backward(x, weight, indices)
        ctx.observe = observe
        return _shaped(out, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])  # [T, out]
        grad_values = None
        if ctx.needs_input_grad[3]:
            dense = g.T @ x.reshape(-1, x.shape[-1])  # [out, in], alive only here
            if ctx.observe is not None:
                ctx.observe(dense)
            grad_values = dense.reshape(-1)[indices].float()
        grad_x = (g @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_values, None, None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """[..., in] -> [..., out] with `values` [K] float32 trained at the flat row-major `indices` [K] of weight [out, in].

    The caller keeps `weight` equal to base + scatter(values); this function only routes the gradient.
    observe  called in the backward with the dense gradient [out, in], which is freed right after
    """
    apply: Callable[..., Tensor] = _Sparse.apply
    return apply(x, weight, bias, values, indices, observe)


def folded(weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
    """((I + B A) W, (I + B A) b): the adapter inside the projection. weight [out, in], a [R, out], b [out, R]."""
    return weight + b @ (a @ weight), None if bias is None else bias + b @ (a @ bias)


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> bf16 so that the expected value is kept; other dtypes round to nearest.

    Rounding to nearest loses every change below half a step, and with it most of the training at a small learning rate.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
