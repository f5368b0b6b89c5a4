"""peft's modules in a model's places: put in, and taken out so that the model is what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.hanging import KEY as HUNG
from luthier.support.errors import LuthierError

DEAF = frozenset({"HRALinear", "HRAConv2d"})  # of peft's layers, those that multiply by the weight themselves
MARKS = ("peft_config", "_hf_peft_config_loaded")  # what peft and transformers leave on the model


def own_layer(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of this name, inside what peft may have put around it."""
    module = model.get_submodule(name)
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter of the model's own by its name without peft's modules."""
    holder, _, leaf = name.rpartition(".")
    return own_layer(model, holder).get_parameter(leaf)


def listening_layer(model: nn.Module, name: str) -> nn.Module:
    """`own_layer`, for something that is to act on what it computes.

    Raises LuthierError where the layer is never called: peft's HRA multiplies by its weight.
    """
    outer = model.get_submodule(name)
    if type(outer).__name__ in DEAF:
        raise LuthierError(
            f"{name} has an adapter of peft's HRA, under which nothing else takes effect; detach it first"
        )
    return own_layer(model, name)


class PeftModules:
    """What peft put around a model's layers.

    wrap  makes peft's model around this one; where it raises, the model is as it was
    Raises LuthierError where peft is there already, or where it would not compute with what hangs on a layer.
    peft's own way out keeps what it trained beside its adapters: biases, and modules that it saves whole.
    """

    def __init__(self, module: nn.Module, wrap: Callable[[nn.Module], Any]) -> None:
        if getattr(module, "peft_config", None):
            raise LuthierError("an adapter of peft's is on this model already, and two do not stack; detach it first")
        self.module = module
        children = {part: dict(part._modules) for part in module.modules()}
        self._flags = [(p, p.requires_grad) for p in module.parameters()]
        try:
            self.wrapped = wrap(module)
            self._refuse_deaf(children)
        except BaseException:
            self._places = children
            self._put_back()
            self._restore_flags()
            raise
        self._places = {part: was for part, was in children.items() if part._modules != was}
        self._new = [part for part in module.modules() if part not in children]
        for part in self._new:
            part.training = module.training
        # Biases, where peft trains them.
        self._stored = {p: p.detach().clone() for p, _ in self._flags if p.requires_grad}

    def _refuse_deaf(self, known: Mapping[nn.Module, Any]) -> None:
        for name, part in self.module.named_modules():
            if part in known:
                continue
            if HUNG in part.__dict__:
                raise LuthierError(f"{name}: peft would train a copy of a layer with adapters on it; detach them first")
            if type(part).__name__ in DEAF and HUNG in own_layer(self.module, name).__dict__:
                raise LuthierError(f"{name}: peft's HRA would pass over the adapter that is on it; detach it first")

    def take_up(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load tensors under peft's names; returns names that have no place."""
        from peft import set_peft_model_state_dict

        found: Any = set_peft_model_state_dict(self.wrapped, dict(state))
        return list(found.unexpected_keys)

    def freeze(self) -> None:
        """As something to compute with, not to train: the base keeps its own flags, and adapters drop nothing out."""
        own = {id(p) for p, _ in self._flags}
        for p in self.module.parameters():
            if id(p) not in own:
                p.requires_grad_(False)
        self._restore_flags()
        for part in self._new:
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    @torch.no_grad()
    def undo(self) -> None:
        """Take peft's modules out; the weights are what they were."""
        for p, value in self._stored.items():
            p.copy_(value)
        self._put_back()

    def _put_back(self) -> None:
        for part, children in self._places.items():
            part._modules.clear()
            part._modules.update(children)
        for name in MARKS:
            self.module.__dict__.pop(name, None)

    def _restore_flags(self) -> None:
        for p, flag in self._flags:
            p.requires_grad_(flag)
