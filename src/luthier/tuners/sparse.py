"""A few entries of a weight as the trained parameter: the one sparse mechanism of the house."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from luthier.model.additions import bias_of, oriented, refuse_packed, register, replace_forward
from luthier.model.anatomy import Linear
from luthier.model.view import ModelView
from luthier.training.linear import sparse_linear, stochastic_round
from luthier.update import Sparse
from luthier.update.parts import Undo

Observe = Callable[[Tensor], None]


class SparseWeights:
    """`values[name]` [K] float32 parameters at `indices[name]` [K], flat row-major over (out, in), int32 where that fits.

    The layer's own weight always holds base + values, so a forward costs what it did; what was overwritten is kept, so
    that detaching gives the stored bits back. `observe[name]` sees the dense gradient of its layer, once a backward.
    """

    def __init__(self, view: ModelView, linears: Sequence[Linear], indices: dict[str, Tensor]) -> None:
        self.view, self.linears = view, {x.name: x for x in linears}
        refuse_packed("tuner", view.module, self.linears)
        self.indices = {n: i.to(view.device, self._dtype(n)) for n, i in indices.items()}
        self.values: dict[str, nn.Parameter] = {}
        self.observe: dict[str, Observe | None] = dict.fromkeys(self.linears)
        self.stored: dict[str, Tensor] = {}
        self.undo: list[Undo] = []
        for name, x in self.linears.items():
            module = view.module.get_submodule(x.module)
            self.stored[name] = self._read(name)
            self.values[name] = nn.Parameter(torch.zeros(len(self.indices[name]), device=view.device))
            self.undo.append(register(module, "values", self.values[name])[1])
            self.undo.append(replace_forward(module, self._forward(name, module)))

    def _dtype(self, name: str) -> torch.dtype:
        rows, columns = self.linears[name].shape
        return torch.int32 if rows * columns <= 2**31 else torch.int64

    def _forward(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, bias = oriented(module), bias_of(module)

        def forward(x: Tensor) -> Tensor:
            return sparse_linear(x, weight, bias, self.values[name], self.indices[name], self.observe[name])

        return forward

    def _weight(self, name: str) -> Tensor:
        """[out, in], a view of what is stored."""
        return oriented(self.view.module.get_submodule(self.linears[name].module)).detach()

    def _at(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        columns = self.linears[name].shape[1]
        return indices // columns, indices % columns

    def _put(self, name: str, values: Tensor, indices: Tensor | None = None) -> None:
        """Write entries of the layer's weight; a flat view where the weight is stored as it is computed with."""
        indices = self.indices[name] if indices is None else indices
        weight = self._weight(name)
        if weight.is_contiguous():
            weight.view(-1)[indices] = values
        else:
            weight[self._at(name, indices)] = values

    def _read(self, name: str, indices: Tensor | None = None) -> Tensor:
        indices, weight = self.indices[name] if indices is None else indices, self._weight(name)
        return weight.view(-1)[indices] if weight.is_contiguous() else weight[self._at(name, indices)]

    @torch.no_grad()
    def write(self, generator: torch.Generator) -> None:
        """Put base + values into the layers."""
        for name, values in self.values.items():
            whole = self.stored[name].float() + values
            self._put(name, stochastic_round(whole, self.stored[name].dtype, generator))

    @torch.no_grad()
    def move(self, name: str, slots: Tensor, indices: Tensor) -> None:
        """Give the entries at `slots` new positions: the old ones get their base value back, the new start at 0."""
        self._put(name, self.stored[name][slots], self.indices[name][slots])
        self.stored[name][slots] = self._read(name, indices)
        self.indices[name][slots] = indices.to(self.indices[name].dtype)
        self.values[name][slots] = 0.0

    @torch.no_grad()
    def load(self, indices: dict[str, Tensor], values: dict[str, Tensor], generator: torch.Generator) -> None:
        """Take up saved positions and values."""
        for name in self.values:
            self._put(name, self.stored[name])
            self.indices[name] = indices[name].to(self.view.device, self._dtype(name))
            self.stored[name] = self._read(name)
            self.values[name].copy_(values[name])
        self.write(generator)

    def part(self) -> Sparse:
        """The trained entries, in each parameter's stored shape and sorted."""
        indices, values, shapes = {}, {}, {}
        for name, x in self.linears.items():
            index = self.indices[name].long()
            if x.transposed:
                row, column = self._at(name, index)
                index = column * x.shape[0] + row
            order = index.argsort()
            indices[name], values[name] = index[order].cpu(), self.values[name].detach()[order].cpu()
            shapes[name] = tuple(self.view.weight(name).shape)
        return Sparse(indices, values, shapes)

    @torch.no_grad()
    def detach(self) -> None:
        for name in self.values:
            self._put(name, self.stored[name])
        for step in reversed(self.undo):
            step()
        self.undo.clear()
