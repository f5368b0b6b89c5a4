"""Adapters on a layer: any number at once; they can be removed in any order.

A layer with adapters computes behind(W x + beside(x)). Low-rank terms are beside its own product, on the same input.
Adapters of its output come after them, in the order in which they were added. So the order of weight differences relative
to output adapters makes no difference, and adding them one at a time gives the same as an Update with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.kernels.linear import low_rank_linear
from luthier.model.undo import Change
from luthier.support.errors import LuthierError

ADAPTERS = "luthier_adapters"  # the key of a module's stacks in its __dict__
Forward = Callable[..., Any]


class Factor(Protocol):
    """A matrix of an adapter, read at every call."""

    @property
    def name(self) -> str:
        """The parameter's name on the layer; empty where the factor is not a parameter."""
        ...

    def __call__(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Own:
    """A parameter on the layer, read through it: a function transform may have put something else there."""

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        value: Tensor = getattr(self.module, self.name)
        return value


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor of a bound update; it is not trained."""

    value: Tensor
    name: str = ""

    def __call__(self) -> Tensor:
        return self.value


@dataclass(frozen=True, eq=False)
class Core:
    """Another way to compute the layer's own product; a layer can have one."""

    wrap: Callable[[Forward], Forward]


@dataclass(frozen=True, eq=False)
class Beside:
    """scale (drop(x) A^T) B^T; a() [R, in], b() [out, R]."""

    a: Factor
    b: Factor
    scale: float
    dropout: float = 0.0

    def term(self, x: Tensor, training: bool) -> Tensor:
        low = nn.functional.dropout(x, self.dropout, training) @ self.a().to(x.dtype).T
        return self.scale * (low @ self.b().to(x.dtype).T)


@dataclass(frozen=True, eq=False)
class Behind:
    """A wrapper around the forward pass, with everything that was added before it.

    factors  the A and B of an adapter that multiplies the output by them
    """

    wrap: Callable[[Forward], Forward]
    factors: tuple[Factor, Factor] | None = None


Addition = Core | Beside | Behind


class Stack:
    """Everything that was added to one method of a module. The module's class and parameters stay."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.foreign: Forward | None = module.__dict__.get(method)  # another library's; it is put back in the end
        self.additions: list[Addition] = []
        self.left_out: list[Addition] = []  # at the moment; what is left out twice is listed twice

    @property
    def active(self) -> list[Addition]:
        """What the module computes with now, in the order in which it was added."""
        return [x for x in self.additions if x not in self.left_out]

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return self  # it belongs to the module that it was made for; `add_to` checks this

    def add(self, what: Addition) -> None:
        if isinstance(what, Core) and any(isinstance(x, Core) for x in self.additions):
            raise ValueError("the product of this layer is already replaced")
        self.additions.append(what)
        self._rebuild()

    def remove(self, what: Addition) -> None:
        self.additions.remove(what)
        self._rebuild()
        if not self.additions:
            stacks = self.module.__dict__[ADAPTERS]
            del stacks[self.method]
            if not stacks:
                del self.module.__dict__[ADAPTERS]

    @contextmanager
    def without(self, what: Addition) -> Iterator[None]:
        """Compute as if this were not there."""
        self.left_out.append(what)
        self._rebuild()
        try:
            yield
        finally:
            self.left_out.remove(what)
            self._rebuild()

    def _rebuild(self) -> None:
        if active := self.active:
            setattr(self.module, self.method, self._composed(active))
        elif self.foreign is not None:
            setattr(self.module, self.method, self.foreign)
        else:
            self.module.__dict__.pop(self.method, None)

    def _composed(self, additions: Sequence[Addition]) -> Forward:
        forward: Forward = self.foreign or getattr(type(self.module), self.method).__get__(self.module)
        plain = self.foreign is None and type(self.module).forward in (nn.Linear.forward, Conv1D.forward)
        for core in [x for x in additions if isinstance(x, Core)]:
            forward, plain = core.wrap(forward), False
        if beside := [x for x in additions if isinstance(x, Beside)]:
            forward = with_terms(self.module, forward, beside, plain and not is_packed(self.module.weight))  # type: ignore[arg-type]
        for behind in [x for x in additions if isinstance(x, Behind)]:
            forward = behind.wrap(forward)
        return forward


def add_to(module: nn.Module, what: Addition, method: str = "forward") -> Change:
    """Add something to a module's method. It can be removed in any order.

    Raises ValueError for a second Core, LuthierError for a copy of a layer with adapters.
    """
    stacks = module.__dict__.setdefault(ADAPTERS, {})
    stack = stacks.get(method)
    if stack is None:
        stack = stacks[method] = Stack(module, method)
    if stack.module is not module:
        raise LuthierError(
            "this layer is a copy of one with adapters on it, and would use the adapters of the original"
        )
    stack.add(what)
    return Change(partial(stack.remove, what), partial(stack.without, what))


def around(module: nn.Module, wrap: Callable[[Forward], Forward], method: str = "forward") -> Change:
    """Wrap a method of a module; `wrap` gets the method with everything that is on it so far."""
    return add_to(module, Behind(wrap), method)


def replaces_product(module: nn.Module) -> bool:
    """True for a layer with a Core."""
    stack = module.__dict__.get(ADAPTERS, {}).get("forward")
    return stack is not None and any(isinstance(x, Core) for x in stack.additions)


def factors_of(module: nn.Module) -> list[tuple[Beside | Behind, Factor, Factor]]:
    """The adapters that a layer computes with, in order, with their A and B."""
    stack = module.__dict__.get(ADAPTERS, {}).get("forward")
    additions = [] if stack is None or stack.module is not module else stack.active
    beside = [(x, x.a, x.b) for x in additions if isinstance(x, Beside)]
    return [*beside, *((x, *x.factors) for x in additions if isinstance(x, Behind) and x.factors)]


def with_terms(module: nn.Module, beneath: Forward, terms: Sequence[Beside], fused: bool) -> Forward:
    """The layer's product plus low-rank terms.

    fused  the layer computes x W^T + bias: terms without dropout then share one rounding with it
    """
    steady = [t for t in terms if not t.dropout]

    def forward(x: Tensor) -> Tensor:
        inside = (steady if module.training else terms) if fused else []
        out = low_rank_linear(x, oriented(module), bias_of(module), *stacked(inside)) if inside else beneath(x)
        apart = [t.term(x, module.training) for t in terms if t not in inside]
        return out + sum(apart[1:], apart[0]) if apart else out

    return forward


def stacked(terms: Sequence[Beside]) -> tuple[Tensor, Tensor, float]:
    """(A [R, in], B [out, R], scale) of a sum of low-rank terms: their ranks laid side by side."""
    if len(terms) == 1:
        return terms[0].a(), terms[0].b(), terms[0].scale
    return torch.cat([t.a() for t in terms]), torch.cat([t.scale * t.b() for t in terms], dim=1), 1.0


def is_packed(weight: Tensor) -> bool:
    """True for a quantised weight: packed bits that only its layer's own forward understands."""
    return not weight.is_floating_point()


def bias_of(module: nn.Module) -> Tensor | None:
    """The layer's bias, where it has one."""
    bias: Tensor | None = getattr(module, "bias", None)
    return bias


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, also if its weight is packed and has another shape."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)  # type: ignore[return-value]


def oriented(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight
