"""Differences of weights: dense, sparse, low-rank, seeds. They form a vector space over one base: they can be added, scaled."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.model.adapter_folder import PEFT_PREFIX
from luthier.model.adapters import Fixed
from luthier.model.additions import low_rank_adapter, refuse_packed
from luthier.model.anatomy import Anatomy
from luthier.model.undo import Change, together
from luthier.update import binding
from luthier.update.base import Order, Part, PeftFolder, Shapes, head_module


@dataclass(frozen=True)
class Dense(Part):
    """float32 differences, by parameter name."""

    kind: ClassVar[str] = "dense"
    order: ClassVar[Order] = Order.DELTAS
    linear: ClassVar[bool] = True
    changes: Mapping[str, Tensor]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.changes.items()

    def plus(self, other: Self) -> Self:
        mine, theirs = self.changes, other.changes
        both = {n: t + theirs[n] if n in theirs else t for n, t in mine.items()}
        return replace(self, changes={**both, **{n: t for n, t in theirs.items() if n not in mine}})

    def times(self, c: float) -> Self:
        return replace(self, changes={n: c * t for n, t in self.changes.items()})

    @classmethod
    def nearest(cls, full: dict[str, Tensor], *, rank: int | None = None, density: float | None = None) -> Dense:
        return cls(full)

    def names(self) -> Collection[str]:
        return self.changes.keys()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changes)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(tensors)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        return binding.misfits(self.changes, shapes)

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        return binding.add_to_weights(self, view, scale)

    def merge_into(self, model: nn.Module) -> None:
        binding.merge_deltas(self, model)

    def without(self, names: Collection[str]) -> Dense:
        return Dense({n: t for n, t in self.changes.items() if n not in names})

    def cut_by(self, structure: Part) -> Dense:
        return Dense(binding.shortened(structure, self.changes))


@dataclass(frozen=True)
class Sparse(Part):
    """float32 values at unique flat row-major positions of each parameter, in the parameter's stored shape."""

    kind: ClassVar[str] = "sparse"
    order: ClassVar[Order] = Order.DELTAS
    linear: ClassVar[bool] = True
    indices: Mapping[str, Tensor]  # name -> [K] int64
    values: Mapping[str, Tensor]  # name -> [K] float32
    shapes: Mapping[str, tuple[int, ...]]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name, index in self.indices.items():
            out = torch.zeros(self.shapes[name], dtype=torch.float32)
            out.view(-1)[index] = self.values[name]
            yield name, out

    def plus(self, other: Self) -> Self:
        indices, values, shapes = dict(self.indices), dict(self.values), {**self.shapes, **other.shapes}
        for name, index in other.indices.items():
            if name not in indices:
                indices[name], values[name] = index, other.values[name]
                continue
            union, where = torch.cat([indices[name], index]).unique(return_inverse=True)
            both = torch.cat([values[name], other.values[name]])
            indices[name], values[name] = union, torch.zeros(len(union)).index_add_(0, where, both)
        return replace(self, indices=indices, values=values, shapes=shapes)

    def times(self, c: float) -> Self:
        return replace(self, values={n: c * v for n, v in self.values.items()})

    @classmethod
    def nearest(cls, full: dict[str, Tensor], *, rank: int | None = None, density: float | None = None) -> Sparse:
        """The largest entries of each tensor; `density` is the share that is kept."""
        if density is None:
            raise ValueError("form 'sparse': needs density=, the share of each tensor's entries that is kept")
        if not 0 < density <= 1:
            raise ValueError(f"density = {density}: should lie in (0, 1]")
        counts = {n: max(1, int(t.numel() * density)) for n, t in full.items()}
        indices = {n: t.abs().reshape(-1).topk(counts[n]).indices.sort().values for n, t in full.items()}
        values = {n: full[n].reshape(-1)[i] for n, i in indices.items()}
        return cls(indices, values, {n: tuple(t.shape) for n, t in full.items()})

    def names(self) -> Collection[str]:
        return self.indices.keys()

    def tensors(self) -> dict[str, Tensor]:
        return {f"indices.{n}": t for n, t in self.indices.items()} | {f"values.{n}": t for n, t in self.values.items()}

    def header(self) -> dict[str, Any]:
        return {"shapes": {n: list(s) for n, s in self.shapes.items()}}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        shapes = {n: tuple(s) for n, s in header["shapes"].items()}
        return cls(binding.below("indices.", tensors), binding.below("values.", tensors), shapes)

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if not self.indices.keys() == self.values.keys() == self.shapes.keys():
            yield "the names of indices, values and shapes differ"
            return
        for name, index in self.indices.items():
            value = self.values[name]
            if wrong := binding.other_shape(name, self.shapes[name], shapes):
                yield wrong
            elif value.shape != index.shape or index.dtype != torch.int64 or index.ndim != 1:
                yield f"{name}: indices and values do not pair up"
            elif value.dtype != torch.float32:
                yield f"{name}: values of {value.dtype}, torch.float32 is wanted"
            elif len(index) and not (int(index.min()) >= 0 and int(index.max()) < math.prod(shapes[name])):
                yield f"{name}: an index lies outside 0..{math.prod(shapes[name]) - 1}"
            elif len(index.unique()) != len(index):
                yield f"{name}: an index occurs twice"
            elif not value.isfinite().all():
                yield f"{name}: a value is not finite"

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        refuse_packed("sparse part", view.module, self.names())
        return binding.add_entries(view, self.indices, self.values, scale)

    def merge_into(self, model: nn.Module) -> None:
        binding.merge_deltas(self, model)

    def without(self, names: Collection[str]) -> Sparse:
        left = [n for n in self.indices if n not in names]
        return Sparse(
            binding.picked(self.indices, left), binding.picked(self.values, left), binding.picked(self.shapes, left)
        )

    def cut_by(self, structure: Part) -> Sparse:
        indices, values = dict(self.indices), dict(self.values)
        for name, index in self.indices.items():
            if (cut := structure.cut(name)) is None:
                continue
            places, shape = list(torch.unravel_index(index, self.shapes[name])), self.shapes[name]
            kept = cut.kept(shape[cut.dim])
            now = torch.full((shape[cut.dim],), -1).index_copy_(0, kept, torch.arange(len(kept)))  # old place -> new
            places[cut.dim] = now[places[cut.dim]]
            stays = places[cut.dim] >= 0
            indices[name] = _raveled([p[stays] for p in places], cut.shape(shape))
            values[name] = values[name][stays]
        return Sparse(indices, values, structure.shapes_left(self.shapes))


