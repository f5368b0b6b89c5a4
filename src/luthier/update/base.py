"""The base class of parts: everything that one form of change must do, so that no other code asks which form it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from luthier.model.adapter_folder import PEFT_PREFIX, is_plain
from luthier.model.additions import is_packed
from luthier.model.anatomy import Anatomy
from luthier.model.undo import Change

Shapes = Mapping[str, tuple[int, ...]]


class Order(IntEnum):
    """The order of parts in an update. Each part is applied to the result of the parts before it."""

    STRUCTURE = 0  # what is removed
    DELTAS = 1  # what is added to the weights that are left
    TENSORS = 2  # what stands in a weight's place
    LAYERS = 3  # what is put on layers
    INPUTS = 4  # what stands before the inputs


class Cut(NamedTuple):
    """What a parameter loses: the indices `removed` [K] int64 along `dim`."""

    dim: int
    removed: Tensor

    def of(self, value: Tensor) -> Tensor:
        """The rest of a tensor."""
        return value.index_select(self.dim, self.kept(value.shape[self.dim]).to(value.device))

    def kept(self, size: int) -> Tensor:
        """Indices that stay, of `size`."""
        stays = torch.ones(size, dtype=torch.bool)
        stays[self.removed] = False
        return stays.nonzero().squeeze(1)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the rest."""
        return (*shape[: self.dim], shape[self.dim] - len(self.removed), *shape[self.dim + 1 :])


# What transformers calls a classification head, or a part of one.
HEADS = (
    "score", "classifier", "classification_head", "pre_classifier", "pooler", "head", "dense", "sequence_summary", "logits_proj",
)  # fmt: skip


class PeftFolder(NamedTuple):
    """What an adapter folder of peft's holds: adapter_config.json, and tensors under peft's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def is_plain_lora(self) -> bool:
        """True for factors of matrices whose product alone is the difference to the base, perhaps with a trained head."""
        factors = all(which in ("A", "B") for _, which, _ in self.factors())
        return is_plain(self.config) and factors and all(head_module(n) for n in self.heads())

    def factors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(module, "A" or "B", tensor) of LoRA's factors; another letter or word for a tensor of another kind."""
        for key, t in self.tensors.items():
            module, _, which = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
            if module:
                yield module, which, t

    def heads(self) -> dict[str, Tensor]:
        """Tensors saved beside the factors, by parameter."""
        return {k.removeprefix(PEFT_PREFIX): t for k, t in self.tensors.items() if ".lora_" not in k}


def head_module(parameter: str) -> str | None:
    """The module that peft saves whole for a parameter of a task head, or of the trunk's pooler; None for other parameters."""
    first, *rest = parameter.split(".")
    return first if first in HEADS else "pooler" if rest[:1] == ["pooler"] else None


def in_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration in JSON's types: peft keeps names of layers as sets."""
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def packed_problem(model: nn.Module, names: Iterable[str]) -> str | None:
    """A sentence if one of these parameters is quantised."""
    packed = next((n for n in names if is_packed(model.get_parameter(n))), None)
    return packed and f"{packed} is quantised; load the model in bf16 or float32 (quantize: null)"


