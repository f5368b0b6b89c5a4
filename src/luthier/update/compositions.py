"""Parts that are not differences of weights: whole tensors, prompts, small modules, peft's adapters.

They are applied in order, and cannot be added or scaled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.kernels.linear import folded
from luthier.model.adapters import Fixed
from luthier.model.additions import bias_of, oriented, output_adapter, refuse_packed
from luthier.model.anatomy import Anatomy
from luthier.model.inputs import soft_prompt
from luthier.model.peft_modules import PeftModules
from luthier.model.undo import Change, together
from luthier.support.errors import LuthierError
from luthier.update import binding
from luthier.update.base import Order, Part, PeftFolder, Shapes, head_module, in_json, packed_problem


@dataclass(frozen=True)
class Replace(Part):
    """Whole tensors that replace the base's (re-initialised layers, a classification head)."""

    kind: ClassVar[str] = "replace"
    order: ClassVar[Order] = Order.TENSORS
    values: Mapping[str, Tensor]

    def names(self) -> Collection[str]:
        return self.values.keys()

    def replaces(self) -> Collection[str]:
        return self.values.keys()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(tensors)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        return binding.misfits(self.values, shapes)

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        self.refuse_scale(scale)
        refuse_packed("replace part", view.module, self.names())
        return binding.overwrite(view, self.values.items())

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        for name, value in self.values.items():
            model.get_parameter(name).copy_(value)

    def followed_by(self, later: Part) -> tuple[Part, Part | None]:
        """Differences of replaced tensors are added to the values; what is replaced again takes the later value."""
        if later.order is self.order:
            return replace(self, values={**self.values, **later.tensors()}), None
        if not later.linear:
            return super().followed_by(later)
        moved = set(later.names()) & self.values.keys()
        sums = {n: self.values[n].float() + d for n, d in later.deltas() if n in moved} if moved else {}
        return replace(self, values={**self.values, **sums}), later.without(moved)

    def cut_by(self, structure: Part) -> Replace:
        return Replace(binding.shortened(structure, self.values))

    def as_head(self) -> Mapping[str, Tensor] | None:
        return self.values if all(head_module(n) for n in self.values) else None

    @classmethod
    def from_peft(cls, folder: PeftFolder) -> Part | None:
        return cls(folder.heads()) if folder.is_plain_lora and folder.heads() else None


@dataclass(frozen=True)
class Prompt(Part):
    """Vectors before every input, [M, D], and optional offsets by position, [S, D], on the prompt's tokens."""

    kind: ClassVar[str] = "prompt"
    order: ClassVar[Order] = Order.INPUTS
    vectors: Tensor
    offsets: Tensor | None = None
    scope: str = "prompt"

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors} | ({} if self.offsets is None else {"offsets": self.offsets})

    def header(self) -> dict[str, Any]:
        return {"scope": self.scope}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(tensors["vectors"], tensors.get("offsets"), header["scope"])

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for name, t in self.tensors().items():
            if t.ndim != 2 or not t.isfinite().all():
                yield f"prompt {name} is not a finite matrix"

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        self.refuse_scale(scale)
        if self.vectors.shape[1] != view.anatomy.hidden_size:
            raise LuthierError(f"the prompt's width is {self.vectors.shape[1]}, the model's {view.anatomy.hidden_size}")
        offsets = None if self.offsets is None else Fixed(self.offsets.to(view.device))
        hook = soft_prompt(Fixed(self.vectors.to(view.device)), offsets, self.scope)
        change: Change = view.hook_inputs(hook)
        return change

    def refusal(self, model: nn.Module) -> str | None:
        return "its vectors stand before the input"


