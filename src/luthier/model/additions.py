"""Add things to a model's layers: luthier's parameters, low-rank and output adapters; and copies without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from luthier.model.adapters import (
    ADAPTERS,
    Behind,
    Beside,
    Core,
    Factor,
    Forward,
    Own,
    add_to,
    around,
    bias_of,
    is_packed,
    oriented,
)
from luthier.model.meter import KEY
from luthier.model.peft_modules import parameter_of
from luthier.model.undo import Change, Undo
from luthier.support.errors import LuthierError

PREFIX = "luthier_"


def refuse_packed(what: str, module: nn.Module, names: Iterable[str]) -> None:
    """Raises LuthierError where one of these parameters is quantised."""
    for name in names:
        if is_packed(parameter_of(module, name)):
            raise LuthierError(f"{what}: {name} is quantised; load the model in bf16 or float32 (quantize: null)")


def register(module: nn.Module, name: str, value: nn.Parameter) -> tuple[Own, Undo]:
    """Put a parameter of luthier on a module of the model, so that processes, trainers and function transforms find it.

    Returns how to read it and how to remove it. A second parameter with this name gets a number.
    """
    full = PREFIX + name
    taken = sum(n == full or n.startswith(full + "_") for n in module._parameters)
    while taken and f"{full}_{taken + 1}" in module._parameters:
        taken += 1
    full = f"{full}_{taken + 1}" if taken else full
    module.register_parameter(full, value)

    def undo() -> None:
        delattr(module, full)

    return Own(module, full), undo


def replace_product(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Change:
    """Compute the layer's own product in another way. Adapters beside and behind it stay."""
    return add_to(module, Core(lambda beneath: forward))


def low_rank_adapter(module: nn.Module, a: Factor, b: Factor, scale: float, dropout: float = 0.0) -> Change:
    """y = x W^T + bias + scale (drop(x) A^T) B^T; a() [R, in], b() [out, R] float32, asked for at every call."""
    return add_to(module, Beside(a, b, scale, dropout))


def output_adapter(module: nn.Module, a: Factor, b: Factor) -> Change:
    """h' = h + B (A h) on the layer's output h; a() [R, out], b() [out, R], asked for at every call."""

    def wrap(beneath: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            h: Tensor = beneath(x)
            return h + (h @ a().to(h.dtype).T) @ b().to(h.dtype).T

        return forward

    return add_to(module, Behind(wrap, (a, b)))


def bare_copy(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """A deep copy of a part of the model, without anything that was added to it.

    shared  memo of objects that are not copied (`id` -> object), such as configurations
    A copied forward would still compute with the layer it was made for.
    """
    out = copy.deepcopy(module, dict(shared))
    for part in list(out.modules()):
        for method in {"forward", *part.__dict__.pop(ADAPTERS, {})}:
            part.__dict__.pop(method, None)
        part._forward_hooks.clear()
        part.__dict__.pop(KEY, None)
        for name in [n for n in part._parameters if n.startswith(PREFIX)]:
            delattr(part, name)
        for name, child in list(part.named_children()):  # peft's layers hold the plain one
            if isinstance(getattr(child, "base_layer", None), nn.Module):
                setattr(part, name, child.base_layer)
    return out


__all__ = [
    "around", "bare_copy", "bias_of", "is_packed", "low_rank_adapter", "oriented", "output_adapter", "refuse_packed",
    "register", "replace_product",
]  # fmt: skip
