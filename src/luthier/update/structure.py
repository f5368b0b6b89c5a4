"""What is removed from a model: attention heads and MLP neurons."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from luthier.model.additions import refuse_packed
from luthier.model.anatomy import Anatomy, role_of
from luthier.model.undo import Change, leaving_out, swapped, together
from luthier.support.errors import LuthierError
from luthier.update import binding
from luthier.update.base import Cut, Order, Part, Shapes, packed_problem

ROWS = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "gate": "neurons", "up": "neurons"}  # role -> what its rows are
COLUMNS = {"o": "heads", "down": "neurons"}
INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # configurations' names of the MLP's inner width


@dataclass(frozen=True)
class Structure(Part):
    """Removed attention heads and MLP neurons, by number of the block. The rest keeps its order.

    heads     block -> [K] int64 query heads
    kv_heads  block -> [K] int64 key-value heads: those whose query heads are all removed
    neurons   block -> [K] int64 places of the MLP's inner width
    blocks    name of the model's list of blocks
    head_dim  width of a head

    A key-value head keeps either none of its query heads or as many as every other.
    """

    kind: ClassVar[str] = "structure"
    order: ClassVar[Order] = Order.STRUCTURE
    heads: Mapping[int, Tensor]
    kv_heads: Mapping[int, Tensor]
    neurons: Mapping[int, Tensor]
    blocks: str
    head_dim: int
    transposed: bool = False  # matrices are stored as [in, out]

    @classmethod
    def removing(
        cls, anatomy: Anatomy, heads: Mapping[int, Sequence[int]] | None = None,
        neurons: Mapping[int, Sequence[int]] | None = None,
    ) -> Structure:  # fmt: skip
        """Without these query heads and neurons, by block; key-value heads go with the last of their query heads.

        anatomy  of the model as it is: within a bound structure, numbers count what is left
        Raises ValueError for what cannot be removed from this model.
        """
        removed = {b: _sorted(x) for b, x in (heads or {}).items() if len(x)}
        inner = {b: _sorted(x) for b, x in (neurons or {}).items() if len(x)}
        transposed = any(x.transposed for x in anatomy.block_linears)
        made = cls(removed, {}, inner, anatomy.block_list, anatomy.head_dim, transposed)
        shapes = anatomy.parameters
        groups = {b: made._group(shapes, b) for b in removed}
        kv = {b: _whole_groups(x, groups[b]) for b, x in removed.items() if groups[b]}
        made = replace(made, kv_heads={b: x for b, x in kv.items() if len(x)})
        for problem in made.problems(shapes):
            raise ValueError(problem)
        return made

    def tensors(self) -> dict[str, Tensor]:
        return {f"{what}.{b}": t for what in ("heads", "kv_heads", "neurons") for b, t in getattr(self, what).items()}

    def header(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "head_dim": self.head_dim, "transposed": self.transposed}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        def by_block(what: str) -> dict[int, Tensor]:
            return {int(b): t for b, t in binding.below(f"{what}.", tensors).items()}

        return cls(
            by_block("heads"), by_block("kv_heads"), by_block("neurons"), str(header["blocks"]), int(header["head_dim"]),
            bool(header["transposed"]),
        )  # fmt: skip

    # --- where things are ---

    def cut(self, name: str) -> Cut | None:
        block, role, which = self._place(name)
        what = ROWS.get(role) or (COLUMNS.get(role) if which == "weight" else None)
        removed = None if what is None else getattr(self, what).get(block)
        if removed is None or which not in ("weight", "bias") or not len(removed):
            return None
        if what != "neurons":  # heads -> rows of theirs, [K] -> [K * head_dim]
            removed = (removed[:, None] * self.head_dim + torch.arange(self.head_dim)).reshape(-1)
        return Cut(self._dim(role in ROWS) if which == "weight" else 0, removed)

    def _dim(self, rows: bool) -> int:
        """The dimension of a stored matrix that counts rows, or columns, of [out, in]."""
        return int(rows == self.transposed)

    def _place(self, name: str) -> tuple[int, str, str]:
        """(block, role, "weight" or "bias") of a parameter; block -1 outside the blocks."""
        number, _, inner = name.removeprefix(f"{self.blocks}.").partition(".")
        if not name.startswith(f"{self.blocks}.") or not number.isdecimal():
            return -1, "other", ""
        module, _, which = inner.rpartition(".")
        return int(number), role_of(module), which

    def _roles(self, shapes: Shapes, block: int) -> dict[str, list[str]]:
        """Role -> names of a block's matrices."""
        found: dict[str, list[str]] = {}
        for name in shapes:
            at, role, which = self._place(name)
            if at == block and which == "weight":
                found.setdefault(role, []).append(name)
        return found

    def _width(self, shapes: Shapes, name: str, rows: bool) -> int:
        return shapes[name][self._dim(rows)]

    def _group(self, shapes: Shapes, block: int) -> int:
        """Query heads to each key-value head of a block; 0 where it has no such attention."""
        found = self._roles(shapes, block)
        if any(len(found.get(role, ())) != 1 for role in "qkvo"):
            return 0
        q, k = (self._width(shapes, found[role][0], rows=True) for role in "qk")
        return q // k

    # --- what cannot be removed ---

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if self.head_dim < 1:
            yield f"a head's width is {self.head_dim}, at least 1 is needed"
            return
        for what in ("heads", "kv_heads", "neurons"):
            for block, removed in getattr(self, what).items():
                if removed.dtype != torch.int64 or removed.ndim != 1 or len(removed.unique()) != len(removed):
                    yield f"{what} of block {block} are not a list of whole numbers without repetition"
                    return
        for block in self.heads.keys() | self.kv_heads.keys():
            yield from self._head_problems(shapes, block)
        for block in self.neurons:
            yield from self._neuron_problems(shapes, block)

    def _head_problems(self, shapes: Shapes, block: int) -> Iterator[str]:
        found = self._roles(shapes, block)
        if any(len(found.get(role, ())) != 1 for role in "qkvo"):
            there = ", ".join(n for names in found.values() for n in names) or "none"
            yield f"block {block}: heads are removed where q, k, v and o have a matrix each; its matrices are {there}"
            return
        q, k, v = (self._width(shapes, found[role][0], rows=True) for role in "qkv")
        o = self._width(shapes, found["o"][0], rows=False)
        if q != o or k != v or q % self.head_dim or k % self.head_dim or q % k:
            yield f"block {block}: q, k, v and o of widths {q}, {k}, {v}, {o} are not heads of {self.head_dim} each"
            return
        if odd := self._per_head(shapes, found["q"][0], {q, k, q // self.head_dim} - {self.head_dim}):
            yield f"block {block}: {odd} counts heads too, and luthier does not know how to shorten it"
            return
        heads, kv = self.heads.get(block, torch.tensor([], dtype=torch.int64)), self.kv_heads.get(block)
        total = q // self.head_dim
        if len(heads) and not (int(heads.min()) >= 0 and int(heads.max()) < total):
            yield f"block {block}: a removed head lies outside 0..{total - 1}"
        elif len(heads) >= total:
            yield f"block {block}: all {total} heads would be removed; keep one"
        elif sorted([] if kv is None else kv.tolist()) != _whole_groups(heads, q // k).tolist():
            yield f"block {block}: key-value heads go with all of their {q // k} query heads, and only then"
        elif len(set(_left_by_group(heads, total, q // k)) - {0}) != 1:
            yield (
                f"block {block}: key-value heads would keep {_left_by_group(heads, total, q // k)} query heads; remove "
                "whole groups, or as many from each"
            )

    def _per_head(self, shapes: Shapes, q: str, sizes: set[int]) -> str | None:
        """Another parameter of the attention with one of these sizes: a norm over all heads, a sink for each."""
        owner = q.removesuffix(".weight").rpartition(".")[0] + "."
        known = {"q", "k", "v", "o"}
        return next((n for n, s in shapes.items()
                     if n.startswith(owner) and self._place(n)[1] not in known and sizes & set(s)), None)  # fmt: skip

    def _neuron_problems(self, shapes: Shapes, block: int) -> Iterator[str]:
        found = self._roles(shapes, block)
        counts = {role: len(found.get(role, ())) for role in ("up", "down", "gate", "gate_up")}
        if (counts["up"], counts["down"]) != (1, 1) or counts["gate"] > 1 or counts["gate_up"]:
            there = ", ".join(n for names in found.values() for n in names) or "none"
            yield f"block {block}: neurons are removed where up and down have a matrix each; its matrices are {there}"
            return
        widths = {self._width(shapes, n, rows=True) for role in ("up", "gate") for n in found.get(role, ())}
        widths.add(self._width(shapes, found["down"][0], rows=False))
        removed = self.neurons[block]
        total = min(widths)
        if len(widths) > 1:
            yield f"block {block}: its MLP's matrices have inner widths {sorted(widths)}, one is needed"
        elif len(removed) and not (int(removed.min()) >= 0 and int(removed.max()) < total):
            yield f"block {block}: a removed neuron lies outside 0..{total - 1}"
        elif len(removed) >= total:
            yield f"block {block}: all {total} neurons would be removed; keep one"

    # --- binding and merging ---

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        """Parameters become shorter and stay the same objects; a new anatomy says their shapes."""
        self.refuse_scale(scale)
        names = self._cut_names(view.module)
        refuse_packed("structure part", view.module, names)
        if self.transposed != any(x.transposed for x in view.anatomy.block_linears):
            ways = ["[out, in]", "[in, out]"]
            raise LuthierError(
                f"this structure was made for matrices stored as {ways[self.transposed]}, this model stores them as "
                f"{ways[not self.transposed]}; it belongs to another base"
            )

        def steps() -> Iterator[Change]:
            yield from (self._shorten(view.module, name) for name in names)
            yield from (_set_counts(owner, counts) for owner, counts in self._counts(view.module))
            yield _set({"anatomy": Anatomy(view.module)}, view)

        return together(steps())

    def _cut_names(self, model: nn.Module) -> list[str]:
        return [n for n, _ in model.named_parameters() if self.cut(n) is not None]

    def _shorten(self, model: nn.Module, name: str) -> Change:
        parameter, cut = model.get_parameter(name), self.cut(name)
        assert cut is not None
        stored, parameter.grad = parameter.data, None
        parameter.data = cut.of(stored)
        layer = model.get_submodule(name.rpartition(".")[0])
        widths = _set_features(layer)

        def undo() -> None:
            parameter.data, parameter.grad = stored, None
            widths.undo()

        return Change(undo, lambda: leaving_out([widths.without, partial(swapped, [(parameter, stored)])]))

    def _counts(self, model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, int]]]:
        """(attention module, its numbers under the names that architectures give them), of the shortened matrices."""
        shapes = _shapes(model)
        for block in self.heads:
            found = self._roles(shapes, block)
            q, k = (self._width(shapes, found[role][0], rows=True) // self.head_dim for role in "qk")
            owner = model.get_submodule(found["q"][0].removesuffix(".weight").rpartition(".")[0])
            yield owner, {
                "num_heads": q, "num_attention_heads": q, "n_heads": q, "num_key_value_heads": k,
                "num_key_value_groups": q // k, "all_head_size": q * self.head_dim,
            }  # fmt: skip

    def refusal(self, model: nn.Module) -> str | None:
        """Why transformers' configuration, which holds one number for all blocks, cannot describe what is left, or None."""
        packed = packed_problem(model, self._cut_names(model))
        if packed:
            return packed
        left = self.shapes_left(_shapes(model))
        smaller: PretrainedConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
        name = type(smaller).__name__
        if uneven := self._configure(smaller, left):
            return uneven
        try:
            again = type(smaller).from_dict(smaller.to_dict())
            with torch.device("meta"):
                made = _shapes(type(model)(again))
        except (ValueError, StrictDataclassError) as error:
            return f"{name} does not allow what is left ({str(error).splitlines()[-1].strip()})"
        odd = next((n for n, s in left.items() if made.get(n) != s), None)
        return (
            odd and f"{name} cannot say what is left: it would give {odd} the shape {made.get(odd)}, it has {left[odd]}"
        )

    def _configure(self, config: PretrainedConfig, left: Shapes) -> str | None:
        """Write the numbers of what is left into a configuration; a sentence where blocks differ."""
        text = config.get_text_config()
        widths = {
            role: {self._width(left, n, rows=True) for n in left if self._place(n)[1:] == (role, "weight")}
            for role in ("q", "k", "up")
        }
        for role, what in (("q", self.heads), ("k", self.heads), ("up", self.neurons)):
            if what and len(widths[role]) > 1:
                word = "neurons" if role == "up" else "heads"
                numbers = sorted(w if role == "up" else w // self.head_dim for w in widths[role])
                return (
                    f"blocks keep different numbers of {word} ({numbers}), and {type(text).__name__} holds one for all"
                )
        if self.heads:
            text.num_attention_heads = min(widths["q"]) // self.head_dim
            for key, value in (("num_key_value_heads", min(widths["k"]) // self.head_dim), ("head_dim", self.head_dim)):
                if hasattr(text, key):
                    setattr(text, key, value)
        if self.neurons:
            setattr(text, next((n for n in INNER_WIDTHS if hasattr(text, n)), INNER_WIDTHS[0]), min(widths["up"]))
        return None

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """The model becomes a smaller one, and its configuration says so."""
        for name in self._cut_names(model):
            self._shorten(model, name)
        for owner, counts in self._counts(model):
            _set_counts(owner, counts)
        self._configure(model.config, _shapes(model))  # type: ignore[arg-type]

    def followed_by(self, later: Part) -> tuple[Part, Part | None]:
        """A later structure's numbers count what this one left."""
        if not isinstance(later, Structure):
            return self, later

        def join(what: str) -> dict[int, Tensor]:
            mine, theirs = getattr(self, what), getattr(later, what)
            return {b: _joined(mine.get(b), theirs.get(b)) for b in sorted(mine.keys() | theirs.keys())}

        return replace(self, heads=join("heads"), kv_heads=join("kv_heads"), neurons=join("neurons")), None


def _sorted(places: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(places), dtype=torch.int64)


def _whole_groups(heads: Tensor, group: int) -> Tensor:
    """Key-value heads of which every query head is among these."""
    owners: Tensor
    owners, counts = (heads // group).unique(return_counts=True)
    return owners[counts == group]


def _left_by_group(heads: Tensor, total: int, group: int) -> list[int]:
    """Query heads that each key-value head keeps."""
    return [int(n) for n in group - torch.bincount(heads // group, minlength=total // group)]


def _joined(first: Tensor | None, then: Tensor | None) -> Tensor:
    """All removed places, where `then` counts what `first` left."""
    if first is None or then is None:
        known = first if then is None else then
        assert known is not None
        return known
    gone = first.sort().values - torch.arange(len(first))  # places that stay before each removed one
    return torch.cat([first, then + torch.searchsorted(gone, then, right=True)]).sort().values


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def _set_features(layer: nn.Module) -> Change:
    """Write the widths of a layer's weight into its attributes."""
    names = ("nx", "nf") if isinstance(layer, Conv1D) else ("out_features", "in_features")
    return _set_counts(layer, dict(zip(names, layer.weight.shape, strict=True)))  # type: ignore[arg-type]


def _set_counts(module: nn.Module, counts: Mapping[str, int]) -> Change:
    """Set those attributes that a module has."""
    return _set({n: c for n, c in counts.items() if isinstance(getattr(module, n, None), int)}, module)


def _set(values: Mapping[str, Any], owner: Any) -> Change:
    """Set attributes."""
    before = {n: getattr(owner, n) for n in values}

    def put(attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(owner, name, value)

    @contextmanager
    def without() -> Iterator[None]:
        now = {n: getattr(owner, n) for n in before}
        put(before)
        try:
            yield
        finally:
            put(now)

    put(values)
    return Change(partial(put, before), without)
