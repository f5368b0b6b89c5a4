"""What a run changed, as a value tied to its base. It can be added, scaled, converted, chained, bound to a model and saved."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from luthier.kernels.linear import stochastic_round
from luthier.model.additions import is_packed
from luthier.model.anatomy import Anatomy
from luthier.model.fingerprint import Fingerprint, tensor_hash
from luthier.model.undo import Change, in_turn
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.update import binding
from luthier.update.base import Part, Shapes
from luthier.update.forms import FORMS
from luthier.update.packing import Chart, factor_deltas, pack
from luthier.update.vectors import Dense, LowRank

P = TypeVar("P", bound=Part)


@dataclass(eq=False)
class Bound:
    """An update that is on a model now.

    writes  parameters that it gives other numbers
    """

    view: Any
    changes: list[Change] = field(default_factory=list)
    writes: set[str] = field(default_factory=set)

    def base_view(self) -> AbstractContextManager[None]:
        """A scope in which the model computes as it did before."""
        scope: AbstractContextManager[None] = self.view.leaving_out(self, [c.without for c in self.changes])
        return scope


@dataclass(frozen=True)
class Update:
    """A frozen value: parts over one base, in the order in which they are applied."""

    base: Fingerprint
    parts: tuple[Part, ...]
    chart: Chart | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda p: p.order)))

    def digest(self) -> str:
        """Equal for updates that are equal to the bit."""
        parts = [
            (p.kind, json.dumps(p.header(), sort_keys=True, default=str), tensor_hash(p.tensors())) for p in self.parts
        ]
        return hashlib.sha256(json.dumps([self.base.model_dump(), parts]).encode()).hexdigest()

    @property
    def linear(self) -> bool:
        """True if every part is a difference of weights."""
        return all(p.linear for p in self.parts)

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(p.num_bytes for p in self.parts)

    def only(self, form: type[P]) -> P | None:
        """The one part, where there is one and it is of this form."""
        part = self.parts[0] if len(self.parts) == 1 else None
        return part if isinstance(part, form) else None

    # --- the vector space ---

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 difference in the parameter's shape), one parameter at a time.

        A name may come more than once, from different parts. Raises TypeError for a part outside weight space.
        """
        for part in self.parts:
            yield from part.deltas()

    def __add__(self, other: Update) -> Update:
        """The sum in weight space; exact for every form."""
        if not self.base.same_base(other.base):
            raise TypeError(f"updates of different bases cannot be added: {self.base.name} and {other.base.name}")
        for part in (*self.parts, *other.parts):
            if not part.linear:
                raise part.no_vector("added")
        return Update(self.base, _summed((*self.parts, *other.parts)))

    def __rmul__(self, c: float) -> Update:
        return Update(self.base, tuple(p.times(c) for p in self.parts))

    def __mul__(self, c: float) -> Update:
        return c * self

    def inner(self, other: Update) -> float:
        """<U, V> in weight space; of two low-rank updates without forming their products."""
        if len(self.parts) == len(other.parts) == 1:
            return self.parts[0].inner(other.parts[0])
        return Dense(self.dense()).inner(Dense(other.dense()))

    def sums(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 difference), each name once: the sum over parts, as soon as the last part is added.

        Only the sums of names that are in several parts are held until then. Raises TypeError for a part outside weight space.
        """
        left = Counter(name for part in self.parts for name in part.names())
        held: dict[str, Tensor] = {}
        for name, delta in self.deltas():
            left[name] -= 1
            total = held.pop(name) + delta if name in held else delta
            if left[name]:
                held[name] = total
            else:
                yield name, total

    def dense(self) -> dict[str, Tensor]:
        """All differences at once, summed by name."""
        return dict(self.sums())

    def to(self, form: str, *, rank: int | None = None, density: float | None = None) -> tuple[Update, float]:
        """Another form and its relative error (Frobenius norm of what is lost over that of the whole).

        form  "dense"; "sparse" with `density` (share of each tensor's largest entries kept); "lowrank" with `rank`
              (truncated singular values; two-dimensional tensors only)
        """
        if form not in FORMS:
            raise ValueError(f"form {form!r}: there are {', '.join(FORMS)}")
        whole = self.parts[0] if len(self.parts) == 1 else Dense(self.dense())
        part, error = whole.to(FORMS[form], rank=rank, density=density)
        return Update(self.base, (part,)), error

    def coordinates(self) -> Tensor:
        """[layers, d]: the update in factor space, one row a block. Comparable only under one chart.

        See `luthier.update.packing` for the order. Raises TypeError without a chart.
        """
        part = self.only(LowRank)
        if self.chart is None or part is None:
            raise TypeError("coordinates need one low-rank part and the chart it was trained under")
        return pack(factor_deltas(part, self.chart)).rows

    # --- one after another ---

    def then(self, later: Update) -> Update:
        """This update followed by one that was made with it in place, as one update of the base.

        Differences are added. A tensor that either update replaces has its final value. A later structure shortens what
        came before it. Raises TypeError, with the parts' names, if no single update of the base is the same.
        """
        if not self.base.same_base(later.base):
            raise TypeError(f"updates of different bases cannot follow each other: {self.base.name}, {later.base.name}")
        if not self.parts or not later.parts:
            return self if self.parts else later
        parts = self.parts
        for new in later.parts:
            parts = _followed(parts, new)
        return Update(self.base, _summed(p for p in parts if p.names() or not p.linear))

    # --- on a model ---

    @contextmanager
    def bind(self, view: Any, scale: float = 1.0) -> Iterator[Any]:
        """The tuned model, for the calls inside. Afterwards the base has its stored bits back.

        Low-rank parts stay beside the weights, so that low precision loses nothing, unless a later part needs the layer
        for itself.
        Raises LuthierError if this update belongs to another base or does not fit and, at the end, if a later change that
        is still on the model wrote over the same weights.
        """
        self.refuse_misfit(view)
        covered = self._covered(view.anatomy)

        def bound(i: int, part: Part) -> Change:
            return binding.add_to_weights(part, view, scale) if covered[i] else part.bind(view, scale)

        with self._bound(view, bound, covered):
            yield view

    @contextmanager
    def in_place(self, view: Any) -> Iterator[Any]:
        """The tuned model as something to train on, for the calls inside: every difference is in the weights.

        So no layer carries a low-rank adapter, and any tuner can be attached. In bf16 the weights are rounded
        stochastically, because rounding to nearest would remove small differences from the next stage. Low-rank
        parts stay beside quantised layers. Raises LuthierError as `bind` does, and for a part that renames parameters.
        """
        self.refuse_misfit(view)
        for part in self.parts:
            if part.renames:
                raise LuthierError(
                    f"a {part.kind} part stands in the layers' places, so nothing can be trained on top of it; merge it into "
                    "the model (luthier export --to hf) and train on that"
                )

        def beside(part: Part) -> bool:
            return bool(part.layers(view.anatomy)) and any(is_packed(view.weight(n)) for n in part.names())

        covered = [p.linear and not beside(p) for p in self.parts]

        def bound(i: int, part: Part) -> Change:
            return binding.add_to_weights(part, view, 1.0, _unbiased(i, view)) if covered[i] else part.bind(view)

        with self._bound(view, bound, covered):
            yield view

    @contextmanager
    def _bound(self, view: Any, bind: Callable[[int, Part], Change], covered: Sequence[bool]) -> Iterator[None]:
        """covered  for each part, whether its differences are written into the weights"""
        bound = Bound(view)
        view.attached.append(bound)
        try:
            for i, part in enumerate(self.parts):
                bound.writes |= _written(part, view.anatomy, covered[i])
                bound.changes.append(bind(i, part))
            yield
        finally:
            view.refuse_out_of_turn(bound)
            view.attached.remove(bound)
            in_turn(c.undo for c in bound.changes)()

    def _covered(self, anatomy: Anatomy) -> list[bool]:
        """For each part, whether its differences must lie in the weights, since a later part replaces them or stands in
        the layer's place and reads its weight (DoRA's norms).
        """
        taken: set[str] = set()
        out = []
        for part in reversed(self.parts):
            out.append(part.linear and not taken.isdisjoint(part.names()))
            taken.update(part.replaces())
            if part.renames:
                taken.update(f"{layer}.weight" for layer in part.layers(anatomy))
        return out[::-1]

    def refuse_misfit(self, view: Any) -> None:
        """Raises LuthierError where it belongs to another base than this model, or does not fit it."""
        if not self.base.same_base(view.base):
            raise LuthierError(
                f"this update was trained on {self.base.name} ({self.base.weights[:12]}), "
                f"the model is {view.base.name} ({view.base.weights[:12]}); load that base instead"
            )
        self.validate(view.anatomy.parameters)

    def validate(self, shapes: Shapes) -> None:
        """Raises LuthierError with the first thing that does not fit tensors of these shapes."""
        for part in self.parts:
            for problem in part.problems(shapes):
                raise LuthierError(f"{part.kind} part: {problem}")
            shapes = part.shapes_left(shapes)

    def refusal(self, model: nn.Module) -> str | None:
        """Why it cannot become weights of this model; None if it can."""
        for part in self.parts:
            if why := part.refusal(model):
                return f"a {part.kind} part cannot be merged into weights: {why}"
        return None

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Write it into the weights for good, in float32 before rounding to their dtype.

        Raises LuthierError, before anything is touched, where a part cannot become weights of this model.
        """
        if why := self.refusal(model):
            raise LuthierError(why)
        for part in self.parts:
            part.merge_into(model)


