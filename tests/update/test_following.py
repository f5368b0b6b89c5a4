"""A tuner on top of an update: both together are one update of the base, and it is the live model."""

from contextlib import ExitStack

import pytest
import torch

from luthier.model.fingerprint import Fingerprint
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners import Adapter, Dept, Full, Layerwise, Lora, Peft, Spiel
from luthier.update import Dense, LowRank, Modules, Prompt, Replace, Seeds, Sparse, Structure, Update
from luthier.update.files import load, save_update, verify_update

Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
TUNERS = {
    "lora": Lora(rank=4), "wide lora": Lora(rank=2, alpha=8, seed=5), "full": Full(), "layerwise": Layerwise(reinit_blocks=1),
    "spiel": Spiel(density=0.05), "adapter": Adapter(rank=2, init_std=0.05), "dept": Dept(length=4, rank=2, max_length=8),
}  # fmt: skip
SETTINGS = TrainSettings(
    max_steps=3, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0, lr_scheduler_type="constant"
)


def states(view):
    return view.trace(batch_of()).hidden[-1].detach()


def trained(view, tuner):
    """The live trainable after three steps."""
    trainable = tuner.attach(view, None, 3)
    loop = Loop(view, rows_of(), trainable, Sft(), SETTINGS)
    for _ in range(3):
        loop.step()
    view.module.eval()
    return trainable


def first_of(tuner, view):
    trainable = trained(view, tuner)
    update = trainable.update()
    trainable.detach()
    return update


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        ("lora", "full", ["lowrank", "dense"]),
        ("full", "lora", ["dense", "lowrank"]),
        ("lora", "wide lora", ["lowrank"]),
        ("full", "full", ["dense"]),
        ("spiel", "lora", ["sparse", "lowrank"]),
        ("lora", "spiel", ["lowrank", "sparse"]),
        ("layerwise", "lora", ["dense", "lowrank", "replace"]),
        ("layerwise", "full", ["dense", "replace"]),
        ("lora", "layerwise", ["lowrank", "dense", "replace"]),
        ("lora", "adapter", ["lowrank", "modules"]),
        ("adapter", "full", ["dense", "modules"]),
        ("lora", "dept", ["lowrank", "prompt"]),
        ("dept", "lora", ["lowrank", "prompt"]),
    ],
)
def test_both_stages_together_are_the_live_model(first, second, kinds, tmp_path):
    view = view_of()
    base = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    before = first_of(TUNERS[first], view)
    with before.in_place(view):
        started = states(view)
        trainable = trained(view, TUNERS[second])
        live, later = states(view), trainable.update()
        assert float((live - started).abs().max()) > 1e-3
        whole = before.then(later)
        save_update(whole, tmp_path, view)
        trainable.detach()
        assert torch.equal(states(view), started)
    assert all(torch.equal(p, base[n]) for n, p in view.module.named_parameters())
    assert sorted(p.kind for p in whole.parts) == sorted(kinds)
    again = load(tmp_path)
    assert again.digest() == whole.digest()
    with again.bind(view):
        torch.testing.assert_close(states(view), live, atol=1e-5, rtol=1e-5)
    if "dept" not in (first, second):
        fresh = view_of()
        whole.merge_into(fresh.module)
        torch.testing.assert_close(states(fresh), live, atol=1e-5, rtol=1e-5)


def test_in_place_every_difference_is_in_the_weights():
    view = view_of()
    update = first_of(Lora(rank=4), view)
    with update.bind(view):
        beside = states(view)
    with update.in_place(view):
        torch.testing.assert_close(states(view), beside, atol=5e-6, rtol=5e-6)  # another order of sums in float32
        assert not any("forward" in vars(m) for m in view.module.modules())


def test_in_bf16_small_differences_survive_in_the_mean():
    """Far below a step of bf16: rounding to nearest would leave every weight where it is."""
    view = view_of()
    view.module.to(torch.bfloat16)
    weight = view.weight(Q).detach().float()
    large = weight.abs() > 0.01  # where a step is 6e-5 or more
    update, moved = Update(view.base, (Dense({Q: torch.full((32, 32), 1e-5)}),)), []
    for way in (update.bind, update.in_place, update.in_place):
        with way(view):
            moved.append((view.weight(Q).detach().float() - weight)[large])
    assert not moved[0].any() and torch.equal(moved[1], moved[2])
    assert 0.5e-5 < float(moved[1].mean()) < 1.5e-5


def test_a_saved_composition_is_verified_as_every_run_is(tmp_path):
    view = view_of()
    before = first_of(Lora(rank=4), view)
    with before.in_place(view):
        trainable = trained(view, Full())
        whole = before.then(trainable.update())
        trainable.detach()
    for saved, name in ((whole, "whole"), (before, "half")):
        save_update(saved, tmp_path / name, view)
    with ExitStack() as live:
        live.enter_context(whole.bind(view))
        assert verify_update(tmp_path / "whole", live.close, view, rows_of()[0]) < 1e-5
        live.enter_context(whole.bind(view))
        with pytest.raises(LuthierError, match="what was saved is not what was trained"):
            verify_update(tmp_path / "half", live.close, view, rows_of()[0])


