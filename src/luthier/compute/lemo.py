"""LeMo (JENGA): whole blocks of uninformative tokens skip the attention of a layer while training on long contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.compute.base import Compute
from luthier.method import Facts, Problem, Source, Traits
from luthier.model.additions import is_packed
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError


def block_scores(q: Tensor, k: Tensor, size: int, causal: bool = True, symmetrise: bool = True) -> Tensor:
    """[n, n] float32: the largest positive attention score between two blocks of `size` tokens.

    q [H, L, d], k [H_kv, L, d]. S_ij = mean over heads of max(q_i k_j / sqrt d, 0), zero where j > i; the score of a
    pair of blocks is its maximum. With `symmetrise` the lower triangle is mirrored, so that late blocks, which few
    queries follow, are not at a disadvantage. Never holds [L, L].
    """
    heads, length, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[0], 0).float()
    n = -(-length // size)
    out = torch.zeros(n, n, device=q.device)
    for m in range(n):
        rows = slice(m * size, min((m + 1) * size, length))
        reach = rows.stop if causal else length  # later keys score 0
        s = torch.relu(q[:, rows].float() @ k[:, :reach].transpose(1, 2) * dim**-0.5).mean(0)  # [rows, reach]
        if causal:
            i = torch.arange(rows.start, rows.stop, device=q.device)
            s = s.masked_fill(torch.arange(reach, device=q.device)[None, :] > i[:, None], 0.0)
        best = nn.functional.pad(s.amax(0), (0, -reach % size))  # [reach], filled up with the least score there is
        out[m, : len(best) // size] = best.view(-1, size).amax(1)
    return torch.tril(out) + torch.tril(out, -1).T if causal and symmetrise else out


def kept_blocks(scores: Tensor, count: int, keep_first: bool = True) -> Tensor:
    """[count] sorted block indices with the largest column sums; block 0 takes the place of the last of them."""
    total = scores.sum(0)
    order = total.argsort(descending=True, stable=True)[:count]
    if keep_first and 0 not in order:
        order = torch.cat([order[:-1], order.new_zeros(1)])
    return order.sort().values


def tokens_of(blocks: Tensor, size: int, length: int) -> Tensor:
    """Token indices of blocks within a sequence of this length."""
    index = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).reshape(-1)
    return index[index < length]


def layer_keep(layer: int, num_layers: int, keep_fraction: float) -> float:
    """Dense below floor(L / 2) - 1 and in the last layer; `keep_fraction` between."""
    return 1.0 if layer < num_layers // 2 - 1 or layer == num_layers - 1 else keep_fraction


class _PrunedMlp(torch.autograd.Function):
    """silu(x Wg^T) * (x Wu^T) Wd^T, exact forward; the backward only knows the neurons with the largest activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor, keep: int) -> Tensor:
        gate, up = x @ gate_w.T, x @ up_w.T
        act = nn.functional.silu(gate)
        flat_act, flat_up = act.reshape(-1, act.shape[-1]), up.reshape(-1, up.shape[-1])
        score = flat_act.float().norm(dim=0) + flat_up.float().norm(dim=0)
        neurons = score.topk(keep).indices.sort().values
        ctx.save_for_backward(gate[..., neurons], up[..., neurons], act[..., neurons], neurons, gate_w, up_w, down_w)
        return (act * up) @ down_w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, act, neurons, gate_w, up_w, down_w = ctx.saved_tensors
        inner = grads[0] @ down_w[:, neurons]
        sigma = gate.sigmoid()
        g_gate = inner * up * sigma * (1 + gate * (1 - sigma))
        return g_gate @ gate_w[neurons] + (inner * act) @ up_w[neurons], None, None, None, None


def pruned_mlp(x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor, keep: int) -> Tensor:
    """[..., D] -> [..., D]; weights frozen, `keep` neurons in the backward."""
    return _PrunedMlp.apply(x, gate_w, up_w, down_w, keep)


@dataclass
class LemoState:
    """What was kept: layer -> token indices of the flat batch."""

    kept: dict[int, Tensor] = field(default_factory=dict)


