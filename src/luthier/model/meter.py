"""Count FLOPs by formula while a model works: each matrix product by its sizes, its backward pass by what is frozen.

A product of T rows with a matrix [out, in] takes 2 T in out; its backward as much again for the gradient of its input,
where something below is trained, and again for the gradient of the matrix, where that is taken. Attention takes 4 H d n^2 a
sequence forward and 8 H d n^2 backward. Elementwise work, norms and optimisers are left out, as everywhere in the field.
A test holds the sums against torch's own counter for every tuner and objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.model.adapters import Beside, Factor, factors_of

KEY = "luthier_meter"
VALUES = "luthier_values"  # what sparse weights register on a layer


class Meter:
    """FLOPs by stage. `watch` adds a hook to every linear layer; without it nothing is counted."""

    def __init__(self) -> None:
        self.flops: dict[str, float] = {}
        self._stage = "other"
        self._moving: set[tuple[int, str]] | None = None  # (layer, parameter) that a forward-mode derivative is along
        self._undo: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Meter:
        return self  # a copied layer is metered where it is watched itself

    @property
    def total(self) -> float:
        return sum(self.flops.values())

    def charge(self, flops: float) -> None:
        """Count work that is not a layer's: a decomposition, a sort of gradients."""
        self.flops[self._stage] = self.flops.get(self._stage, 0.0) + flops

    def charge_backward(self, flops: float, x: Tensor) -> None:
        """Work of a backward that no hook sees, charged where x will be asked for its gradient."""
        if _has_backward(x):
            self.charge(flops)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the work inside the block to this stage."""
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = before

    @contextmanager
    def derivative(self, module: nn.Module, along: Iterable[str]) -> Iterator[None]:
        """Forwards inside carry a derivative along these parameters: W x then takes W dx, and dW x where W moves."""
        places = [n.rpartition(".") for n in along]
        self._moving = {(id(module.get_submodule(layer)), name) for layer, _, name in places}
        try:
            yield
        finally:
            self._moving = None

    # --- what is watched ---

    def watch(self, *modules: nn.Module) -> None:
        """Count these modules' layers from now on, and no others."""
        self.unwatch()
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, (nn.Linear, Conv1D)):
                    # Before: the last product of a block that is computed again ends its forward by an exception.
                    self._undo.append(layer.register_forward_pre_hook(self._forward).remove)
                    self._undo.append(layer.register_forward_hook(self._backward).remove)
                if _is_attention(layer):
                    layer.__dict__[KEY] = self
                    self._undo.append(partial(layer.__dict__.pop, KEY, None))
                    self._undo.append(layer.register_forward_hook(self._padded_attention, with_kwargs=True).remove)

    def unwatch(self) -> None:
        for step in self._undo:
            step()
        self._undo.clear()

    @contextmanager
    def watching(self, *modules: nn.Module) -> Iterator[None]:
        """Count inside only."""
        self.watch(*modules)
        try:
            yield
        finally:
            self.unwatch()

    # --- formulas ---

    def _forward(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows, columns = _shape(layer)
        count = rows * columns * self._times(layer, "weight")
        for thin in _thin(layer):
            count += sum(size * self._times(layer, *names) for size, names in zip(thin.sizes, thin.names, strict=True))
        self.charge(2 * args[0].numel() / columns * count)

    def _times(self, layer: nn.Module, *names: str) -> int:
        """Products of a forward with a matrix that these parameters make up."""
        return 1 if self._moving is None else 2 + any((id(layer), name) in self._moving for name in names)

    def _backward(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not _has_backward(out):
            return
        x, (rows, columns) = args[0], _shape(layer)
        below, weight = bool(x.requires_grad), _weight_gradient(layer)
        count = rows * columns * (below + weight)
        bias = layer._parameters.get("bias")
        trained = below or weight or (bias is not None and bias.requires_grad)
        for thin in _thin(layer):
            (a, b), (a_trains, b_trains) = thin.sizes, thin.trains
            entering = below if thin.beside else trained  # whether what A multiplies wants a gradient
            count += a * (entering + a_trains) + b * (b_trains + (a_trains or entering))
            trained = trained or a_trains or b_trains
        self.charge(2 * x.numel() / columns * count)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> None:
        """Charge attention over sequences that lie end to end; query [1, H, T, d]."""
        products = 4 if any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled() else 0
        if _in_backward():
            products = 0
        forward = 2 if self._moving is None else 6  # both factors of both products move
        self.charge(2 * (forward + products) * query.shape[1] * query.shape[3] * sum(n * n for n in lengths))

    def _padded_attention(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Charge attention over a rectangle [S, L, D]; flat rows are counted where their lengths are known."""
        if kwargs.get("sequence_lengths") is not None:
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            return
        past = kwargs.get("past_key_values")
        seen = hidden.shape[1] if past is None else int(past.get_seq_length(getattr(layer, "layer_idx", 0) or 0))
        query = _query(layer)
        width = hidden.shape[2] if query is None else _shape(query)[0]
        moving = hidden.requires_grad or any(p.requires_grad for q in _inner(layer) for p in q.parameters())
        products = 4 if moving and _has_backward(out[0] if isinstance(out, tuple) else out) else 0
        self.charge(2 * (2 + products) * width * hidden.shape[0] * hidden.shape[1] * max(seen, hidden.shape[1]))

    def head(self, hidden: Tensor, weight: Tensor, again: bool) -> None:
        """The vocabulary matrix on hidden [N, D].

        again  its logits are computed a second time in the backward
        """
        one = hidden.shape[0] * weight.shape[0] * weight.shape[1]
        count = 1
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad) and not _in_backward():
            count += hidden.requires_grad + weight.requires_grad + again
        self.charge(2 * count * one)


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)  # type: ignore[return-value]


QUERIES, FUSED = ("q_proj", "query", "q_lin"), ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
OTHERS = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin")


def _inner(layer: nn.Module, names: Sequence[str] = (*QUERIES, *OTHERS, *FUSED)) -> list[nn.Module]:
    """The layers that make queries, keys and values."""
    found = [layer._modules.get(n) for n in names]
    return [m for m in found if m is not None]


def _query(layer: nn.Module) -> nn.Module | None:
    """The projection whose width is heads times their size."""
    found = [m for m in _inner(layer, QUERIES) if isinstance(m, (nn.Linear, Conv1D))]
    return found[0] if found else None


def _is_attention(layer: nn.Module) -> bool:
    return bool(_inner(layer, (*QUERIES, *FUSED)))


class _Thin(NamedTuple):
    """A pair of thin matrices that a layer computes with."""

    beside: bool  # on the layer's input; False: on its output
    sizes: tuple[int, int]  # numbers in A and in B
    names: tuple[tuple[str, ...], tuple[str, ...]]  # parameters that they are made of
    trains: tuple[bool, bool]


def _thin(layer: nn.Module) -> list[_Thin]:
    """Adapters on a layer in the order of its forward; those beside its product are multiplied as one pair."""
    found = factors_of(layer)
    beside = [(a, b) for x, a, b in found if isinstance(x, Beside)]
    behind = [_pair(False, [(a, b)]) for x, a, b in found if not isinstance(x, Beside)]
    return [_pair(True, beside), *behind] if beside else behind


def _pair(beside: bool, group: Sequence[tuple[Factor, Factor]]) -> _Thin:
    def side(factors: Sequence[Factor]) -> tuple[int, tuple[str, ...], bool]:
        values = [f() for f in factors]
        return sum(v.numel() for v in values), tuple(f.name for f in factors), any(v.requires_grad for v in values)

    (a, a_names, a_trains), (b, b_names, b_trains) = (side([pair[i] for pair in group]) for i in (0, 1))
    return _Thin(beside, (a, b), (a_names, b_names), (a_trains, b_trains))


def _weight_gradient(layer: nn.Module) -> bool:
    """True where the whole gradient of the matrix is taken, be it to keep a few entries of it."""
    values, weight = layer._parameters.get(VALUES), layer._parameters.get("weight")
    return bool((values is not None and values.requires_grad) or (weight is not None and weight.requires_grad))


def _in_backward() -> bool:
    """True while a checkpointed forward is computed again."""
    return torch._C._current_graph_task_id() != -1


def _has_backward(out: Any) -> bool:
    return isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled() and not _in_backward()


def svd_flops(rows: int, columns: int) -> float:
    """FLOPs of a thin singular value decomposition: 14 m n^2 + 8 n^3 for m >= n (Golub and Van Loan, table 8.6.1)."""
    m, n = max(rows, columns), min(rows, columns)
    return 14.0 * m * n * n + 8.0 * n**3
