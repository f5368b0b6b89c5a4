"""An update in factor space: one row of coordinates a block, in an order every party agrees on, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.model.fingerprint import tensor_hash
from luthier.update.vectors import LowRank


@dataclass(frozen=True)
class Chart:
    """Which numbers two low-rank updates must share before their factors compare: initial tensors and order."""

    form: str
    initial: Mapping[str, Tensor] = field(repr=False)  # "a.NAME" -> A0

    @property
    def digest(self) -> str:
        return tensor_hash(dict(self.initial))


class Packed(NamedTuple):
    """rows [L, d] float32; mask [L, d] bool, False where a narrower block was padded."""

    rows: Tensor
    mask: Tensor


class Slot(NamedTuple):
    """One factor tensor's place: key in the chart ("a.NAME" or "b.NAME"), layer, shape."""

    key: str
    layer: int
    shape: tuple[int, ...]


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
    """Numbers a layer."""
    out: dict[int, int] = {}
    for s in order:
        out[s.layer] = out.get(s.layer, 0) + torch.Size(s.shape).numel()
    return out


def kinds(shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """[L, d] int8: 0 for a coordinate of an A, 1 for one of a B, -1 where a narrower layer is padded."""
    order = slots(shapes)
    wide = widths(order)
    out = torch.full((len(wide), max(wide.values())), -1, dtype=torch.int8)
    at = dict.fromkeys(sorted(wide), 0)
    rows = {layer: i for i, layer in enumerate(at)}
    for s in order:
        n = torch.Size(s.shape).numel()
        out[rows[s.layer], at[s.layer] : at[s.layer] + n] = "ab".index(s.key[0])
        at[s.layer] += n
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
    per_layer: dict[int, list[Tensor]] = {}
    for s in slots({k: tuple(t.shape) for k, t in values.items()}):
        per_layer.setdefault(s.layer, []).append(values[s.key].reshape(-1))
    rows = [torch.cat(parts) for _, parts in sorted(per_layer.items())]
    width = max(len(r) for r in rows)
    out = torch.zeros(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, r in enumerate(rows):
        out[i, : len(r)], mask[i, : len(r)] = r, True
    if not out.isfinite().all():
        raise ValueError("a value of this update is not finite")
    return Packed(out, mask)


def unpack(rows: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The exact inverse of `pack`. Raises ValueError where [L, d] does not fit the shapes."""
    order = slots(shapes)
    wide = widths(order)
    layers = sorted(wide)
    if tuple(rows.shape) != (len(layers), max(wide.values())):
        raise ValueError(f"packed update is {tuple(rows.shape)}, these shapes need {(len(layers), max(wide.values()))}")
    out: dict[str, Tensor] = {}
    at = dict.fromkeys(layers, 0)
    for s in order:
        n = torch.Size(s.shape).numel()
        out[s.key] = rows[layers.index(s.layer), at[s.layer] : at[s.layer] + n].reshape(s.shape).clone()
        at[s.layer] += n
    return out