@dataclass(frozen=True)
class Modules(Part):
    """Small matrices after a linear layer's output: h + B (A h). a: module -> [R, out], b: module -> [out, R]."""

    kind: ClassVar[str] = "modules"
    order: ClassVar[Order] = Order.LAYERS
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {f"a.{n}": t for n, t in self.a.items()} | {f"b.{n}": t for n, t in self.b.items()}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(binding.below("a.", tensors), binding.below("b.", tensors))

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for module, a in self.a.items():
            b = self.b.get(module)
            if f"{module}.weight" not in shapes:
                yield f"the base has no layer {module}"
            elif b is None or a.ndim != 2 or tuple(b.shape) != tuple(reversed(a.shape)):
                yield f"{module}: A and B do not pair up"
            elif not (a.isfinite().all() and b.isfinite().all()):
                yield f"{module}: a factor is not finite"

    def layers(self, anatomy: Anatomy) -> Collection[str]:
        return self.a.keys()

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        self.refuse_scale(scale)

        def steps() -> Iterator[Change]:
            for name in self.a:
                a, b = (Fixed(t[name].to(view.device)) for t in (self.a, self.b))
                yield output_adapter(view.layer(name), a, b)

        return together(steps())

    def refusal(self, model: nn.Module) -> str | None:
        return packed_problem(model, [f"{n}.weight" for n in self.a])

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Merge into the layers' matrices: h + B (A h) is linear in h."""
        for name in self.a:
            module = model.get_submodule(name)
            weight, bias = oriented(module), bias_of(module)
            a, b = (t[name].to(weight.device, torch.float32) for t in (self.a, self.b))
            whole, offset = folded(weight.float(), None if bias is None else bias.float(), a, b)
            weight.copy_(whole)
            if bias is not None and offset is not None:
                bias.copy_(offset)

    def followed_by(self, later: Part) -> tuple[Part, Part | None]:
        """Modules behind modules: (1 + B' A') (1 + B A) = 1 + [B + B' A' B, B'] [A; A']."""
        lost = next((n for n in self.a if later.cut(f"{n}.bias") is not None), None)  # outputs, which A reads
        if lost is not None:
            raise TypeError(
                f"a {later.kind} part cannot take outputs of {lost} away after a {self.kind} part behind it"
            )
        if not isinstance(later, Modules):
            return self, later
        a, b = {**later.a, **self.a}, {**later.b, **self.b}
        for n in self.a.keys() & later.a.keys():
            a[n] = torch.cat([self.a[n], later.a[n]])  # [R, out], [R', out] -> [R + R', out]
            b[n] = torch.cat([self.b[n] + later.b[n] @ (later.a[n] @ self.b[n]), later.b[n]], dim=1)
        return Modules(a, b), None


# What is ignored in an adapter's configuration: its own kind, starts that would rewrite the base, code to import.
NOT_TAKEN_UP = frozenset(
    {"peft_type", "auto_mapping", "peft_version", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
     "megatron_config", "megatron_core", "runtime_config"}
)  # fmt: skip


@contextmanager
def _pefts_errors() -> Iterator[None]:
    """Turns errors of peft about an adapter into LuthierError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LuthierError(f"this adapter cannot be put on the base ({error})") from error


@dataclass(frozen=True)
class PeftPart(Part):
    """An adapter of peft's that is not a plain low-rank difference: its configuration and its tensors, under peft's names."""

    kind: ClassVar[str] = "peft"
    order: ClassVar[Order] = Order.LAYERS
    renames: ClassVar[bool] = True
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)

    def header(self) -> dict[str, Any]:
        return {"config": in_json(self.config)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(header["config"], tensors)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        targets = self.config.get("target_modules")  # whole names, or their ends
        ends = tuple(f".{name}" for name in shapes)
        if not isinstance(targets, (list, set)) or not all(
            any(e.endswith(f".{n}.weight") for e in ends) for n in targets
        ):
            yield "it adapts layers that the base has not"
        for name, t in self.state.items():
            if not t.isfinite().all():
                yield f"{name}: a value is not finite"

    def layers(self, anatomy: Anatomy) -> Collection[str]:
        ends = tuple(f".{n}" for n in self.config["target_modules"])
        return [x.module for x in anatomy.linears if f".{x.module}".endswith(ends)]

    def attach(self, module: nn.Module) -> PeftModules:
        """peft's modules on this model, not to be trained.

        Raises LuthierError, with the model as it was, if configuration, tensors and model do not fit each other.
        """
        from peft import get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {k: v for k, v in self.config.items() if k not in NOT_TAKEN_UP}
        with _pefts_errors():
            config = PEFT_TYPE_TO_CONFIG_MAPPING[self.config["peft_type"]](**known)
            placed = PeftModules(module, lambda model: get_peft_model(model, config))
        placed.freeze()
        try:
            with _pefts_errors():
                without_place = placed.take_up(self.state)
            if without_place:
                raise LuthierError(f"this adapter holds tensors the base has no place for: {without_place[0]}")
        except LuthierError:
            placed.undo()
            raise
        return placed

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        self.refuse_scale(scale)
        return self.attach(view.module).change

    def merge_into(self, model: nn.Module) -> None:
        self.attach(model).wrapped.merge_and_unload()

    def followed_by(self, later: Part) -> tuple[Part, Part | None]:
        if later.order < self.order:
            raise TypeError(
                f"a {later.kind} part cannot follow a {self.kind} part, which stands in the layers' places; merge the first "
                "update into the model, and train on that"
            )
        return self, later

    def peft(self, others: Sequence[Part]) -> PeftFolder | None:
        return None if others else PeftFolder(in_json(self.config) | {"inference_mode": True}, dict(self.state))

    @classmethod
    def from_peft(cls, folder: PeftFolder) -> Part | None:
        return None if folder.is_plain_lora else cls(folder.config, folder.tensors)
