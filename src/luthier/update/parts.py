"""What an Update is made of.

A vector space over the base's weights: Dense, Sparse, LowRank, Seeds. They add and scale.
Compositions: Replace, Prompt, Modules, PeftPart. They only follow one another, and refuse `+`.
Every part knows its tensors (for the file), its numbers (for the JSON header), and how to apply itself to a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.model.peft_modules import PeftModules
from luthier.model.undo import Undo, in_turn
from luthier.support.errors import LuthierError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dense:
    """float32 differences, by parameter name."""

    kind: ClassVar[str] = "dense"
    changes: Mapping[str, Tensor]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.changes.items()

    def plus(self, other: Dense) -> Dense:
        names = {**self.changes, **other.changes}
        both = self.changes.keys() & other.changes.keys()
        return Dense({n: self.changes[n] + other.changes[n] if n in both else names[n] for n in names})

    def times(self, c: float) -> Dense:
        return Dense({n: c * t for n, t in self.changes.items()})

    def names(self) -> Iterable[str]:
        return self.changes

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changes)

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Dense:
        return cls(tensors)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for name, t in self.changes.items():
            yield from _misfit(name, t, shapes)


@dataclass(frozen=True)
class Sparse:
    """float32 values at unique flat row-major positions of each parameter, in the parameter's stored shape."""

    kind: ClassVar[str] = "sparse"
    indices: Mapping[str, Tensor]  # name -> [K] int64
    values: Mapping[str, Tensor]  # name -> [K] float32
    shapes: Mapping[str, tuple[int, ...]]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name, index in self.indices.items():
            out = torch.zeros(self.shapes[name], dtype=torch.float32)
            out.view(-1)[index] = self.values[name]
            yield name, out

    def plus(self, other: Sparse) -> Sparse:
        indices, values, shapes = dict(self.indices), dict(self.values), {**self.shapes, **other.shapes}
        for name, index in other.indices.items():
            if name not in indices:
                indices[name], values[name] = index, other.values[name]
                continue
            union, where = torch.cat([indices[name], index]).unique(return_inverse=True)
            both = torch.cat([values[name], other.values[name]])
            indices[name], values[name] = union, torch.zeros(len(union)).index_add_(0, where, both)
        return Sparse(indices, values, shapes)

    def times(self, c: float) -> Sparse:
        return Sparse(self.indices, {n: c * v for n, v in self.values.items()}, self.shapes)

    def names(self) -> Iterable[str]:
        return self.indices

    def tensors(self) -> dict[str, Tensor]:
        return {f"indices.{n}": t for n, t in self.indices.items()} | {f"values.{n}": t for n, t in self.values.items()}

    def header(self) -> dict[str, Any]:
        return {"shapes": {n: list(s) for n, s in self.shapes.items()}}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Sparse:
        pick = lambda head: {n[len(head) :]: t for n, t in tensors.items() if n.startswith(head)}  # noqa: E731
        return cls(pick("indices."), pick("values."), {n: tuple(s) for n, s in header["shapes"].items()})

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if not self.indices.keys() == self.values.keys() == self.shapes.keys():
            yield "the names of indices, values and shapes differ"
            return
        for name, index in self.indices.items():
            value = self.values[name]
            if name not in shapes or tuple(self.shapes[name]) != tuple(shapes[name]):
                yield f"{name} has shape {self.shapes[name]}, the base {shapes.get(name, 'no such tensor')}"
            elif value.shape != index.shape or index.dtype != torch.int64 or index.ndim != 1:
                yield f"{name}: indices and values do not pair up"
            elif value.dtype != torch.float32:
                yield f"{name}: values of {value.dtype}, torch.float32 is wanted"
            elif len(index) and not (int(index.min()) >= 0 and int(index.max()) < _size(shapes[name])):
                yield f"{name}: an index lies outside 0..{_size(shapes[name]) - 1}"
            elif len(index.unique()) != len(index):
                yield f"{name}: an index occurs twice"
            elif not value.isfinite().all():
                yield f"{name}: a value is not finite"


