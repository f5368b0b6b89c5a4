"""LeMo (JENGA): whole blocks of uninformative tokens skip the attention of a layer while training on long contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.compute.base import Compute
from luthier.method import Facts, Problem, Source, Traits
from luthier.model.additions import is_packed
from luthier.model.anatomy import Anatomy
from luthier.model.blocks import Attention, GatedMlp, Unknown, queries_and_keys
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError


def block_scores(
    q: Tensor, k: Tensor, size: int, causal: bool = True, symmetrise: bool = True, window: int | None = None
) -> Tensor:
    """[n, n] float32: the largest attention score between two blocks of `size` tokens, at least 0.

    q [H, L, d], k [H_kv, L, d]. S_ij = mean over heads of max(q_i k_j / sqrt d, 0), zero where i does not see j: a later
    key, or one `window` or more tokens away; the score of a pair of blocks is its maximum. With `symmetrise` the lower
    triangle is mirrored, so that late blocks, which few queries follow, are not at a disadvantage. Never holds [L, L].
    """
    heads, length, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[0], 0).float()
    n = -(-length // size)
    out = torch.zeros(n, n, device=q.device)
    place = torch.arange(length, device=q.device)
    for m in range(n):
        rows = slice(m * size, min((m + 1) * size, length))
        reach = rows.stop if causal else length  # later keys score 0
        s = torch.relu(q[:, rows].float() @ k[:, :reach].transpose(1, 2) * dim**-0.5).mean(0)  # [rows, reach]
        away = place[rows, None] - place[None, :reach]
        if causal:
            s = s.masked_fill(away < 0, 0.0)
        if window is not None:
            s = s.masked_fill(away.abs() >= window, 0.0)
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
    """Share of blocks that a layer keeps: 1 below floor(L / 2) - 1 and in the last layer, `keep_fraction` between."""
    return 1.0 if layer < num_layers // 2 - 1 or layer == num_layers - 1 else keep_fraction


class Layers(NamedTuple):
    """The linear layers of a gated MLP."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


