"""An update in factor space: one row of coordinates a block, in an order every party agrees on, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.model.fingerprint import tensor_hash
from luthier.update.vectors import LowRank


@dataclass(frozen=True)
class Chart:
    """What two low-rank updates must share before their factors can be compared: the initial tensors and their order."""

    initial: Mapping[str, Tensor] = field(repr=False)  # "a.NAME" -> A0

    @property
    def digest(self) -> str:
        """A hash of the initial tensors."""
        return tensor_hash(dict(self.initial))


class Packed(NamedTuple):
    """rows [L, d] float32; mask [L, d] bool, False where a narrower block was padded."""

    rows: Tensor
    mask: Tensor


class Slot(NamedTuple):
    """Where one factor tensor is: its key in the chart ("a.NAME" or "b.NAME"), its layer, its shape."""

    key: str
    layer: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def layer_of(name: str) -> int:
    """The block a parameter belongs to, as a number: 10 comes after 9. Raises ValueError outside blocks."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"{name} lies in no block, so it has no place in a packed update")
    return int(found.group(1))


def slots(shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """The agreed order: by layer, then module name, then A before B. `shapes` may come in any order."""
    keys = sorted(shapes, key=lambda k: (layer_of(k[2:]), k[2:], k[0]))
    return [Slot(k, layer_of(k[2:]), tuple(shapes[k])) for k in keys]


def widths(order: list[Slot]) -> dict[int, int]:
    """Numbers in each layer, by layer in ascending order."""
    out: dict[int, int] = {}
    for s in order:
        out[s.layer] = out.get(s.layer, 0) + s.numel
    return out


def places(order: list[Slot]) -> Iterator[tuple[Slot, int, slice]]:
    """(slot, its row, its columns) in a packed update."""
    wide = widths(order)
    rows, filled = {layer: i for i, layer in enumerate(wide)}, dict.fromkeys(wide, 0)
    for s in order:
        start = filled[s.layer]
        filled[s.layer] += s.numel
        yield s, rows[s.layer], slice(start, start + s.numel)


def size(order: list[Slot]) -> tuple[int, int]:
    """(L, d) of a packed update: as many rows as layers, as wide as the widest."""
    wide = widths(order)
    return len(wide), max(wide.values())


def kinds(shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """[L, d] int8: 0 for a coordinate of an A, 1 for one of a B, -1 where a narrower layer is padded."""
    order = slots(shapes)
    out = torch.full(size(order), -1, dtype=torch.int8)
    for s, row, columns in places(order):
        out[row, columns] = "ab".index(s.key[0])
    return out


def factor_deltas(part: LowRank, chart: Chart) -> dict[str, Tensor]:
    """A - A0 and B, float32, by key.

    Raises ValueError where the update's tensors are not those of the chart.
    """
    if {f"a.{n}" for n in part.a} != set(chart.initial):
        raise ValueError("this update trains other matrices than the chart names")
    values = {f"a.{n}": t.float() - chart.initial[f"a.{n}"].float() for n, t in part.a.items()}
    return values | {f"b.{n}": t.float() for n, t in part.b.items()}


def from_deltas(values: Mapping[str, Tensor], chart: Chart, scale: Mapping[str, float]) -> LowRank:
    """The update whose deltas these are: A0 + delta A, and B."""
    a = {k[2:]: chart.initial[k].float() + t for k, t in values.items() if k.startswith("a.")}
    return LowRank(a, {k[2:]: t for k, t in values.items() if k.startswith("b.")}, dict(scale))


def pack(values: Mapping[str, Tensor]) -> Packed:
    """Tensors by key -> [L, d], one row a layer, bit for bit; narrower layers are padded and masked.

    Raises ValueError for a value that is not finite.
    """
    order = slots({k: tuple(t.shape) for k, t in values.items()})
    out, mask = torch.zeros(size(order)), torch.zeros(size(order), dtype=torch.bool)
    for s, row, columns in places(order):
        out[row, columns], mask[row, columns] = values[s.key].reshape(-1), True
    if not out.isfinite().all():
        raise ValueError("a value of this update is not finite")
    return Packed(out, mask)


def unpack(rows: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The exact inverse of `pack`. Raises ValueError where [L, d] does not fit the shapes."""
    order = slots(shapes)
    if tuple(rows.shape) != size(order):
        raise ValueError(f"packed update is {tuple(rows.shape)}, these shapes need {size(order)}")
    return {s.key: rows[row, columns].reshape(s.shape).clone() for s, row, columns in places(order)}
