"""Single entries of a weight as trained parameters: the sparse mechanism of all tuners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from luthier.kernels.linear import sparse_linear, stochastic_round
from luthier.model.adapters import replaces_product
from luthier.model.additions import bias_of, oriented, refuse_packed, register, replace_product
from luthier.model.anatomy import Anatomy, Linear
from luthier.model.undo import Change, Undo, leaving_out
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError, RecipeError
from luthier.update import Sparse

Observe = Callable[[Tensor], None]


def refuse_entries(view: ModelView, linears: Sequence[Linear]) -> None:
    """Raises LuthierError for layers whose entries cannot train: packed ones, and those whose entries train already."""
    refuse_packed("tuner", view.module, [x.name for x in linears])
    for x in linears:
        if replaces_product(view.layer(x.module)):
            raise LuthierError(f"entries of {x.name} train already; detach that tuner first")


def target_matrices(tuner: str, anatomy: Anatomy, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
    """The matrices whose entries a tuner trains. Raises RecipeError for a head that is tied to the embeddings."""
    linears = anatomy.match(targets)
    if anatomy.tied and any(x.module == anatomy.head for x in linears):
        raise RecipeError(f"tuner.{tuner}.targets", "the head is tied to the embeddings", "leave it out")
    return linears


class SparseWeights:
    """`values[name]` [K] float32 parameters at `indices[name]` [K], flat row-major over (out, in), int32 where that fits.

    The layer's own weight always holds base + values, so a forward pass costs as much as before. The overwritten values are
    kept, so that detaching restores the stored bits. `observe[name]` gets the dense gradient of its layer in each backward
    pass.
    """

    def __init__(self, view: ModelView, linears: Sequence[Linear], indices: dict[str, Tensor]) -> None:
        self.view, self.linears = view, {x.name: x for x in linears}
        refuse_entries(view, linears)
        self.indices = {n: i.to(view.device, self._dtype(n)) for n, i in indices.items()}
        self.values: dict[str, nn.Parameter] = {}
        self.observe: dict[str, Observe | None] = dict.fromkeys(self.linears)
        self.stored: dict[str, Tensor] = {}
        self.undo: list[Undo] = []
        self.products: list[Change] = []
        for name, x in self.linears.items():
            module = view.layer(x.module)
            self.stored[name] = self.read(name)
            self.values[name] = nn.Parameter(torch.zeros(len(self.indices[name]), device=view.device))
            self.undo.append(register(module, "values", self.values[name])[1])
            self.products.append(replace_product(module, self._forward(name, module)))
            self.undo.append(self.products[-1].undo)

    def _dtype(self, name: str) -> torch.dtype:
        rows, columns = self.linears[name].shape
        return torch.int32 if rows * columns <= 2**31 else torch.int64

    def _forward(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            values, observe = self.values[name], self.observe[name]
            return sparse_linear(x, oriented(module), bias_of(module), values, self.indices[name], observe)

        return forward

    def _weight(self, name: str, unseen: bool = False) -> Tensor:
        """[out, in], a view of the stored weight.

        unseen  autograd does not count what is written there
        """
        weight = oriented(self.view.layer(self.linears[name].module))
        return weight.data if unseen else weight.detach()

    def at(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) of flat positions."""
        columns = self.linears[name].shape[1]
        return indices // columns, indices % columns

    def put(self, name: str, values: Tensor, indices: Tensor | None = None, unseen: bool = False) -> None:
        """Write entries of the layer's weight."""
        indices = self.indices[name] if indices is None else indices
        weight = self._weight(name, unseen)
        if weight.is_contiguous():
            weight.view(-1)[indices] = values
        else:
            weight[self.at(name, indices)] = values

    def read(self, name: str, indices: Tensor | None = None) -> Tensor:
        """Entries of the layer's weight."""
        indices, weight = self.indices[name] if indices is None else indices, self._weight(name)
        return weight.view(-1)[indices] if weight.is_contiguous() else weight[self.at(name, indices)]

    @torch.no_grad()
    def write(self, generator: torch.Generator) -> None:
        """Put base + values into the layers."""
        for name, values in self.values.items():
            whole = self.stored[name].float() + values
            self.put(name, stochastic_round(whole, self.stored[name].dtype, generator))

    @torch.no_grad()
    def move(self, name: str, slots: Tensor, indices: Tensor) -> None:
        """Give the entries at `slots` new positions. The old positions get their base value back, the new entries start at 0."""
        self.put(name, self.stored[name][slots], self.indices[name][slots])
        self.stored[name][slots] = self.read(name, indices)
        self.indices[name][slots] = indices.to(self.indices[name].dtype)
        self.values[name][slots] = 0.0

    @torch.no_grad()
    def load(self, indices: dict[str, Tensor], values: dict[str, Tensor], generator: torch.Generator) -> None:
        """Take over copies of saved positions and values."""
        for name in self.values:
            self.put(name, self.stored[name])
            self.indices[name] = indices[name].to(self.view.device, self._dtype(name), copy=True)
            self.stored[name] = self.read(name)
            self.values[name].copy_(values[name])
        self.write(generator)

    def part(self, more: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Sparse:
        """The trained entries, in each parameter's stored shape and sorted.

        more  name -> (positions, differences) of entries that trained before
        """
        indices, values, shapes = {}, {}, {}
        for name, x in self.linears.items():
            index, value = self.indices[name].long(), self.values[name].detach()
            if more is not None and name in more:
                index, value = torch.cat([index, more[name][0]]), torch.cat([value, more[name][1]])
            if x.transposed:
                row, column = self.at(name, index)
                index = column * x.shape[0] + row
            order = index.argsort()
            indices[name], values[name] = index[order].cpu(), value[order].cpu()
            shapes[name] = tuple(self.view.weight(name).shape)
        return Sparse(indices, values, shapes)

    @contextmanager
    def without(self, more: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Iterator[None]:
        """The base's entries in the layers, for the calls inside.

        more  name -> (positions, what the base holds there) of entries that trained before
        A backward pass of an earlier forward finds what it saved: the writes are taken back, and autograd does not count them.
        """
        base = {n: (self.indices[n].long(), value) for n, value in self.stored.items()}
        for n, (where, value) in (more or {}).items():
            base[n] = torch.cat([base[n][0], where]), torch.cat([base[n][1], value])
        tuned = {n: self.read(n, at) for n, (at, _) in base.items()}
        with leaving_out([p.without for p in self.products]):
            try:
                for n, (at, value) in base.items():
                    self.put(n, value, at, unseen=True)
                yield
            finally:
                for n, (at, _) in base.items():
                    self.put(n, tuned[n], at, unseen=True)

    @torch.no_grad()
    def detach(self) -> None:
        """Restore the base's entries, and remove everything from the layers."""
        for name in self.values:
            self.put(name, self.stored[name])
        for step in reversed(self.undo):
            step()
        self.undo.clear()


# --- the largest entries ---


def top(values: Tensor, k: int) -> Tensor:
    """[k] positions of the largest values, in ascending order of position; of equal values the first ones."""
    n = len(values)
    if k >= n:
        return torch.arange(n, device=values.device)
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=values.device)
    return in_numpy(values, k) if values.device.type == "cpu" else in_torch(values, k)


def in_numpy(values: Tensor, k: int) -> Tensor:
    """`top` on a CPU, for 0 < k < n.

    Twenty times faster than a stable sort, which costs 0.1 s for every matrix of a small model.
    """
    v = (values.detach() if values.dtype == torch.int16 else values.detach().float()).numpy()
    least = _counted(v, k) if v.dtype == np.int16 else np.partition(v, len(v) - k)[len(v) - k]
    more, equal = np.flatnonzero(v > least), np.flatnonzero(v == least)
    return torch.from_numpy(np.sort(np.concatenate([more, equal[: k - len(more)]])))


def in_torch(values: Tensor, k: int) -> Tensor:
    """`top` on any device, for 0 < k < n."""
    limit = values.topk(k, sorted=False).values.min()
    above, ties = (values > limit).nonzero().squeeze(1), (values == limit).nonzero().squeeze(1)
    return torch.cat([above, ties[: k - len(above)]]).sort().values


def _counted(values: np.ndarray, k: int) -> int:
    """The k-th largest of 16-bit integers, none negative, by counting how often each occurs."""
    at_least = np.bincount(values)[::-1].cumsum()
    return len(at_least) - 1 - int(np.searchsorted(at_least, k))


def top_magnitudes(gradient: Tensor, k: int) -> Tensor:
    """[k] positions of the largest magnitudes, as `top`; bfloat16 is counted by its bits, which is faster still."""
    size = gradient.detach().abs()
    # The bits of numbers that are not negative have the same order as the numbers.
    return top(size.view(torch.int16) if size.dtype == torch.bfloat16 else size, k)