def _written(part: Part, anatomy: Anatomy, covered: bool) -> set[str]:
    """Parameters whose values a bound part changes."""
    names = part.names() if covered or not part.layers(anatomy) else ()
    return {*names, *(n for n in anatomy.parameters if part.cut(n) is not None)}


def _summed(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Differences of one form added up; other parts as they are."""
    sums: dict[str, Part] = {}
    others = []
    for part in parts:
        if not part.linear:
            others.append(part)
        else:
            sums[part.kind] = sums[part.kind].plus(part) if part.kind in sums else part
    return (*sums.values(), *others)


def _followed(parts: tuple[Part, ...], new: Part) -> tuple[Part, ...]:
    """The parts with a new one after them, brought into their order: the new one passes the last first."""
    out: list[Part] = []
    taken_up = False
    for old in reversed(parts):
        before, left = old.followed_by(new)
        out.append(before)
        taken_up, new = taken_up or left is None, left or new
    return (*reversed(out), *([] if taken_up else [new]))


def _unbiased(index: int, view: Any) -> binding.Rounding:
    """Stochastic rounding, with a generator for each part and parameter."""
    streams = Streams(0)

    def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        return stochastic_round(value, dtype, streams.torch("in-place", index, name, device=value.device))

    return rounded


def add(updates: list[Update]) -> Update:
    """The sum of several updates."""
    return reduce(lambda x, y: x + y, updates)