class _PrunedMlp(torch.autograd.Function):
    """down(activation(gate(x)) * up(x)), exact forward; the backward knows the neurons of the largest activations only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module, keep: int
    ) -> Tensor:
        gated, raised = gate(x), up(x)  # [..., I]
        act = activation(gated)
        score = act.flatten(0, -2).float().norm(dim=0) + raised.flatten(0, -2).float().norm(dim=0)  # [I]
        neurons = score.topk(keep).indices
        ctx.save_for_backward(gated[..., neurons], raised[..., neurons], neurons)
        ctx.weights, ctx.activation = (gate.weight, up.weight, down.weight), activation
        out: Tensor = down(act * raised)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gated, raised, neurons = ctx.saved_tensors
        gate, up, down = ctx.weights
        inner = grads[0] @ down[:, neurons]  # [..., D] -> [..., K]
        with torch.enable_grad():  # the activation's own slope, whatever it is
            z = gated.detach().requires_grad_()
            act = ctx.activation.forward(z)  # past its hooks: this is not a forward pass of the model
            (g_gate,) = torch.autograd.grad(act, z, inner * raised)
        return g_gate @ gate[neurons] + (inner * act) @ up[neurons], None, None, None, None, None


def pruned_mlp(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module, keep: int) -> Tensor:
    """[..., D] -> [..., D] through three frozen linear layers, with `keep` neurons in the backward.

    A neuron's weight in the choice is the length of its activations plus that of its up values, over all tokens.
    """
    apply: Callable[..., Tensor] = _PrunedMlp.apply
    return apply(x, gate, up, down, activation, keep)


@dataclass
class LemoState:
    """The tokens that were kept: layer -> token indices of the flat batch."""

    kept: dict[int, Tensor] = field(default_factory=dict)


class Lemo(Compute):
    """In the upper layers, only the most attended blocks of tokens take part in attention. Each layer chooses its own blocks.

    A token that is left out keeps its residual stream, passes every MLP, and may take part again in the next layer.
    Positions do not change. Evaluation and generation are dense.
    Scores come from the exact block scorer (the source trains a predictor for very long contexts), over the layer's own
    queries and keys: with the layer's norms and window, before rotary positions, like the targets of the source's
    predictor. Blocks lie within a sequence, so packed sequences never share one. A sequence of fewer than two blocks stays
    whole; a longer one keeps at least one block.
    Cost: attention's projections shrink to keep_fraction, its scores to the square of it; scoring adds two projections
    without gradient.
    Refuses: the padded layout; trained or quantised MLP weights together with mlp_prune_fraction; blocks whose attention
    (below keep_fraction 1) or MLP (above mlp_prune_fraction 0) is not known: fused projections, experts.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), layouts=frozenset({"flat"}))
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
    """Always keep the first block, which holds the attention sinks."""
    symmetrise: bool = True
    """Mirror the causal scores, so that late blocks, which few queries follow, have no disadvantage."""
    mlp_prune_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of MLP neurons left out of the backward pass (p); 0 is exact."""

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
        if self.mlp_prune_fraction and facts.quantized:
            problems.append(
                Problem("mlp_prune_fraction", "its backward reads weights, which quantize packs", "set it to 0")
            )
        return problems + ([] if facts.anatomy is None else self._not_known(facts.anatomy))

    def _not_known(self, anatomy: Anatomy) -> list[Problem]:
        """The first block whose attention, and the first whose MLP, would have to be known and is not."""
        found: dict[str, Problem] = {}
        for block in range(len(anatomy.blocks)):
            sparse = layer_keep(block, len(anatomy.blocks), self.keep_fraction) < 1
            asked = {
                "keep_fraction": ("attention", anatomy.attention(block) if sparse else None, 1),
                "mlp_prune_fraction": ("MLP", anatomy.gated_mlp(block) if self.mlp_prune_fraction else None, 0),
            }
            for key, (part, answer, neutral) in asked.items():
                if isinstance(answer, Unknown):
                    what = f"the {part} of block {block} is not known: {answer.why}"
                    found.setdefault(key, Problem(key, what, f"set it to {neutral}"))
        return list(found.values())

    @contextmanager
    def patch(self, view: ModelView, phase: str) -> Iterator[LemoState]:
        state = LemoState()
        with ExitStack() as undo:  # also after a refusal halfway
            if phase == "train" and (self.keep_fraction < 1 or self.mlp_prune_fraction):
                if view.layout != "flat":
                    raise LuthierError(
                        f"compute.lemo: {view.name} needs the padded layout, where blocks of tokens cannot be left out"
                    )
                for problem in self._not_known(view.anatomy):
                    raise LuthierError(f"compute.lemo.{problem.key}: {view.name}: {problem.what}; {problem.remedy}")
                for layer in range(len(view.anatomy.blocks)):
                    self._patch_layer(view, layer, state, undo)
            yield state

    def _patch_layer(self, view: ModelView, layer: int, state: LemoState, undo: ExitStack) -> None:
        keep = layer_keep(layer, len(view.anatomy.blocks), self.keep_fraction)
        if keep < 1:
            parts = view.anatomy.attention(layer)
            assert isinstance(parts, Attention)
            attention = view.module.get_submodule(parts.module)
            sparse = partial(self._attend, parts, attention.forward, view, layer, keep, state)
            undo.enter_context(_computing(attention, sparse))
        if self.mlp_prune_fraction:
            known = view.anatomy.gated_mlp(layer)
            assert isinstance(known, GatedMlp)
            mlp, layers = view.module.get_submodule(known.module), _frozen_layers(view, known)
            undo.enter_context(_computing(mlp, partial(self._prune, view, known.activation, layers)))

    def _prune(self, view: ModelView, activation: nn.Module, layers: Layers, x: Tensor) -> Tensor:
        """The MLP with fewer neurons in its backward."""
        keep = max(1, int(layers.down.in_features * (1 - self.mlp_prune_fraction)))
        view.meter.charge_backward(2 * 3 * x.numel() * keep, x)  # three products of T rows with [D, keep]
        return pruned_mlp(x, *layers, activation, keep)

    def _attend(
        self, parts: Attention, plain: Callable[..., tuple[Tensor, Any]], view: ModelView, layer: int, keep: float,
        state: LemoState, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The layer's own attention over the kept tokens only; zeros for the others."""
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("lemo is on while training only: generate and evaluate outside it")
        assert position_embeddings is not None
        lengths = kwargs.pop("sequence_lengths")
        index, short = self.choose(view, parts, hidden_states, lengths, keep)
        state.kept[layer] = index
        kwargs["position_ids"] = kwargs["position_ids"][:, index] if kwargs.get("position_ids") is not None else None
        cos, sin = (p[:, index] for p in position_embeddings)  # [1, T, d] -> [1, K, d], original positions
        places = torch.cat([torch.arange(n, device=index.device) for n in lengths])[index]
        out = plain(
            hidden_states[:, index],
            position_embeddings=(cos, sin),
            sequence_lengths=short,
            kept_places=places,
            **kwargs,
        )
        full = torch.zeros_like(hidden_states)
        full[:, index] = out[0]  # index_copy and index_add would keep what they write for the backward
        return full, out[1]

    @torch.no_grad()
    def choose(
        self, view: ModelView, parts: Attention, hidden: Tensor, lengths: tuple[int, ...], keep: float
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(token indices [K] of the flat batch, kept lengths by sequence); hidden [1, T, D]."""
        q, k = queries_and_keys(view.module.get_submodule, parts, hidden)
        how: dict[str, Any] = {"causal": parts.causal, "symmetrise": self.symmetrise, "window": parts.window}
        kept, short, start = [], [], 0
        for length in lengths:
            part, n = slice(start, start + length), -(-length // self.block_size)
            scores = block_scores(q[:, part], k[:, part], self.block_size, **how)
            blocks = kept_blocks(scores, max(1, int(n * keep)), self.keep_first_block)
            index = tokens_of(blocks, self.block_size, length)
            kept.append(index + start)
            short.append(len(index))
            start += length
        return torch.cat(kept), tuple(short)


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module; afterwards the one it had, its class's or another one."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _frozen_layers(view: ModelView, parts: GatedMlp) -> Layers:
    """The layers of an MLP. Raises LuthierError where something in the MLP is trained or quantised, or has an adapter."""
    mlp = view.module.get_submodule(parts.module)
    layers = Layers(*(view.module.get_submodule(n) for n in (parts.gate, parts.up, parts.down)))  # type: ignore[arg-type]
    moved = any(p.requires_grad or is_packed(p) for p in mlp.parameters())
    if moved or any("forward" in m.__dict__ for m in mlp.modules()):
        raise LuthierError("compute.lemo.mlp_prune_fraction: something in the MLP is trained or quantised; set it to 0")
    return layers
