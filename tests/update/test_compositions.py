"""Replaced tensors, small modules and peft's adapters: what they merge into, what follows them, what they refuse."""

from dataclasses import replace

import pytest
import torch

from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.tuners import Peft
from luthier.update import Dense, LowRank, Modules, PeftPart, Prompt, Replace, Update
from luthier.update.base import Cut

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj"
VIEW = view_of()
SHAPES = VIEW.anatomy.parameters


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dora():
    (part,) = (
        Peft(type="LORA", options={"r": 2, "use_dora": True, "lora_dropout": 0.5}).attach(view_of()).update().parts
    )
    assert isinstance(part, PeftPart)
    return part


def test_what_is_left_of_a_cut_dimension():
    cut, value = Cut(1, torch.tensor([0, 3])), torch.arange(10.0).reshape(2, 5)
    assert cut.of(value).tolist() == [[1.0, 2.0, 4.0], [6.0, 7.0, 9.0]]
    assert cut.shape((2, 5)) == (2, 3) and cut.shape((2, 5, 4)) == (2, 3, 4)
    assert Cut(0, torch.tensor([6])).shape((7, 3)) == (6, 3)


def test_a_head_is_one_only_where_all_its_tensors_belong_to_heads():
    one, other = torch.ones(2, 32), torch.ones(32, 32)
    head = Replace({"score.weight": one, "classifier.dense.weight": other})
    assert head.as_head() == {"score.weight": one, "classifier.dense.weight": other}
    mixed = Replace({"score.weight": one, Q: other})
    assert mixed.as_head() is None
    factors = LowRank({Q: torch.ones(2, 32)}, {Q: torch.ones(32, 2)}, {Q: 1.0})
    assert factors.peft([head]) is not None and factors.peft([mixed]) is None, "peft would leave the layer out"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({DOWN: torch.ones(2, 32)}, {}),
        ({DOWN: torch.ones(2, 32)}, {DOWN: torch.ones(32, 3)}),
        ({DOWN: torch.ones(2, 32, 1)}, {DOWN: torch.ones(1, 32, 2)}),
    ],
    ids=["without B", "another rank", "no matrices"],
)
def test_small_modules_whose_matrices_do_not_pair_up_are_named(a, b):
    assert list(Modules(a, b).problems(SHAPES)) == [f"{DOWN}: A and B do not pair up"]


def test_small_modules_behind_a_layer_with_a_bias_are_merged_into_both():
    view, layer = view_of("bert"), "bert.encoder.layer.0.intermediate.dense"
    module = view.module.get_submodule(layer)
    with torch.no_grad():
        module.bias.copy_(drawn(0, 64))
    x, a, b = drawn(1, 5, 32), 0.3 * drawn(2, 2, 64), 0.3 * drawn(3, 64, 2)
    h = x.double() @ module.weight.double().T + module.bias.double()
    expected = h + h @ a.double().T @ b.double().T
    update = Update(view.base, (Modules({layer: a}, {layer: b}),))
    with update.bind(view):
        torch.testing.assert_close(module(x).double(), expected, atol=1e-5, rtol=1e-5)
    update.merge_into(view.module)
    torch.testing.assert_close(module(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_small_modules_keep_a_later_part_of_another_form_behind_them():
    part, prompt = Modules({DOWN: drawn(0, 2, 32)}, {DOWN: drawn(1, 32, 2)}), Prompt(drawn(2, 3, 32))
    assert part.followed_by(prompt) == (part, prompt)
    dense = Dense({Q: drawn(3, 32, 32)})
    assert part.followed_by(dense) == (part, dense)


def test_pefts_layers_are_all_there_or_the_part_does_not_fit(dora):
    targets = sorted(dora.config["target_modules"])
    assert not list(dora.problems(SHAPES))
    for other in ([*targets, "nowhere_proj"], ["nowhere_proj"], "all-linear"):
        part = replace(dora, config={**dora.config, "target_modules": other})
        assert list(part.problems(SHAPES)) == ["it adapts layers that the base has not"]


def test_bound_pefts_modules_are_not_trained_and_drop_nothing(dora):
    view = view_of()
    flags = {id(p): p.requires_grad for p in view.module.parameters()}
    with Update(view.base, (dora,)).bind(view):
        view.module.train()
        found = {n: p.requires_grad for n, p in view.module.named_parameters() if "lora_" in n}
        assert found and not any(found.values())
        layer = view.module.get_submodule(DOWN)
        x = drawn(0, 4, 64)
        assert torch.equal(layer(x), layer(x)), "without dropout"
    assert {id(p): p.requires_grad for p in view.module.parameters()} == flags


def test_an_adapter_with_tensors_that_have_no_place_leaves_the_model_as_it_was(dora):
    view = view_of()
    names = [n for n, _ in view.module.named_modules()]
    key = next(n for n in dora.state if "lora_A" in n)
    for name, words in (
        (key.replace(".0.", ".77."), "holds tensors the base has no place for: .*77"),
        (key, "cannot be put on the base"),
    ):
        broken = replace(dora, state={**dora.state, name: torch.ones(3, 5)})
        with pytest.raises(LuthierError, match=words), Update(view.base, (broken,)).bind(view):
            pass
        assert [n for n, _ in view.module.named_modules()] == names
    with Update(view.base, (dora,)).bind(view):
        assert [n for n, _ in view.module.named_modules()] != names


def test_what_is_put_on_layers_may_follow_pefts_modules(dora):
    later = Modules({DOWN: drawn(0, 2, 32)}, {DOWN: drawn(1, 32, 2)})
    assert dora.followed_by(later) == (dora, later)
    with pytest.raises(TypeError, match="a replace part cannot follow a peft part"):
        dora.followed_by(Replace({Q: torch.ones(32, 32)}))


def test_pefts_folder_says_that_the_adapter_is_for_use_as_pefts_own_do(dora):
    training = replace(dora, config={**dora.config, "inference_mode": False})
    folder = training.peft([])
    assert folder.config["inference_mode"] is True and folder.tensors == dora.state
    assert training.peft([Prompt(torch.ones(2, 32))]) is None
