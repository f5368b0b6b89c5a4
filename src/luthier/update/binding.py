"""How parts are put on a model and taken off again, and how their tensors are checked and shortened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from luthier.model.additions import refuse_packed
from luthier.model.undo import Change, swapped, together
from luthier.update.base import Part, Shapes

V = TypeVar("V")
Rounding = Callable[[str, Tensor, torch.dtype], Tensor]  # (parameter, value float32, dtype) -> value of that dtype


def nearest_bits(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding to nearest."""
    return value.to(dtype)


@torch.no_grad()
def overwrite(view: Any, values: Iterable[tuple[str, Tensor]]) -> Change:
    """Write tensors over parameters, one at a time; undone, these have their stored bits back."""

    def steps() -> Iterator[Change]:
        for name, value in values:
            weight = view.weight(name)
            stored = weight.clone()
            yield Change(partial(_write, weight, stored), partial(swapped, [(weight, stored)]))
            weight.copy_(value)

    return together(steps())


@torch.no_grad()
def _write(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)


def add_to_weights(part: Part, view: Any, scale: float = 1.0, rounding: Rounding = nearest_bits) -> Change:
    """Add a part's differences to the weights, in float32 before they are rounded.

    Raises LuthierError for packed weights, before anything is touched.
    """
    refuse_packed(f"{part.kind} part", view.module, part.names())

    def sums() -> Iterator[tuple[str, Tensor]]:
        for name, delta in part.deltas():
            weight = view.weight(name)
            yield name, rounding(name, weight.float() + scale * delta.to(weight.device), weight.dtype)

    return overwrite(view, sums())


@torch.no_grad()
def add_entries(view: Any, indices: Mapping[str, Tensor], values: Mapping[str, Tensor], scale: float) -> Change:
    """Add values at flat positions of parameters, in float32; only the entries that are touched are kept for the undo."""

    def steps() -> Iterator[Change]:
        for name, index in indices.items():
            weight = view.weight(name)
            here, value = index.to(weight.device), values[name].to(weight.device)
            stored = weight.view(-1)[here]
            yield Change(partial(_write_entries, weight, here, stored), partial(_with_entries, weight, here, stored))
            weight.view(-1)[here] = (stored.float() + scale * value).to(weight.dtype)

    return together(steps())


@torch.no_grad()
def _write_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    weight.view(-1)[index] = values


@contextmanager
def _with_entries(weight: Tensor, index: Tensor, values: Tensor) -> Iterator[None]:
    """Other values at these positions, for the calls inside; written to `data`, where autograd counts no write."""
    tuned = weight.data.view(-1)[index]
    try:
        weight.data.view(-1)[index] = values
        yield
    finally:
        weight.data.view(-1)[index] = tuned


@torch.no_grad()
def merge_deltas(part: Part, model: nn.Module) -> None:
    """Add a part's differences to the weights for good."""
    for name, delta in part.deltas():
        weight = model.get_parameter(name)
        weight.copy_(weight.float() + delta.to(weight.device))


def other_shape(name: str, shape: Sequence[int], shapes: Shapes) -> str | None:
    """A sentence if the base has no parameter of this name and shape."""
    if name in shapes and tuple(shape) == tuple(shapes[name]):
        return None
    return f"{name} has shape {tuple(shape)}, the base {shapes.get(name, 'no such tensor')}"


def misfits(tensors: Mapping[str, Tensor], shapes: Shapes) -> Iterator[str]:
    """What keeps tensors from being values of these parameters, or differences of them; one sentence for each tensor."""
    for name, t in tensors.items():
        if wrong := other_shape(name, t.shape, shapes):
            yield wrong
        elif not t.is_floating_point():
            yield f"{name}: values of {t.dtype}, real numbers are wanted"
        elif not t.isfinite().all():
            yield f"{name}: a value is not finite"


def shortened(structure: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of parameters, without the entries that a structure removes."""
    cuts = {n: structure.cut(n) for n in tensors}
    return {n: t if (cut := cuts[n]) is None else cut.of(t) for n, t in tensors.items()}


def below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def picked(by_name: Mapping[str, V], names: Iterable[str]) -> dict[str, V]:
    """The entries with these names."""
    return {n: by_name[n] for n in names}