@dataclass(frozen=True)
class LowRank:
    """scale * B A for each weight, in the orientation (out, in); a: name -> [R, in], b: name -> [out, R]."""

    kind: ClassVar[str] = "lowrank"
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    scale: Mapping[str, float]
    transposed: frozenset[str] = frozenset()  # parameters stored as [in, out]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.a:
            delta = self.scale[name] * (self.b[name].float() @ self.a[name].float())
            yield name, delta.T.contiguous() if name in self.transposed else delta

    def plus(self, other: LowRank) -> LowRank:
        """Exact: ranks stack. The scales move into B, so that one scale of 1 holds for both."""
        a, b = dict(self.a), {n: self.scale[n] * t for n, t in self.b.items()}
        for n in other.a:
            theirs, scaled = other.a[n], other.scale[n] * other.b[n]
            if n in a and (n in self.transposed) != (n in other.transposed):  # (B A)^T = A^T B^T
                theirs, scaled = scaled.T, theirs.T
            a[n] = torch.cat([a[n], theirs]) if n in a else theirs
            b[n] = torch.cat([b[n], scaled], dim=1) if n in b else scaled
        mine = self.transposed & self.a.keys()
        return LowRank(a, b, dict.fromkeys(a, 1.0), mine | (other.transposed - self.a.keys()))

    def times(self, c: float) -> LowRank:
        return LowRank(self.a, self.b, {n: c * s for n, s in self.scale.items()}, self.transposed)

    def compacted(self, rank: int) -> tuple[LowRank, float]:
        """(the nearest part of at most this rank, its relative error); works on the factors, never on [out, in]."""
        a, b, lost, whole = {}, {}, 0.0, 0.0
        for n in self.a:
            left, middle_left = torch.linalg.qr(self.b[n].double())  # [out, R'], [R', R]
            right, middle_right = torch.linalg.qr(self.a[n].double().T)  # [in, R''], [R'', R]
            u, s, v = torch.linalg.svd(self.scale[n] * middle_left @ middle_right.T, full_matrices=False)
            root = s[:rank].sqrt()
            b[n] = (left @ (u[:, :rank] * root)).float()
            a[n] = ((root[:, None] * v[:rank]) @ right.T).float()
            lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
        return LowRank(a, b, dict.fromkeys(a, 1.0), self.transposed), (lost / whole) ** 0.5 if whole else 0.0

    def names(self) -> Iterable[str]:
        return self.a

    def tensors(self) -> dict[str, Tensor]:
        return {f"a.{n}": t for n, t in self.a.items()} | {f"b.{n}": t for n, t in self.b.items()}

    def header(self) -> dict[str, Any]:
        return {"scale": dict(self.scale), "transposed": sorted(self.transposed)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> LowRank:
        pick = lambda head: {n[len(head) :]: t for n, t in tensors.items() if n.startswith(head)}  # noqa: E731
        scale = {n: float(s) for n, s in header["scale"].items()}
        return cls(pick("a."), pick("b."), scale, frozenset(header["transposed"]))

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if self.a.keys() != self.b.keys() or self.a.keys() != self.scale.keys():
            yield "the names of A, B and scale differ"
            return
        for name, a in self.a.items():
            b, shape = self.b[name], shapes.get(name)
            fits = a.ndim == b.ndim == 2 and b.shape[1] == a.shape[0]
            got = ((a.shape[1], b.shape[0]) if name in self.transposed else (b.shape[0], a.shape[1])) if fits else None
            if shape is None or got != tuple(shape):
                yield f"{name}: B A is {got}, the base {shape or 'has no such tensor'}"
            elif not (a.is_floating_point() and b.is_floating_point()):
                yield f"{name}: factors of {a.dtype} and {b.dtype}, real numbers are wanted"
            elif not (a.isfinite().all() and b.isfinite().all() and math.isfinite(self.scale[name])):
                yield f"{name}: a factor is not finite"


def noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """z(seed) for the parameter of this index: float32 N(0, 1) from a private CPU generator, the same on every party.

    Keyed by tensor, so that a rebuild can go tensor by tensor instead of walking the whole model for every seed.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9) & (2**63 - 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed), dtype=torch.float32)


@dataclass(frozen=True)
class Seeds:
    """sum_j scalars[j] * z(seeds[j]) over the named parameters, in this order."""

    kind: ClassVar[str] = "seeds"
    seeds: Tensor  # [K] int64
    scalars: Tensor  # [K] float64
    shapes: Mapping[str, tuple[int, ...]]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        live = [(int(s), float(c)) for s, c in zip(self.seeds, self.scalars, strict=True) if c != 0]
        for index, (name, shape) in enumerate(self.shapes.items()):
            total = torch.zeros(shape, dtype=torch.float64)
            for seed, c in live:
                total.add_(noise(seed, index, tuple(shape)), alpha=c)
            yield name, total.float()

    def plus(self, other: Seeds) -> Seeds:
        if list(self.shapes.items()) != list(other.shapes.items()):
            raise TypeError("seeds of other parameters, or in another order, cannot be added")
        seeds, where = torch.cat([self.seeds, other.seeds]).unique(return_inverse=True)
        scalars = torch.zeros(len(seeds), dtype=torch.float64)
        return Seeds(seeds, scalars.index_add_(0, where, torch.cat([self.scalars, other.scalars])), self.shapes)

    def times(self, c: float) -> Seeds:
        return Seeds(self.seeds, c * self.scalars, self.shapes)

    def names(self) -> Iterable[str]:
        return self.shapes

    def tensors(self) -> dict[str, Tensor]:
        return {"seeds": self.seeds, "scalars": self.scalars}

    def header(self) -> dict[str, Any]:
        return {"shapes": [[n, list(s)] for n, s in self.shapes.items()]}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Seeds:
        return cls(tensors["seeds"], tensors["scalars"], {n: tuple(s) for n, s in header["shapes"]})

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if self.seeds.ndim != 1 or self.seeds.shape != self.scalars.shape or self.seeds.dtype != torch.int64:
            yield "seeds and scalars do not pair up"
        elif self.scalars.dtype != torch.float64:
            yield f"scalars of {self.scalars.dtype}, torch.float64 is wanted"
        elif len(self.seeds.unique()) != len(self.seeds):
            yield "a seed occurs twice"
        elif not self.scalars.isfinite().all():
            yield "a scalar is not finite"
        for name, shape in self.shapes.items():
            if tuple(shapes.get(name, ())) != tuple(shape):
                yield f"{name} has shape {shape}, the base {shapes.get(name, 'no such tensor')}"


@dataclass(frozen=True)
class Replace:
    """Whole tensors in place of the base's (re-initialised layers, a classification head)."""

    kind: ClassVar[str] = "replace"
    values: Mapping[str, Tensor]

    def names(self) -> Iterable[str]:
        return self.values

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Replace:
        return cls(tensors)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for name, t in self.values.items():
            yield from _misfit(name, t, shapes)

    def apply(self, view: Any) -> Undo:
        return overwrite(view, self.values.items())


@dataclass(frozen=True)
class Prompt:
    """Vectors before every input, [M, D], and optional offsets by position, [S, D], on the prompt's tokens."""

    kind: ClassVar[str] = "prompt"
    vectors: Tensor
    offsets: Tensor | None = None
    scope: str = "prompt"

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors} | ({} if self.offsets is None else {"offsets": self.offsets})

    def header(self) -> dict[str, Any]:
        return {"scope": self.scope}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Prompt:
        return cls(tensors["vectors"], tensors.get("offsets"), header["scope"])

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for name, t in self.tensors().items():
            if t.ndim != 2 or not t.isfinite().all():
                yield f"prompt {name} is not a finite matrix"

    def apply(self, view: Any) -> Undo:
        from luthier.model.inputs import soft_prompt

        if self.vectors.shape[1] != view.anatomy.hidden_size:
            raise LuthierError(f"the prompt's width is {self.vectors.shape[1]}, the model's {view.anatomy.hidden_size}")
        offsets = self.offsets
        hook = soft_prompt(lambda: self.vectors, None if offsets is None else lambda: offsets, self.scope)
        view.input_hooks.append(hook)
        return lambda: view.input_hooks.remove(hook)


