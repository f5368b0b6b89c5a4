"""Every form of part against the same list: bits, files, algebra or refusal, merging, names."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import luthier
from luthier.model.adapter_folder import PEFT_PREFIX
from luthier.model.undo import Change
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, view_of
from luthier.tuners import Peft
from luthier.update import (
    Dense,
    LowRank,
    Modules,
    Order,
    Part,
    PeftPart,
    Prompt,
    Replace,
    Seeds,
    Sparse,
    Structure,
    Update,
    binding,
)
from luthier.update.base import Shapes
from luthier.update.files import load, load_adapter, save_update
from luthier.update.forms import FORMS

Q, V, UP, NORM = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
)  # fmt: skip
VIEW = view_of()
SHAPES = VIEW.anatomy.parameters
LINEAR = ("dense", "sparse", "lowrank", "seeds")


def drawn(seed: int, *shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(seed: int) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    places = {n: torch.randperm(SHAPES[n][0] * SHAPES[n][1], generator=generator)[:40].sort().values for n in (Q, UP)}
    return Sparse(places, {n: drawn(seed, 40) for n in places}, {n: SHAPES[n] for n in places})


def low_rank(seed: int, *names: str) -> LowRank:
    names = names or (Q, V)
    a = {n: drawn(seed, 2, SHAPES[n][1]) for n in names}
    return LowRank(a, {n: drawn(seed + 1, SHAPES[n][0], 2) for n in names}, dict.fromkeys(names, 3.0))


def seeds(seed: int) -> Seeds:
    scalars = torch.tensor([0.02, -0.03], dtype=torch.float64)
    return Seeds(torch.tensor([seed + 3, 8]), scalars, {n: SHAPES[n] for n in (V, Q)})


def peft(seed: int) -> PeftPart:
    trainable = Peft(type="LORA", options={"r": 2, "use_dora": True}, seed=seed).attach(view_of())
    (part,) = trainable.update().parts
    assert isinstance(part, PeftPart)
    return PeftPart(part.config, {n: t + drawn(seed, *t.shape).abs() for n, t in part.state.items()})


def modules(seed: int) -> Modules:
    layers = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    return Modules({n: drawn(seed, 2, 32) for n in layers}, {n: drawn(seed + 1, 32, 2) for n in layers})


def structure(seed: int) -> Structure:
    return Structure.removing(VIEW.anatomy, {b: [2, 3] for b in range(3)}, {b: [seed, 9] for b in range(3)})


MADE = {
    "dense": lambda s: Dense({n: drawn(s, *SHAPES[n]) for n in (Q, NORM)}),
    "sparse": sparse,
    "lowrank": low_rank,
    "seeds": seeds,
    "replace": lambda s: Replace({n: drawn(s, *SHAPES[n]) for n in (V, NORM)}),
    "prompt": lambda s: Prompt(drawn(s, 3, 32)),
    "modules": modules,
    "peft": peft,
    "structure": structure,
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", MADE)
OTHERS = tuple(k for k in MADE if k not in LINEAR)


def of(*parts: Part) -> Update:
    return Update(VIEW.base, parts)


def states(view: Any) -> Tensor:
    out: Tensor = view.trace(batch_of()).hidden[-1].detach()
    return out


def everything(view: Any) -> dict[str, Any]:
    """All that binding may touch."""
    numbers = {
        f"{name}.{key}": value for name, module in view.module.named_modules() for key, value in vars(module).items()
        if isinstance(value, int)
    }  # fmt: skip
    tensors = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    forwards = [n for n, m in view.module.named_modules() if "forward" in vars(m)]
    return {
        "numbers": numbers,
        "tensors": tensors,
        "forwards": forwards,
        "hooks": list(view.input_hooks),
        "anatomy": view.anatomy,
    }


def test_every_form_is_in_this_table():
    assert set(MADE) == set(FORMS)
    assert {k for k, form in FORMS.items() if form.linear} == set(LINEAR)
    assert {k: form.order for k, form in FORMS.items()} == {
        **dict.fromkeys(LINEAR, Order.DELTAS), "structure": Order.STRUCTURE, "replace": Order.TENSORS, "modules": Order.LAYERS,
        "peft": Order.LAYERS, "prompt": Order.INPUTS,
    }  # fmt: skip


@kinds
def test_binding_changes_the_model_and_gives_every_bit_back(kind):
    view = view_of()
    before, plain = everything(view), states(view)
    with of(MADE[kind](0)).bind(view):
        assert not torch.equal(states(view), plain)
    after = everything(view)
    tensors = before.pop("tensors")
    assert all(torch.equal(t, tensors[n]) for n, t in after.pop("tensors").items())
    assert after == before and torch.equal(states(view), plain)


@kinds
def test_files_give_back_the_same_part(kind, tmp_path):
    update = of(MADE[kind](0))
    save_update(update, tmp_path)
    again = load(tmp_path)
    (part,), (saved,) = again.parts, update.parts
    assert again.base == update.base and type(part) is type(saved)
    assert part.tensors().keys() == saved.tensors().keys()
    assert all(torch.equal(t, saved.tensors()[n]) for n, t in part.tensors().items())
    if kind != "peft":  # whose configuration then says for which base and for what use it was written
        assert part.header() == saved.header() and again.digest() == update.digest()
    assert again.num_bytes == update.num_bytes == sum(t.nbytes for t in update.parts[0].tensors().values()) > 0
    assert (tmp_path / "adapter_config.json").exists() == (kind in ("lowrank", "peft"))


@kinds
def test_merged_it_is_the_bound_model(kind):
    view, update, fresh = view_of(), of(MADE[kind](0)), view_of()
    with update.bind(view):
        bound = states(view)
    if kind == "prompt":
        with pytest.raises(LuthierError, match="a prompt part cannot be merged into weights: its vectors stand before"):
            update.merge_into(fresh.module)
        assert torch.equal(states(fresh), states(view))
        return
    assert update.refusal(fresh.module) is None
    update.merge_into(fresh.module)
    torch.testing.assert_close(states(fresh), bound, atol=1e-6 if kind != "peft" else 1e-5, rtol=1e-6)


@kinds
def test_names_are_parameters_and_other_shapes_are_a_problem(kind):
    part = MADE[kind](0)
    assert set(part.whole()) <= set(part.names()) <= set(SHAPES)
    assert bool(part.names()) == (kind in (*LINEAR, "replace"))
    assert not list(part.problems(SHAPES))
    assert bool(list(part.problems({}))) == (kind != "prompt")  # whose width is the model's, not a parameter's
    if part.names():
        assert list(part.problems({n: (*s[:-1], s[-1] + 1) for n, s in SHAPES.items()}))
    left = part.shapes_left(SHAPES)
    assert left == SHAPES or kind == "structure"


@pytest.mark.parametrize("kind", LINEAR)
def test_the_sums_of_parts_are_those_of_the_whole_each_name_once(kind):
    parts = (MADE["dense"](2), MADE[kind](0), MADE[kind](1))
    whole = {}
    for part in parts:
        for n, d in part.deltas():
            whole[n] = whole.get(n, torch.zeros(SHAPES[n])) + d
    sums = list(of(*parts).sums())
    assert len(sums) == len(whole) and all(torch.equal(t, whole[n]) for n, t in sums)
    assert all(torch.equal(t, whole[n]) for n, t in of(*parts).dense().items())
    assert {n for n, _ in of(MADE[kind](0)).sums()} == set(MADE[kind](0).names())


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_vector_says_so_by_name(kind):
    update = of(MADE[kind](0))
    assert not update.linear
    for act, words in (
        (lambda: update + update, "added"),
        (lambda: of(MADE["dense"](0)) + update, "added"),
        (lambda: 2.0 * update, "scaled"),
        (lambda: list(update.deltas()), "taken apart"),
        (lambda: update.to("dense"), "taken apart"),
        (lambda: update.parts[0].plus(update.parts[0]), "added"),
    ):
        with pytest.raises(TypeError, match=f"a {kind} part cannot be {words}: it is not a difference of weights"):
            act()
    view = view_of()
    before = everything(view)
    with pytest.raises(TypeError, match=f"a {kind} part cannot be scaled"), update.bind(view, scale=0.5):
        pass
    assert everything(view)["numbers"] == before["numbers"]


@pytest.mark.parametrize("form", [k for k in MADE if k not in ("dense", "sparse", "lowrank")])
def test_no_differences_are_brought_into_other_forms(form):
    with pytest.raises(ValueError, match=f"form '{form}': differences of weights cannot be brought into it"):
        of(MADE["dense"](0)).to(form)


def test_a_form_that_there_is_not_and_a_missing_limit_are_named():
    with pytest.raises(ValueError, match="form 'densest': there are dense, sparse, lowrank"):
        of(MADE["dense"](0)).to("densest")
    with pytest.raises(ValueError, match="form 'lowrank': needs rank="):
        of(MADE["lowrank"](0)).to("lowrank")


# --- the vector space ---


def equal(u: Update, v: Update, atol: float = 1e-6) -> None:
    left, right = u.dense(), v.dense()
    for n in left.keys() | right.keys():
        zero = torch.zeros(SHAPES[n])
        torch.testing.assert_close(left.get(n, zero), right.get(n, zero), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(LINEAR, LINEAR)))
def test_the_laws_of_a_vector_space_hold_for_each_pair(one, other):
    u, v, w = of(MADE[one](0)), of(MADE[other](20)), of(MADE[one](40), MADE[other](60))
    by_hand = {n: u.dense().get(n, 0) + v.dense().get(n, 0) for n in u.dense().keys() | v.dense().keys()}
    equal(u + v, of(Dense(by_hand)))
    equal(u + v, v + u)
    equal((u + v) + w, u + (v + w))
    equal(-2.0 * (u + v), (-2.0 * u) + (-2.0 * v))
    equal(0.25 * u + 0.75 * u, u)
    equal(2.0 * (3.0 * v), 6.0 * v)
    equal(u + -1.0 * u, 0.0 * u)
    assert [p.kind for p in (u + v).parts] == ([one] if one == other else [one, other])
    product = sum(float((t.double() * v.dense()[n].double()).sum()) for n, t in u.dense().items() if n in v.dense())
    assert abs(product) > 1e-6 or not u.dense().keys() & v.dense().keys()
    assert u.inner(v) == pytest.approx(product, rel=1e-4, abs=1e-9) == v.inner(u)
    assert (u + v).inner(w) == pytest.approx(u.inner(w) + v.inner(w), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(LINEAR, LINEAR)))
def test_two_forms_bound_together_are_their_sum_in_the_weights(one, other):
    view, fresh, both = view_of(), view_of(), of(MADE[one](0)) + of(MADE[other](20))
    with torch.no_grad():
        for n, d in both.dense().items():
            fresh.weight(n).add_(0.5 * d)
    expected = states(fresh)
    with both.bind(view, scale=0.5):
        torch.testing.assert_close(states(view), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", LINEAR)
def test_conversion_to_dense_loses_nothing_and_back_little(kind):
    update = (
        of(MADE[kind](0))
        if kind != "dense"
        else of(Dense({n: t for n, t in MADE["dense"](0).changes.items() if n == Q}))
    )
    dense, error = update.to("dense")
    assert error == 0.0 and [p.kind for p in dense.parts] == ["dense"]
    equal(dense, update)
    low, error = update.to("lowrank", rank=32)
    assert error < 1e-5
    equal(low, update, atol=1e-5)
    half, error = update.to("sparse", density=0.01)
    gap = (half + -1.0 * update).inner(half + -1.0 * update) / update.inner(update)
    assert error == pytest.approx(gap**0.5, rel=1e-4) and 0.1 < error < 1


# --- where parts meet ---


def test_differences_of_a_replaced_tensor_are_written_over_bound_or_merged():
    """A low-rank part binds beside the weight, where a later replacement would not reach it."""
    view, alone, fresh = view_of(), of(MADE["replace"](0)), view_of()
    both = of(low_rank(3, V), *alone.parts)
    with alone.bind(view):
        expected = states(view)
    with both.bind(view):
        torch.testing.assert_close(states(view), expected, atol=1e-6, rtol=0)
    both.merge_into(fresh.module)
    torch.testing.assert_close(states(fresh), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("around", ["modules", "peft"])
def test_a_layer_that_a_later_part_takes_gets_its_differences_in_the_weights(around):
    view, fresh = view_of(), view_of()
    names = (Q, "model.layers.1.mlp.down_proj.weight")
    both = of(low_rank(3, *names), MADE[around](0))
    with torch.no_grad():
        for n, d in of(low_rank(3, *names)).dense().items():
            fresh.weight(n).add_(d)
    outside = Update(fresh.base, (MADE[around](0),))
    with outside.bind(fresh):
        expected = states(fresh)
    before = everything(view)
    with both.bind(view):
        torch.testing.assert_close(states(view), expected, atol=2e-6, rtol=1e-6)
    after, tensors = everything(view), before.pop("tensors")
    assert all(torch.equal(t, tensors[n]) for n, t in after.pop("tensors").items()) and after == before


def test_low_rank_parts_stay_beside_the_weights_elsewhere():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    with of(MADE["lowrank"](0), MADE["modules"](0)).bind(view):
        assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


# --- one class and one line ---


@dataclass(frozen=True)
class Shift(Part):
    """One number added to every entry of a parameter."""

    kind: ClassVar[str] = "shift"
    order: ClassVar[Order] = Order.DELTAS
    linear: ClassVar[bool] = True
    name: str
    by: float

    def tensors(self) -> dict[str, Tensor]:
        return {"by": torch.tensor([self.by])}

    def header(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> Self:
        return cls(header["name"], float(tensors["by"]))

    def problems(self, shapes: Shapes) -> Iterator[str]:
        if self.name not in shapes:
            yield f"the base has no {self.name}"

    def names(self) -> Collection[str]:
        return [self.name]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        yield self.name, torch.full(SHAPES[self.name], self.by)

    def plus(self, other: Self) -> Self:
        return type(self)(self.name, self.by + other.by)

    def times(self, c: float) -> Self:
        return type(self)(self.name, c * self.by)

    def bind(self, view: Any, scale: float = 1.0) -> Change:
        return binding.add_to_weights(self, view, scale)

    def merge_into(self, model: nn.Module) -> None:
        binding.merge_deltas(self, model)


def test_a_form_of_somebody_else_needs_one_class_and_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(FORMS, "shift", Shift)
    update, view, fresh = of(Shift(Q, 0.5)), view_of(), view_of()
    save_update(2.0 * update + of(MADE["sparse"](0)), tmp_path)
    again = load(tmp_path)
    assert [p.kind for p in again.parts] == ["shift", "sparse"] and again.only(Shift) is None
    assert update.only(Shift) == Shift(Q, 0.5) and update.to("sparse", density=0.5)[1] == pytest.approx(0.5**0.5)
    again.merge_into(fresh.module)
    with again.bind(view):
        torch.testing.assert_close(states(view), states(fresh), atol=1e-6, rtol=0)
    replaced = of(Replace({Q: torch.zeros(SHAPES[Q])})).then(update)
    assert torch.equal(replaced.parts[-1].tensors()[Q], torch.full((32, 32), 0.5))


def test_nobody_outside_of_the_room_asks_which_form_a_part_is():
    forms = "|".join(form.__name__ for form in FORMS.values())
    asking = re.compile(rf"isinstance\([^\n]*\b({forms})\b|\b(p|part)\.kind (==|!=|in|not in) ")
    root = Path(luthier.__file__).parent
    found = [
        f"{path.relative_to(root)}:{i}: {line.strip()}"
        for path in root.rglob("*.py") if path.parent.name != "update"
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if asking.search(line)
    ]  # fmt: skip
    assert not found, "\n".join(found)


# --- what is refused ---


@kinds
def test_one_number_that_is_not_finite_is_a_problem(kind):
    part = MADE[kind](0)
    for name, t in part.tensors().items():
        if t.is_floating_point():
            broken = {**part.tensors(), name: t.clone()}
            broken[name].view(-1)[-1] = float("nan")
            assert any("finite" in p for p in type(part).restore(broken, part.header()).problems(SHAPES)), name


@pytest.mark.parametrize(
    ("given", "scalars"),
    [
        (torch.tensor([[3, 8]]), torch.ones(1, 2, dtype=torch.float64)),
        (torch.tensor([3, 8]), torch.ones(3, dtype=torch.float64)),
        (torch.tensor([3, 8], dtype=torch.int32), torch.ones(2, dtype=torch.float64)),
    ],
    ids=["a table", "another number", "32 bits"],
)
def test_seeds_and_scalars_pair_up(given, scalars):
    assert list(Seeds(given, scalars, {V: SHAPES[V]}).problems(SHAPES)) == ["seeds and scalars do not pair up"]


def test_factors_become_whole_tensors_where_these_are_asked_for():
    part = low_rank(0)
    found, lost = part.to(Dense, rank=1)
    assert isinstance(found, Dense) and lost == 0.0
    assert all(torch.equal(found.changes[n], d) for n, d in part.deltas())


def test_peft_takes_factors_with_heads_and_nothing_else():
    part, head, prompt = low_rank(0), Replace({"score.weight": torch.ones(2, 32)}), Prompt(drawn(0, 3, 32))
    assert part.peft([]) is not None and part.peft([head]) is not None
    assert part.peft([prompt]) is part.peft([head, prompt]) is None


@kinds
def test_bound_the_base_is_still_there_to_be_asked(kind):
    view = view_of()
    plain = states(view)
    with of(MADE[kind](0)).bind(view):
        changed = states(view)
        with view.without_update():
            torch.testing.assert_close(states(view), plain, atol=1e-6, rtol=0)
        assert torch.equal(states(view), changed) and changed.shape == plain.shape
        assert float((changed - plain).abs().max()) > 1e-4


def adapter_folder(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Path:
    """What peft writes."""
    save_file({f"{PEFT_PREFIX}{n}": t for n, t in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


def test_pefts_patterns_of_ranks_are_matched_as_peft_does(tmp_path):
    """The last part of a name is enough: 8 / 4 for q_proj, 4 / 2 elsewhere but 1 / 2 where the whole name is given."""
    ranks = {Q: 4, V: 2, UP: 2}
    state = {}
    for n, r in ranks.items():
        module = n.removesuffix(".weight")
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = drawn(0, r, 32), drawn(1, SHAPES[n][0], r)
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8, V.removesuffix(".weight"): 1}}
    (part,) = load_adapter(adapter_folder(patterns, state, tmp_path), VIEW.base).parts
    assert isinstance(part, LowRank) and part.scale == {Q: 2.0, V: 0.5, UP: 2.0}
    (plain,) = load_adapter(adapter_folder({}, state, tmp_path), VIEW.base).parts
    assert plain.scale == {Q: 2.0, V: 2.0, UP: 2.0}, "an old configuration without patterns"
    with pytest.raises(LuthierError, match="adapter_config.json: is no adapter configuration"):
        load_adapter(adapter_folder({"rank_pattern": {"(": 4}}, state, tmp_path), VIEW.base)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"lora_bias": True}, {"lora_B.bias": torch.ones(32)}),
        ({"alora_invocation_tokens": [5, 6]}, {}),
        ({"use_dora": True}, {}),
        ({"init_lora_weights": "pissa"}, {}),
        ({"bias": "lora_only"}, {"bias": torch.ones(32)}),
    ],
)
def test_a_lora_that_is_more_than_two_factors_is_pefts_own(config, more, tmp_path):
    layer = Q.removesuffix(".weight")
    tensors = {"lora_A.weight": drawn(0, 2, 32), "lora_B.weight": drawn(1, 32, 2), **more}
    folder = adapter_folder(config, {f"{layer}.{n}": t for n, t in tensors.items()}, tmp_path)
    (part,) = load_adapter(folder, VIEW.base).parts
    assert isinstance(part, PeftPart) and len(part.state) == len(tensors)


@pytest.mark.parametrize("form", ["sparse", "lowrank"])
def test_of_nothing_nothing_is_lost(form):
    limits = {"rank": 1, "density": 0.5}
    found, lost = of(Dense({Q: torch.zeros(SHAPES[Q])})).to(form, **limits)
    assert lost == 0.0 and not found.dense()[Q].any()
    assert 0.1 < of(MADE["dense"](0).without([NORM])).to(form, **limits)[1] < 1


def test_an_update_adds_where_all_of_its_parts_do():
    assert of(MADE["dense"](0), low_rank(0)).linear and not of(MADE["dense"](0), MADE["prompt"](0)).linear


def test_bound_it_says_which_parameters_it_writes():
    view = view_of()
    with of(MADE["dense"](0), MADE["prompt"](0)).bind(view):
        assert view.attached[-1].writes == {Q, NORM}
    assert not view.attached