def _raveled(places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Flat row-major positions of these coordinates."""
    flat = torch.zeros_like(places[0])
    for place, width in zip(places, shape, strict=True):
        flat = flat * width + place
    return flat


@dataclass(frozen=True)
class LowRank(Part):
    """scale * B A for each weight, in the orientation (out, in); a: name -> [R, in], b: name -> [out, R]."""

    kind: ClassVar[str] = "lowrank"
    order: ClassVar[Order] = Order.DELTAS
    linear: ClassVar[bool] = True
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    scale: Mapping[str, float]
    transposed: frozenset[str] = frozenset()  # parameters stored as [in, out]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.a:
            delta = self.scale[name] * (self.b[name].float() @ self.a[name].float())
            yield name, delta.T.contiguous() if name in self.transposed else delta

    def plus(self, other: Self) -> Self:
        """The exact sum: ranks are stacked. The scales move into B, so that one scale of 1 holds for both."""
        a, b = dict(self.a), {n: self.scale[n] * t for n, t in self.b.items()}
        for n in other.a:
            theirs, scaled = other.a[n], other.scale[n] * other.b[n]
            if n in a and (n in self.transposed) != (n in other.transposed):  # (B A)^T = A^T B^T
                theirs, scaled = scaled.T, theirs.T
            a[n] = torch.cat([a[n], theirs]) if n in a else theirs
            b[n] = torch.cat([b[n], scaled], dim=1) if n in b else scaled
        mine = self.transposed & self.a.keys()
        turned = mine | (other.transposed - self.a.keys())
        return replace(self, a=a, b=b, scale=dict.fromkeys(a, 1.0), transposed=turned)

    def times(self, c: float) -> Self:
        return replace(self, scale={n: c * s for n, s in self.scale.items()})

    def inner(self, other: Part) -> float:
        """tr((B_p A_p)^T B_q A_q) = sum of (B_p^T B_q) * (A_p A_q^T), without forming the products."""
        if not isinstance(other, LowRank) or (self.transposed ^ other.transposed) & self.a.keys() & other.a.keys():
            return super().inner(other)
        total = 0.0
        for n in self.a.keys() & other.a.keys():
            left = self.b[n].double().T @ other.b[n].double()
            right = self.a[n].double() @ other.a[n].double().T
            total += self.scale[n] * other.scale[n] * float((left * right).sum())
        return total

    def to(self, form: type[Part], *, rank: int | None = None, density: float | None = None) -> tuple[Part, float]:
        if form is LowRank and rank is not None:
            return self.compacted(rank)
        return super().to(form, rank=rank, density=density)

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

    @classmethod
    def nearest(cls, full: dict[str, Tensor], *, rank: int | None = None, density: float | None = None) -> LowRank:
        """Truncated singular values; of matrices only."""
        if rank is None:
            raise ValueError("form 'lowrank': needs rank=, the inner width of the factors")
        a, b = {}, {}
        for name, t in full.items():
            if t.ndim != 2:
                raise ValueError(f"{name} is not a matrix, so it has no low-rank form")
            u, s, v = torch.linalg.svd(t.double(), full_matrices=False)
            root = s[:rank].sqrt()
            a[name], b[name] = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
        return cls(a, b, dict.fromkeys(a, 1.0))

    def names(self) -> Collection[str]:
        return self.a.keys()

    def turned(self) -> Collection[str]:
        return self.transposed

    def layers(self, anatomy: Anatomy) -> Collection[str]:
        return [n.removesuffix(".weight") for n in self.a]

    def tensors(self) -> dict[str, Tensor]:
        return {f"a.{n}": t for n, t in self.a.items()} | {f"b.{n}": t for n, t in self.b.items()}

    def header(self) -> dict[str, Any]:
        return {"scale": dict(self.scale), "transposed": sorted(self.transposed)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        scale = {n: float(s) for n, s in header["scale"].items()}
        return cls(binding.below("a.", tensors), binding.below("b.", tensors), scale, frozenset(header["transposed"]))

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

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        """Beside the weights, so that low precision loses nothing."""

        def steps() -> Iterator[Change]:
            for name, a in self.a.items():
                module = view.layer(name.removesuffix(".weight"), beside=True)
                here, there = Fixed(a.to(view.device)), Fixed(self.b[name].to(view.device))
                yield low_rank_adapter(module, here, there, scale * self.scale[name])

        return together(steps())

    def merge_into(self, model: nn.Module) -> None:
        binding.merge_deltas(self, model)

    def without(self, names: Collection[str]) -> LowRank:
        left = [n for n in self.a if n not in names]
        return LowRank(
            binding.picked(self.a, left),
            binding.picked(self.b, left),
            binding.picked(self.scale, left),
            self.transposed - set(names),
        )

    def cut_by(self, structure: Part) -> LowRank:
        a, b = dict(self.a), dict(self.b)
        for name in self.a:
            if (cut := structure.cut(name)) is None:
                continue
            if (cut.dim == 0) != (name in self.transposed):  # rows of [out, in]
                b[name] = cut._replace(dim=0).of(b[name])
            else:
                a[name] = cut._replace(dim=1).of(a[name])
        return replace(self, a=a, b=b)

    def peft(self, others: Sequence[Part]) -> PeftFolder | None:
        """peft's LoRA, alone or with trained heads."""
        heads = [part.as_head() for part in others]
        if any(head is None for head in heads):
            return None
        head = {n: t for found in heads if found is not None for n, t in found.items()}
        tensors = {f"{PEFT_PREFIX}{n.removesuffix('.weight')}.lora_A.weight": t for n, t in self.a.items()}
        tensors |= {f"{PEFT_PREFIX}{n.removesuffix('.weight')}.lora_B.weight": t for n, t in self.b.items()}
        return PeftFolder(self._peft_config(head), tensors | {PEFT_PREFIX + n: t for n, t in head.items()})

    def _peft_config(self, head: Mapping[str, Tensor]) -> dict[str, Any]:
        from peft import LoraConfig, TaskType

        modules = [n.removesuffix(".weight") for n in self.a]
        ranks = {m: self.a[f"{m}.weight"].shape[0] for m in modules}
        alphas = {m: self.scale[f"{m}.weight"] * ranks[m] for m in modules}
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        alpha = next(alphas[m] for m in modules if ranks[m] == common)
        config = LoraConfig(
            r=common, target_modules=sorted(modules), task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
            modules_to_save=sorted({str(head_module(n)) for n in head}) or None,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it as a float
            bias="none", inference_mode=True, fan_in_fan_out=bool(self.transposed),
            rank_pattern={m: r for m, r in ranks.items() if r != common},
            alpha_pattern={m: a for m, a in alphas.items() if a != alpha},
        )  # fmt: skip
        return dict(config.to_dict())

    @classmethod
    def from_peft(cls, folder: PeftFolder) -> Part | None:
        if not folder.is_plain_lora:
            return None
        config = folder.config
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        scale: dict[str, float] = {}
        for module, which, t in folder.factors():
            (a if which == "A" else b)[f"{module}.weight"] = t
            rank, alpha = (
                _of_module(config, module, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
            scale[f"{module}.weight"] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        return cls(a, b, scale, frozenset(a) if config.get("fan_in_fan_out") else frozenset())


def _of_module(config: Mapping[str, Any], module: str, patterns: str, default: str) -> float:
    """A number of an adapter's configuration for one module, by peft's own rule for patterns of names."""
    from peft.utils.other import get_pattern_key

    by_name: dict[str, float] = config.get(patterns) or {}
    found: float = by_name.get(get_pattern_key(list(by_name), module), config[default])
    return found


def noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """z(seed) for the parameter of this index: float32 N(0, 1) from a private CPU generator, the same on every party.

    Keyed by tensor, so that a rebuild can go tensor by tensor instead of walking the whole model for every seed.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9) & (2**63 - 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed), dtype=torch.float32)


@dataclass(frozen=True)
class Seeds(Part):
    """sum_j scalars[j] * z(seeds[j]) over the named parameters, in this order."""

    kind: ClassVar[str] = "seeds"
    order: ClassVar[Order] = Order.DELTAS
    linear: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
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

    def plus(self, other: Self) -> Self:
        if list(self.shapes.items()) != list(other.shapes.items()):
            raise TypeError("seeds of other parameters, or in another order, cannot be added")
        seeds, where = torch.cat([self.seeds, other.seeds]).unique(return_inverse=True)
        scalars = torch.zeros(len(seeds), dtype=torch.float64)
        scalars = scalars.index_add_(0, where, torch.cat([self.scalars, other.scalars]))
        return replace(self, seeds=seeds, scalars=scalars)

    def times(self, c: float) -> Self:
        return replace(self, scalars=c * self.scalars)

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def tensors(self) -> dict[str, Tensor]:
        return {"seeds": self.seeds, "scalars": self.scalars}

    def header(self) -> dict[str, Any]:
        return {"shapes": [[n, list(s)] for n, s in self.shapes.items()]}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
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
            if wrong := binding.other_shape(name, shape, shapes):
                yield wrong

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        return binding.add_to_weights(self, view, scale)

    def merge_into(self, model: nn.Module) -> None:
        binding.merge_deltas(self, model)

    def cut_by(self, structure: Part) -> Part:
        """Noise is drawn for whole tensors, so a shortened one is kept as it is."""
        if all(structure.cut(n) is None for n in self.shapes):
            return self
        return Dense(dict(self.deltas())).cut_by(structure)