@dataclass(frozen=True)
class Modules:
    """Small matrices behind a linear layer's output: h + B (A h). a: module -> [R, out], b: module -> [out, R]."""

    kind: ClassVar[str] = "modules"
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {f"a.{n}": t for n, t in self.a.items()} | {f"b.{n}": t for n, t in self.b.items()}

    def header(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Modules:
        pick = lambda head: {n[len(head) :]: t for n, t in tensors.items() if n.startswith(head)}  # noqa: E731
        return cls(pick("a."), pick("b."))

    def problems(self, shapes: Shapes) -> Iterator[str]:
        for module, a in self.a.items():
            b = self.b.get(module)
            if f"{module}.weight" not in shapes:
                yield f"the base has no layer {module}"
            elif b is None or a.ndim != 2 or tuple(b.shape) != tuple(reversed(a.shape)):
                yield f"{module}: A and B do not pair up"
            elif not (a.isfinite().all() and b.isfinite().all()):
                yield f"{module}: a factor is not finite"

    def apply(self, view: Any) -> Undo:
        from luthier.model.additions import output_adapter
        from luthier.model.hanging import Fixed

        undo = []
        for name in self.a:
            a, b = self.a[name].to(view.device), self.b[name].to(view.device)
            undo.append(output_adapter(view.layer(name), Fixed(a), Fixed(b)))
        return in_turn(undo)


# Of a stranger's adapter configuration: its own kind, starts that would rewrite the base, code to import.
NOT_TAKEN_UP = frozenset(
    {"peft_type", "auto_mapping", "peft_version", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
     "megatron_config", "megatron_core", "runtime_config"}
)  # fmt: skip


@dataclass(frozen=True)
class PeftPart:
    """An adapter of peft's that is no plain low-rank difference: its configuration and its tensors, under peft's names."""

    kind: ClassVar[str] = "peft"
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.state)

    def header(self) -> dict[str, Any]:
        return {"config": {k: sorted(v) if isinstance(v, set) else v for k, v in self.config.items()}}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> PeftPart:
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

    def attach(self, module: Any) -> PeftModules:
        """peft's modules on this model, not to be trained. Raises LuthierError where configuration and tensors do not
        fit each other.
        """
        from peft import get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {k: v for k, v in self.config.items() if k not in NOT_TAKEN_UP}
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[self.config["peft_type"]](**known)
            placed = PeftModules(module, lambda model: get_peft_model(model, config))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise LuthierError(f"this adapter cannot be put on the base ({error})") from error
        placed.freeze()
        try:
            without_place = placed.take_up(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            placed.undo()
            raise LuthierError(f"this adapter cannot be put on the base ({error})") from error
        if without_place:
            placed.undo()
            raise LuthierError(f"this adapter holds tensors the base has no place for: {without_place[0]}")
        return placed

    def apply(self, view: Any) -> Undo:
        return self.attach(view.module).undo


VECTOR_PARTS = (Dense, Sparse, LowRank, Seeds)
Vector = Dense | Sparse | LowRank | Seeds
Composition = Replace | Prompt | Modules | PeftPart
Part = Vector | Composition
KINDS: dict[str, type[Part]] = {p.kind: p for p in (*VECTOR_PARTS, Replace, Prompt, Modules, PeftPart)}


@dataclass(frozen=True)
class Chart:
    """Which numbers two low-rank updates must share before their factors compare: initial tensors and order."""

    form: str
    initial: Mapping[str, Tensor] = field(repr=False)  # "a.NAME" -> A0

    @property
    def digest(self) -> str:
        from luthier.model.fingerprint import tensor_hash

        return tensor_hash(dict(self.initial))


def overwrite(view: Any, values: Iterable[tuple[str, Tensor]]) -> Undo:
    """Write tensors over parameters, one at a time; the returned function puts the stored bits back."""
    stored: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in values:
            weight = view.weight(name)
            stored.setdefault(name, weight.detach().clone())
            weight.copy_(value)

    def undo() -> None:
        with torch.no_grad():
            for name, value in stored.items():
                view.weight(name).copy_(value)

    return undo


def overwrite_entries(view: Any, part: Sparse, scale: float) -> Undo:
    """Add a sparse part to the weights in float32; only the entries it touches are kept for the undo."""
    stored: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, index in part.indices.items():
            weight = view.weight(name)
            here, value = index.to(weight.device), part.values[name].to(weight.device)
            stored[name] = weight.view(-1)[here]
            weight.view(-1)[here] = (stored[name].float() + scale * value).to(weight.dtype)

    def undo() -> None:
        with torch.no_grad():
            for name, value in stored.items():
                weight = view.weight(name)
                weight.view(-1)[part.indices[name].to(weight.device)] = value

    return undo


def _misfit(name: str, t: Tensor, shapes: Shapes) -> Iterator[str]:
    if name not in shapes or tuple(t.shape) != tuple(shapes[name]):
        yield f"{name} has shape {tuple(t.shape)}, the base {shapes.get(name, 'no such tensor')}"
    elif not t.is_floating_point():
        yield f"{name}: values of {t.dtype}, real numbers are wanted"
    elif not t.isfinite().all():
        yield f"{name}: a value is not finite"


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n