def test_a_binding_that_fails_half_way_is_taken_back():
    view = view_of()
    before, plain = {n: p.detach().clone() for n, p in view.module.named_parameters()}, states(view)
    last = "model.layers.2.mlp.down_proj.weight"
    dora = first_of(Peft(type="LORA", options={"r": 2, "use_dora": True}), view).parts
    update = Update(view.base, (Dense({NORM: drawn(0, 32)}), low_rank(1, last), *dora))
    with Update(view.base, dora).bind(view):  # peft stands in a layer's place once
        carried = states(view)
        with pytest.raises((ValueError, LuthierError)), update.bind(view):
            pass
        assert torch.equal(states(view), carried)
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters()) and torch.equal(
        states(view), plain
    )


def test_peft_modules_cannot_be_trained_on_top_of():
    view = view_of()
    dora = first_of(Peft(type="LORA", options={"r": 2, "use_dora": True}), view)
    with pytest.raises(LuthierError, match="a peft part stands in the layers' places"), dora.in_place(view):
        pass
    later = Update(view.base, (Dense({Q: torch.zeros(32, 32)}),))
    with pytest.raises(TypeError, match="a dense part cannot follow a peft part"):
        dora.then(later)
    prompt = Update(view.base, (Prompt(torch.zeros(2, 32)),))
    assert [p.kind for p in dora.then(prompt).parts] == ["peft", "prompt"]
    with later.then(dora).bind(view):
        pass


# --- by hand ---


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VIEW = view_of()
SHAPES = {n: tuple(p.shape) for n, p in VIEW.module.named_parameters()}


def of(*parts):
    return Update(VIEW.base, parts)


def low_rank(seed, name=Q):
    out, into = SHAPES[name]
    return LowRank({name: drawn(seed, 2, into)}, {name: drawn(seed + 1, out, 2)}, {name: 0.5})


def test_a_replaced_tensor_takes_up_what_is_added_later_and_drops_what_was_added_before():
    value, other = drawn(0, 32, 32), drawn(1, 32, 32)
    (delta,) = of(low_rank(2)).dense().values()
    (part,) = of(Replace({Q: value})).then(of(low_rank(2))).parts
    torch.testing.assert_close(part.values[Q], value + delta)
    first, rest = of(Replace({Q: value})).then(of(low_rank(2), low_rank(4, UP))).parts
    assert list(first.a) == [UP] and list(rest.values) == [Q]
    (part,) = of(low_rank(2), Replace({NORM: torch.ones(32)})).then(of(Replace({Q: other}))).parts
    assert torch.equal(part.values[Q], other) and torch.equal(part.values[NORM], torch.ones(32))


def test_seeds_keep_their_places_where_one_of_their_parameters_is_replaced():
    seeds = Seeds(torch.tensor([3, 8]), torch.tensor([0.1, -0.2], dtype=torch.float64), {UP: SHAPES[UP], Q: SHAPES[Q]})
    whole, value = of(seeds).then(of(Replace({UP: torch.zeros(SHAPES[UP])}))), of(seeds).dense()[Q]
    fresh = view_of()
    whole.merge_into(fresh.module)
    assert not fresh.weight(UP).any()
    torch.testing.assert_close(fresh.weight(Q).detach(), VIEW.weight(Q).detach() + value)
    again = of(Replace({UP: torch.zeros(SHAPES[UP])})).then(of(seeds))
    torch.testing.assert_close(again.parts[-1].values[UP], of(seeds).dense()[UP])


def test_modules_behind_modules_are_one_part_that_does_both():
    layer = "model.layers.1.mlp.down_proj"
    made = [Modules({layer: 0.3 * drawn(s, 2, 32)}, {layer: 0.3 * drawn(s + 1, 32, 2)}) for s in (0, 5)]
    (both,) = of(made[0]).then(of(made[1])).parts
    h = drawn(9, 7, 32)
    for m in made:
        h = h + (h @ m.a[layer].T) @ m.b[layer].T
    x = drawn(9, 7, 32)
    torch.testing.assert_close(x + (x @ both.a[layer].T) @ both.b[layer].T, h, atol=1e-5, rtol=1e-5)
    other = Modules(
        {"model.layers.0.mlp.down_proj": drawn(3, 2, 32)}, {"model.layers.0.mlp.down_proj": drawn(4, 32, 2)}
    )
    assert set(of(made[0]).then(of(other)).parts[0].a) == {layer, "model.layers.0.mlp.down_proj"}


def test_three_stages_are_the_same_whichever_two_are_joined_first():
    view = view_of()
    a = of(low_rank(0), Sparse({UP: torch.tensor([4])}, {UP: torch.ones(1)}, {UP: SHAPES[UP]}))
    b = of(Structure.removing(view.anatomy, {0: [2, 3]}))
    c = of(Dense({Q: drawn(1, 16, 32)}), Replace({UP: drawn(2, 64, 32)}))
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert [p.kind for p in left.parts] == ["structure", "lowrank", "dense", "replace"]
    assert left.digest() == right.digest()


def test_nothing_before_or_after_changes_nothing():
    view = view_of()
    update = first_of(Lora(rank=2), view)
    assert of().then(update) is update and update.then(of()) is update
    assert update.then(of(low_rank(0))).chart is None


def test_updates_of_other_bases_do_not_follow_each_other():
    with pytest.raises(TypeError, match="different bases cannot follow each other"):
        of().then(Update(Fingerprint(name="other", weights="w", tokenizer="t"), ()))