class Part(ABC):
    """One form of change. A new form is one class, and one line in `luthier.update.forms`.

    The defaults are for a form that can only be applied: it cannot be added, scaled or become a difference of weights.
    """

    kind: ClassVar[str]
    """Name in files and messages."""
    order: ClassVar[Order]
    linear: ClassVar[bool] = False
    """True for a difference of weights: it can be added and scaled."""
    renames: ClassVar[bool] = False
    """True if binding renames the base's parameters, so that no tuner can be attached meanwhile."""
    ordered: ClassVar[bool] = False
    """True where the order of `names` carries meaning."""

    # --- what it is made of ---

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors for the file."""

    def header(self) -> dict[str, Any]:
        """What belongs to the tensors, in JSON's types."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        """The inverse of `tensors` and `header`."""

    @abstractmethod
    def problems(self, shapes: Shapes) -> Iterator[str]:
        """What does not fit parameters of these shapes, or is not a valid value; one sentence each."""

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    # --- what it touches ---

    def names(self) -> Collection[str]:
        """Parameters of the base whose values it changes."""
        return ()

    def whole(self) -> Collection[str]:
        """Parameters of which it holds a tensor as large as they are: one under the parameter's own name."""
        return set(self.names()) & self.tensors().keys()

    def replaces(self) -> Collection[str]:
        """Parameters whose value before no longer matters."""
        return ()

    def cut(self, name: str) -> Cut | None:
        """What it takes out of this parameter."""
        return None

    def shapes_left(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters once this part is applied."""
        cuts = {n: self.cut(n) for n in shapes}
        return {n: s if (cut := cuts[n]) is None else cut.shape(s) for n, s in shapes.items()}

    def layers(self, anatomy: Anatomy) -> Collection[str]:
        """Modules that get another forward, or another module in their place, while this part is bound."""
        return ()

    # --- binding and merging ---

    @abstractmethod
    def bind(self, view: Any, scale: float = 1.0) -> Change:
        """Apply it to a model. The undo restores the stored bits."""

    def refusal(self, model: nn.Module) -> str | None:
        """Why it cannot become weights of this model; None if it can."""
        return packed_problem(model, self.names())

    def merge_into(self, model: nn.Module) -> None:
        """Write it into the weights for good."""
        raise TypeError(f"a {self.kind} part cannot be merged into weights: {self.refusal(model)}")

    # --- the vector space ---

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, float32 difference in the parameter's shape), one at a time."""
        raise self.no_vector("taken apart")

    def plus(self, other: Self) -> Self:
        """The sum with a part of the same form."""
        raise self.no_vector("added")

    def times(self, c: float) -> Self:
        """The multiple."""
        raise self.no_vector("scaled")

    def inner(self, other: Part) -> float:
        """The inner product in weight space, in double precision."""
        right = dict(other.deltas())
        return sum(float((t.double() * right[n].double()).sum()) for n, t in self.deltas() if n in right)

    def to(self, form: type[Part], *, rank: int | None = None, density: float | None = None) -> tuple[Part, float]:
        """(the nearest part of this form, its error: Frobenius norm of what is lost over that of the whole)."""
        full = dict(self.deltas())
        made = form.nearest(full, rank=rank, density=density)
        lost = sum(float((full[n] - d).double().square().sum()) for n, d in made.deltas())
        whole = sum(float(t.double().square().sum()) for t in full.values())
        return made, (lost / whole) ** 0.5 if whole else 0.0

    @classmethod
    def nearest(cls, full: dict[str, Tensor], *, rank: int | None = None, density: float | None = None) -> Part:
        """The part of this form that is nearest to these differences. Raises ValueError where a limit is missing."""
        raise ValueError(f"form {cls.kind!r}: differences of weights cannot be brought into it")

    def turned(self) -> Collection[str]:
        """Parameters stored as [in, out] whose factors are kept as those of [out, in]."""
        return ()

    def no_vector(self, verb: str) -> TypeError:
        """The error of a part that is not a difference of weights."""
        return TypeError(f"a {self.kind} part cannot be {verb}: it is not a difference of weights")

    def refuse_scale(self, scale: float) -> None:
        """Raises TypeError for another scale than 1."""
        if scale != 1.0:
            raise self.no_vector("scaled")

    # --- one after another ---

    def followed_by(self, later: Part) -> tuple[Part, Part | None]:
        """(this part, the later one) as one update holds both, where the later one was made with this one in place.

        None means that the later part is joined into this one.
        Raises TypeError where no two parts in the update's order are the same as these two in theirs.
        """
        return self.without(later.replaces()).cut_by(later), later

    def without(self, names: Collection[str]) -> Part:
        """The part less these parameters, which are written over anyway."""
        return self

    def cut_by(self, structure: Part) -> Part:
        """The part as it is in the model that a structure leaves."""
        return self

    # --- peft's folder ---

    def peft(self, others: Sequence[Part]) -> PeftFolder | None:
        """The folder of peft's that holds this part and the update's others; None if there is none."""
        return None

    def as_head(self) -> Mapping[str, Tensor] | None:
        """Its tensors, where it is a trained head that peft saves beside an adapter."""
        return None

    @classmethod
    def from_peft(cls, folder: PeftFolder) -> Part | None:
        """The part of this form that such a folder holds; None if it holds none."""
        return None