class Lemo(Compute):
    """In the upper layers only the most attended blocks of tokens take part in attention; which, each layer decides.

    A token left out keeps its residual stream, passes every MLP, and may come back in the next layer. Positions stay
    the original ones. Evaluation and generation are dense.
    Scores come from the exact block scorer (the source trains a predictor for very long contexts). Blocks lie within
    a sequence, so packed sequences never share one; a sequence of fewer than two blocks stays whole.
    Cost: attention's projections shrink to keep_fraction, its scores to the square; scoring adds two projections
    without gradient.
    Refuses: the padded layout; trained MLP weights together with mlp_prune_fraction.
    """

    traits: ClassVar[Traits] = Traits(
        tasks=frozenset({"causal-lm"}), layouts=frozenset({"flat"}), needs=frozenset({"frozen_mlp"})
    )
    source: ClassVar[Source] = Source(
        "JENGA: Enhancing LLM Long-Context Fine-tuning with Contextual Token Sparsity",
        2025,
        "arXiv:2501.09767",
        "eq. 1-2",
    )

    keep_fraction: float = Field(0.5, gt=0, le=1)
    """Share of blocks kept in a sparse layer (rho)."""
    block_size: int = Field(16, ge=1)
    """Tokens in a block; 64 for contexts above 2048."""
    keep_first_block: bool = True
    """Always keep the first block, where attention sinks sit."""
    symmetrise: bool = True
    """Mirror the causal scores, so that late blocks are not at a disadvantage."""
    mlp_prune_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of MLP neurons left out of the backward (p); 0 is exact."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        # Tuners with targets may leave the MLP alone: what they took is seen when they are attached.
        trains_mlp = [m.key() for m in facts.others if "weight" in m.traits.claims and not hasattr(m, "targets")]
        if self.mlp_prune_fraction and trains_mlp:
            problems.append(
                Problem(
                    "mlp_prune_fraction",
                    f"its backward has no weight gradients, and {trains_mlp[0]} trains MLP weights",
                    "set it to 0",
                )
            )
        return problems

    @contextmanager
    def patch(self, view: ModelView, phase: str) -> Iterator[LemoState]:
        state, undo = LemoState(), []
        if phase == "train" and (self.keep_fraction < 1 or self.mlp_prune_fraction):
            if view.layout != "flat":
                raise LuthierError(
                    f"compute.lemo: {view.name} needs the padded layout, where blocks of tokens cannot be left out"
                )
            for layer in range(len(view.anatomy.blocks)):
                undo += self._patch_layer(view, layer, state)
        try:
            yield state
        finally:
            for module in undo:
                del module.forward

    def _patch_layer(self, view: ModelView, layer: int, state: LemoState) -> list[nn.Module]:
        patched: list[nn.Module] = []
        keep = layer_keep(layer, len(view.anatomy.blocks), self.keep_fraction)
        attention, mlp = _parts(view, layer)
        if keep < 1:
            attention.forward = partial(self._attend, attention, attention.forward, view, layer, keep, state)
            patched.append(attention)
        if self.mlp_prune_fraction:
            weights = [getattr(mlp, n).weight for n in ("gate_proj", "up_proj", "down_proj")]
            if any(w.requires_grad or is_packed(w) for w in weights) or any(
                "forward" in m.__dict__ for m in mlp.modules()
            ):
                raise LuthierError(
                    "compute.lemo.mlp_prune_fraction: something in the MLP is trained or quantised; set it to 0"
                )
            count = max(1, int(weights[0].shape[0] * (1 - self.mlp_prune_fraction)))
            mlp.forward = partial(pruned_mlp, gate_w=weights[0], up_w=weights[1], down_w=weights[2], keep=count)
            patched.append(mlp)
        return patched

    def _attend(
        self, module: nn.Module, plain: Callable[..., tuple], view: ModelView, layer: int, keep: float, state: LemoState,
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
    ) -> tuple:  # fmt: skip
        """The layer's own attention over the kept tokens only; zeros for the others."""
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("lemo is on while training only: generate and evaluate outside it")
        assert position_embeddings is not None
        lengths = kwargs.pop("sequence_lengths")
        index, short = self.choose(module, hidden_states, lengths, keep)
        state.kept[layer] = index
        kwargs["position_ids"] = kwargs["position_ids"][:, index] if kwargs.get("position_ids") is not None else None
        cos, sin = (p[:, index] for p in position_embeddings)  # [1, T, d] -> [1, K, d], original positions
        out = plain(hidden_states[:, index], position_embeddings=(cos, sin), sequence_lengths=short, **kwargs)
        full = torch.zeros_like(hidden_states).index_copy(1, index, out[0])
        return full, out[1]

    @torch.no_grad()
    def choose(
        self, module: nn.Module, hidden: Tensor, lengths: tuple[int, ...], keep: float
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(token indices [K] of the flat batch, kept lengths by sequence); hidden [1, T, D]."""
        dim = module.head_dim
        q = module.q_proj(hidden)[0].unflatten(-1, (-1, dim)).transpose(0, 1)  # type: ignore[operator]  # [H, T, d]
        k = module.k_proj(hidden)[0].unflatten(-1, (-1, dim)).transpose(0, 1)  # type: ignore[operator]
        kept, short, start = [], [], 0
        for length in lengths:
            n = -(-length // self.block_size)
            part = slice(start, start + length)
            if n < 2:
                index = torch.arange(length, device=hidden.device)
            else:
                scores = block_scores(q[:, part], k[:, part], self.block_size, symmetrise=self.symmetrise)
                blocks = kept_blocks(scores, max(1, int(n * keep)), self.keep_first_block)
                index = tokens_of(blocks, self.block_size, length)
            kept.append(index + start)
            short.append(len(index))
            start += length
        return torch.cat(kept), tuple(short)


def _parts(view: ModelView, layer: int) -> tuple[nn.Module, nn.Module]:
    """(attention, MLP) of a block of separate q, k, v and a gated MLP."""
    roles = {x.role: x.module for x in view.anatomy.block_linears if x.block == layer}
    if not {"q", "k", "v", "o", "gate", "up", "down"} <= roles.keys():
        raise LuthierError(f"compute.lemo: {view.name} has no separate q, k, v and gated MLP in block {layer}")
    return (view.module.get_submodule(roles[r].rpartition(".")[0]) for r in ("q", "gate"))  # type: ignore[return-value]
