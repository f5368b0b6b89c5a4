"""peft's modules in a model: put in, and taken out so that the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.adapters import ADAPTERS, Beside, factors_of
from luthier.model.undo import Change, swapped
from luthier.support.errors import LuthierError

IGNORES_HOOKS = frozenset({"HRALinear", "HRAConv2d"})  # of peft's layers, those that multiply by the weight themselves
IN_PLACE = "put the low-rank update into the weights instead, by Update.in_place or merge_into"
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


def reads_weight(layer: nn.Module) -> bool:
    """True for peft's DoRA: it divides by norms of the weight, beside calling the layer."""
    return len(getattr(layer, "lora_magnitude_vector", ())) > 0


def listening_layer(model: nn.Module, name: str, beside: bool = False) -> nn.Module:
    """`own_layer`, for something that is to act on what it computes.

    beside  it acts as a difference of the weight would, though the weight stays
    Raises LuthierError where the layer is never called: peft's HRA multiplies by its weight.
    """
    outer = model.get_submodule(name)
    if type(outer).__name__ in IGNORES_HOOKS:
        raise LuthierError(
            f"{name} has an adapter of peft's HRA, under which nothing else takes effect; detach it first"
        )
    if beside and reads_weight(outer):
        raise LuthierError(f"{name} has a DoRA adapter, whose norms would not see a low-rank term; {IN_PLACE}")
    return own_layer(model, name)


def arrange(places: Mapping[nn.Module, Mapping[str, nn.Module | None]]) -> None:
    """Give each module these children."""
    for part, children in places.items():
        part._modules.clear()
        part._modules.update(children)


class PeftModules:
    """What peft put around a model's layers.

    wrap  makes peft's model around this one; where it raises, the model is as it was
    Raises LuthierError if peft is on the model already, or if it would ignore adapters on a layer.
    peft's own removal keeps other trained parts: biases, and modules that it saves whole.
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
            if ADAPTERS in part.__dict__:
                raise LuthierError(f"{name}: peft would train a copy of a layer with adapters on it; detach them first")
            inner = own_layer(self.module, name)
            if type(part).__name__ in IGNORES_HOOKS and ADAPTERS in inner.__dict__:
                raise LuthierError(f"{name}: peft's HRA would pass over the adapter that is on it; detach it first")
            if reads_weight(part) and any(isinstance(x, Beside) for x, _, _ in factors_of(inner)):
                raise LuthierError(f"{name}: DoRA's norms would not see the low-rank term that is on it; {IN_PLACE}")

    def take_up(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load tensors under peft's names. Returns names that have no place."""
        from peft import set_peft_model_state_dict

        found: Any = set_peft_model_state_dict(self.wrapped, dict(state))
        return list(found.unexpected_keys)

    def freeze(self) -> None:
        """Make the modules ready for use without training: the base keeps its flags, and adapters have no dropout."""
        own = {id(p) for p, _ in self._flags}
        for p in self.module.parameters():
            if id(p) not in own:
                p.requires_grad_(False)
        self._restore_flags()
        for part in self._new:
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    @property
    def change(self) -> Change:
        return Change(self.undo, self.without)

    @contextmanager
    def without(self) -> Iterator[None]:
        """The model's own modules in their places, with their own values."""
        now = {part: dict(part._modules) for part in self._places}
        marks = {name: self.module.__dict__[name] for name in MARKS if name in self.module.__dict__}
        with swapped(list(self._stored.items())):
            self._put_back()
            try:
                yield
            finally:
                arrange(now)
                self.module.__dict__.update(marks)

    @torch.no_grad()
    def undo(self) -> None:
        """Remove peft's modules; the weights are as before."""
        for p, value in self._stored.items():
            p.copy_(value)
        self._put_back()

    def _put_back(self) -> None:
        arrange(self._places)
        for name in MARKS:
            self.module.__dict__.pop(name, None)

    def _restore_flags(self) -> None:
        for p, flag in self._flags:
            p.requires_grad_(flag)
