"""What a run changed, as a value tied to its base: it adds, scales, converts, binds to a model, and saves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from luthier.kernels.linear import stochastic_round
from luthier.model.fingerprint import Fingerprint, tensor_hash
from luthier.model.undo import in_turn
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.update.packing import factor_deltas, pack
from luthier.update.parts import (
    VECTOR_PARTS,
    Chart,
    Dense,
    LowRank,
    Modules,
    Part,
    PeftPart,
    Prompt,
    Replace,
    Sparse,
    Vector,
    overwrite,
    overwrite_entries,
)

# In a composition these come in this order: deltas first, replaced tensors over them, then what is added around.
_ORDER = {**dict.fromkeys(VECTOR_PARTS, 0), Replace: 1, Modules: 2, PeftPart: 2, Prompt: 3}


@dataclass(frozen=True)
class Update:
    """A frozen value: parts over one base."""

    base: Fingerprint
    parts: tuple[Part, ...]
    chart: Chart | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda p: _ORDER[type(p)])))

    def digest(self) -> str:
        """Equal for updates that are equal to the bit."""
        parts = [
            (p.kind, json.dumps(p.header(), sort_keys=True, default=str), tensor_hash(p.tensors())) for p in self.parts
        ]
        return hashlib.sha256(json.dumps([self.base.model_dump(), parts]).encode()).hexdigest()

    @property
    def linear(self) -> bool:
        """True where every part lives in weight space."""
        return all(isinstance(p, VECTOR_PARTS) for p in self.parts)

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 difference in the parameter's shape), one parameter at a time.

        A name may come more than once, from different parts. Raises TypeError for a part outside weight space.
        """
        for part in self.parts:
            if not isinstance(part, VECTOR_PARTS):
                raise TypeError(f"a {part.kind} part has no difference in weight space")
            yield from part.deltas()

    def __add__(self, other: Update) -> Update:
        """The sum in weight space; exact for every sort of part."""
        if not self.base.same_base(other.base):
            raise TypeError(f"updates of different bases cannot be added: {self.base.name} and {other.base.name}")
        merged: dict[type, Any] = {}
        for part in (*self.parts, *other.parts):
            if not isinstance(part, VECTOR_PARTS):
                raise TypeError(f"a {part.kind} part cannot be added: it replaces or surrounds, it is no difference")
            merged[type(part)] = merged[type(part)].plus(part) if type(part) in merged else part
        return Update(self.base, tuple(merged.values()))

    def then(self, later: Update) -> Update:
        """This update followed by one that was trained with it in place, as one update of the base.

        Differences add; a tensor that either replaces is replaced by what stood there in the end.
        """
        if not self.base.same_base(later.base):
            raise TypeError(f"updates of different bases cannot follow each other: {self.base.name}, {later.base.name}")
        before, after = _replaced(self), _replaced(later)
        whole = {**before, **after}
        moved = before.keys() - after.keys()
        for part in later.parts:
            if isinstance(part, VECTOR_PARTS) and moved & set(part.names()):
                whole |= {n: whole[n].float() + d for n, d in part.deltas() if n in moved}
        vectors: dict[type, Any] = {}
        beside: list[Part] = []
        for part in (*self.parts, *later.parts):
            if isinstance(part, VECTOR_PARTS):
                left = _without(part, whole)
                vectors[type(left)] = vectors[type(left)].plus(left) if type(left) in vectors else left
            elif not isinstance(part, Replace):
                beside.append(part)
        return Update(self.base, (*vectors.values(), *([Replace(whole)] if whole else []), *beside))

    def __rmul__(self, c: float) -> Update:
        for part in self.parts:
            if not isinstance(part, VECTOR_PARTS):
                raise TypeError(f"a {part.kind} part cannot be scaled")
        return Update(self.base, tuple(p.times(c) for p in self.parts))  # type: ignore[union-attr]

    def __mul__(self, c: float) -> Update:
        return c * self

    def dense(self) -> dict[str, Tensor]:
        """All differences at once, summed by name."""
        total: dict[str, Tensor] = {}
        for name, delta in self.deltas():
            total[name] = total[name] + delta if name in total else delta
        return total

    def to(self, form: str, *, rank: int | None = None, density: float | None = None) -> tuple[Update, float]:
        """Another form and its relative error (Frobenius norm of what is lost over that of the whole).

        form  "dense"; "sparse" with `density` (share of each tensor's largest entries kept); "lowrank" with `rank`
              (truncated singular values; two-dimensional tensors only)
        """
        if form == "lowrank" and rank is not None and len(self.parts) == 1 and isinstance(self.parts[0], LowRank):
            shorter, relative = self.parts[0].compacted(rank)
            return Update(self.base, (shorter,)), relative
        full = self.dense()
        if form == "dense":
            part: Part = Dense(full)
        elif form == "sparse" and density is not None:
            part = _sparsest(full, density)
        elif form == "lowrank" and rank is not None:
            part = _truncated(full, rank)
        else:
            raise ValueError(f"form {form!r}: use 'dense', 'sparse' with density=, or 'lowrank' with rank=")
        lost = sum(float((full[n] - d).double().square().sum()) for n, d in Update(self.base, (part,)).deltas())
        whole = sum(float(t.double().square().sum()) for t in full.values())
        return Update(self.base, (part,)), (lost / whole) ** 0.5 if whole else 0.0

    def coordinates(self) -> Tensor:
        """[layers, d]: the update in factor space, one row a block. Comparable only under one chart.

        See `luthier.update.packing` for the order. Raises TypeError without a chart.
        """
        if self.chart is None or len(self.parts) != 1 or not isinstance(self.parts[0], LowRank):
            raise TypeError("coordinates need one low-rank part and the chart it was trained under")
        return pack(factor_deltas(self.parts[0], self.chart)).rows

    @contextmanager
    def bind(self, view: Any, scale: float = 1.0) -> Iterator[Any]:
        """The tuned model, for the calls inside; afterwards the base has its stored bits back.

        Raises LuthierError where this update belongs to another base or does not fit.
        """
        self._refuse_misfit(view)
        undo = []
        try:
            for part in self.parts:
                undo.append(_apply(part, view, scale))
            yield view
        finally:
            for step in reversed(undo):
                step()

    @contextmanager
    def in_place(self, view: Any) -> Iterator[Any]:
        """The tuned model as something to train on, for the calls inside: every difference is in the weights.

        So no layer carries an adapter, and any tuner can be attached. In bf16 the weights are rounded stochastically,
        since rounding to nearest would take small differences away from the stage that goes on. Low-rank parts stay
        beside quantised layers. Raises LuthierError as `bind` does.
        """
        from luthier.model.additions import is_packed

        self._refuse_misfit(view)
        undo = []
        try:
            for i, part in enumerate(self.parts):
                packed = isinstance(part, LowRank) and any(is_packed(view.weight(n)) for n in part.names())
                if isinstance(part, VECTOR_PARTS) and not packed:
                    undo.append(overwrite(view, _rounded(part, view, i)))
                else:
                    undo.append(_apply(part, view, 1.0))
            yield view
        finally:
            for step in reversed(undo):
                step()

    def _refuse_misfit(self, view: Any) -> None:
        if not self.base.same_base(view.base):
            raise LuthierError(
                f"this update was trained on {self.base.name} ({self.base.weights[:12]}), "
                f"the model is {view.base.name} ({view.base.weights[:12]}); load that base instead"
            )
        self.validate(view.anatomy.parameters)
        self._refuse_packed(view.module, besides=(LowRank,))

    def validate(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises LuthierError with the first thing that does not fit tensors of these shapes."""
        for part in self.parts:
            for problem in part.problems(shapes):
                raise LuthierError(f"{part.kind} part: {problem}")

    def _refuse_packed(self, model: Any, besides: tuple[type, ...] = ()) -> None:
        from luthier.model.additions import refuse_packed

        for part in self.parts:
            if isinstance(part, (*VECTOR_PARTS, Replace)) and not isinstance(part, besides):
                refuse_packed(f"{part.kind} part", model, part.names())

    @torch.no_grad()
    def merge_into(self, model: Any) -> None:
        """Add to the weights for good, in float32 before rounding to their dtype. Raises LuthierError for packed ones."""
        self._refuse_packed(model)
        for part in self.parts:
            if isinstance(part, VECTOR_PARTS):
                for name, delta in part.deltas():
                    weight = model.get_parameter(name)
                    weight.copy_(weight.float() + delta.to(weight.device))
            elif isinstance(part, Replace):
                for name, value in part.values.items():
                    model.get_parameter(name).copy_(value)
            elif isinstance(part, PeftPart):
                part.attach(model).wrapped.merge_and_unload()
            else:
                raise TypeError(f"a {part.kind} part cannot be merged into weights")


def _apply(part: Part, view: Any, scale: float) -> Any:
    """Bind one part; returns its undo. Low-rank parts stay beside the weight, so that low precision loses nothing."""
    if isinstance(part, LowRank):
        from luthier.model.additions import low_rank_adapter
        from luthier.model.hanging import Fixed

        undo = []
        for name, a in part.a.items():
            here, there = Fixed(a.to(view.device)), Fixed(part.b[name].to(view.device))
            layer = view.layer(name.removesuffix(".weight"))
            undo.append(low_rank_adapter(layer, here, there, scale * part.scale[name]))
        return in_turn(undo)
    if isinstance(part, Sparse):
        return overwrite_entries(view, part, scale)
    if isinstance(part, VECTOR_PARTS):
        return overwrite(view, ((n, view.weight(n).float() + scale * d.to(view.device)) for n, d in part.deltas()))
    if scale != 1.0:
        raise TypeError(f"a {part.kind} part cannot be scaled")
    return part.apply(view)


def _rounded(part: Vector, view: Any, index: int) -> Iterator[tuple[str, Tensor]]:
    """(name, weight with its difference), summed in float32."""
    for name, delta in part.deltas():
        weight = view.weight(name)
        generator = Streams(0).torch("in-place", index, name, device=weight.device)
        yield name, stochastic_round(weight.float() + delta.to(weight.device), weight.dtype, generator)


def _replaced(update: Update) -> dict[str, Tensor]:
    """The tensors that stand in place of the base's."""
    return {n: t for part in update.parts if isinstance(part, Replace) for n, t in part.values.items()}


def _without(part: Vector, names: Collection[str]) -> Vector:
    """The part without these parameters. Seeds stay whole, since their noise is keyed by place; whatever is replaced
    is written over them.
    """
    left = lambda tensors: {n: t for n, t in tensors.items() if n not in names}  # noqa: E731
    if isinstance(part, Dense):
        return Dense(left(part.changes))
    if isinstance(part, Sparse):
        return Sparse(left(part.indices), left(part.values), left(part.shapes))
    if isinstance(part, LowRank):
        return LowRank(left(part.a), left(part.b), left(part.scale), part.transposed - set(names))
    return part


def _sparsest(full: dict[str, Tensor], density: float) -> Sparse:
    if not 0 < density <= 1:
        raise ValueError(f"density = {density}: should lie in (0, 1]")
    indices = {
        n: t.abs().view(-1).topk(max(1, int(t.numel() * density))).indices.sort().values for n, t in full.items()
    }
    values = {n: full[n].reshape(-1)[i] for n, i in indices.items()}
    return Sparse(indices, values, {n: tuple(t.shape) for n, t in full.items()})


def _truncated(full: dict[str, Tensor], rank: int) -> LowRank:
    a, b = {}, {}
    for name, t in full.items():
        if t.ndim != 2:
            raise ValueError(f"{name} is not a matrix, so it has no low-rank form")
        u, s, v = torch.linalg.svd(t.double(), full_matrices=False)
        root = s[:rank].sqrt()
        a[name], b[name] = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    return LowRank(a, b, dict.fromkeys(a, 1.0))


def add(updates: list[Update]) -> Update:
    """The sum of several updates."""
    return reduce(lambda x, y: x + y, updates)
