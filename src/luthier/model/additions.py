"""What is hung on a model's layers: other forwards, parameters of ours, low-rank and output adapters; and copies without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.kernels.linear import low_rank_linear
from luthier.model.meter import KEY
from luthier.model.undo import Undo
from luthier.support.errors import LuthierError

PREFIX = "luthier_"


def bias_of(module: nn.Module) -> Tensor | None:
    """The layer's bias, where it has one."""
    bias: Tensor | None = getattr(module, "bias", None)
    return bias


Get = Callable[[], Tensor]


def is_packed(weight: Tensor) -> bool:
    """True for a quantised weight: packed bits that only its layer's own forward understands."""
    return not weight.is_floating_point()


def refuse_packed(what: str, module: nn.Module, names: Iterable[str]) -> None:
    """Raises LuthierError where one of these parameters is quantised."""
    for name in names:
        if is_packed(module.get_parameter(name)):
            raise LuthierError(f"{what}: {name} is quantised; load the model in bf16 or float32 (quantize: null)")


def oriented(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Undo:
    """Give one module object another forward; the class and the parameters stay."""
    if "forward" in module.__dict__:
        raise ValueError("this layer already carries an adapter; detach it first")
    module.forward = forward

    def undo() -> None:
        del module.forward

    return undo


def register(module: nn.Module, name: str, value: nn.Parameter) -> tuple[Get, Undo]:
    """A parameter of ours on a module of the model's, so that processes, trainers and function transforms find it.

    Returns how to read it (through the module, since a transform may have put something else there) and the undo.
    """
    module.register_parameter(PREFIX + name, value)

    def undo() -> None:
        delattr(module, PREFIX + name)

    return partial(getattr, module, PREFIX + name), undo


def low_rank_adapter(module: nn.Module, a: Get, b: Get, scale: float, dropout: float = 0.0) -> Undo:
    """y = x W^T + bias + scale (drop(x) A^T) B^T; a() [R, in], b() [out, R] float32, asked for at every call."""

    plain, packed = module.forward, is_packed(module.weight)  # type: ignore[arg-type]

    def forward(x: Tensor) -> Tensor:
        if packed or (dropout and module.training):
            low = nn.functional.dropout(x, dropout, module.training) @ a().to(x.dtype).T
            return plain(x) + scale * (low @ b().to(x.dtype).T)
        return low_rank_linear(x, oriented(module), bias_of(module), a(), b(), scale)

    return replace_forward(module, forward)


def output_adapter(module: nn.Module, a: Get, b: Get) -> Undo:
    """h' = h + B (A h) on the layer's output h; a() [R, out], b() [out, R], asked for at every call."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        h = plain(x)
        return h + (h @ a().to(h.dtype).T) @ b().to(h.dtype).T

    return replace_forward(module, forward)


def bare_copy(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """A deep copy of a part of the model as it was before anything was hung on it.

    shared  memo of what is not to be copied (`id` -> object): configurations, say
    A copied forward would still compute with the layer it was made for.
    """
    out = copy.deepcopy(module, dict(shared))
    for part in list(out.modules()):
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part.__dict__.pop(KEY, None)
        for name in [n for n in part._parameters if n.startswith(PREFIX)]:
            delattr(part, name)
        for name, child in list(part.named_children()):  # peft's layers hold the plain one
            if isinstance(getattr(child, "base_layer", None), nn.Module):
                setattr(part, name, child.base_layer)
    return out
