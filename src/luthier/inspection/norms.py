"""How large the change is, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from luthier.inspection.base import Case, Finding, Inspector, bars, in_order, layer_of
from luthier.method import Source
from luthier.step.lab import Lab

TITLE = "size of the change in each layer, as a share of its weights"


class Size(NamedTuple):
    """The change of one layer: its Frobenius norm, and that norm divided by the norm of the weights."""

    layer: str
    change: float
    relative: float


def sizes(changes: Iterable[tuple[str, Tensor]], weights: Mapping[str, Tensor]) -> list[Size]:
    """Norms by layer, blocks in their order.

    changes  (name, difference), each name once; weights: of the base, by name
    """
    squares: dict[str, tuple[float, float]] = {}
    for name, delta in changes:
        layer = layer_of(name)
        change, own = squares.get(layer, (0.0, 0.0))
        more = float(weights[name].detach().double().square().sum())
        squares[layer] = (change + float(delta.double().square().sum()), own + more)
    by_place = [(layer, *squares[layer]) for layer in in_order(squares)]
    return [Size(layer, change**0.5, (change / own) ** 0.5 if own else float("inf")) for layer, change, own in by_place]


def picture(found: Mapping[str, list[Size]]) -> str:
    """An SVG of relative sizes, one bar a layer and update; "" if there is nothing to draw."""
    several = len(found) > 1
    rows = [(f"{name}, {s.layer}" if several else s.layer, s.relative) for name, all_ in found.items() for s in all_]
    return bars(rows, TITLE, lambda share: f"{share:.2%}", "norms") if rows else ""


class Norms(Inspector):
    """Say how large an update is in every block, as a share of the weights that it changes.

    Shares compare layers of different sizes and updates of different forms. They say where weights changed, not the effect.
    A task head that was drawn anew is left out: no weights of the base stood there before.
    Cost: one pass over the update's tensors, made dense one at a time; tensors that several parts change are kept until the
    last of these parts. No forward pass.
    """

    source: ClassVar[Source] = Source("Editing Models with Task Arithmetic", 2022, "arXiv:2212.04089", "section 2")

    most: int = Field(3, ge=1)
    """Number of layers that the sentence names."""

    @torch.no_grad()
    def inspect(self, case: Case, lab: Lab | None = None) -> Finding:
        weights = dict(case.base.module.named_parameters())
        found: dict[str, list[Size]] = {}
        for name, update in case.updates.items():
            found[name] = sizes(self.differences(name, update), weights)
        rows = [(name, *s) for name, all_ in found.items() for s in all_]
        says = [self._said(name, all_) for name, all_ in found.items()]
        if heads := [n for n, u in case.updates.items() if any(p.as_head() for p in u.parts)]:
            says.append(f"The new task head of {' and '.join(heads)} is left out.")
        return Finding(
            " ".join(says), ("update", "layer", "change", "relative"), rows, picture(found),
            "exact: the norms are computed, not estimated",
        )  # fmt: skip

    def _said(self, name: str, found: list[Size]) -> str:
        largest = sorted((s for s in found if s.change), key=lambda s: -s.relative)[: self.most]
        named = ", ".join(f"{s.layer} ({s.relative:.2%})" for s in largest)
        return f"{name} changes most, as a share of the weights: {named}." if named else f"{name} changes no weight."
