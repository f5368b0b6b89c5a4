"""Differences of weights, by hand: limits of forms, what is checked, what a cut leaves, noise that all parties share."""

import pytest
import torch

from luthier.model.adapter_folder import PEFT_PREFIX
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.tuners import Peft
from luthier.update import Dense, LowRank, Replace, Seeds, Sparse, Structure, Update
from luthier.update.base import PeftFolder
from luthier.update.vectors import noise

Q, V, UP = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight",
)  # fmt: skip
SHAPES = {Q: (32, 32), V: (16, 32), UP: (64, 32)}


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(ranks, seed=0, **more):
    a = {n: drawn(seed, r, SHAPES[n][1]) for n, r in ranks.items()}
    return LowRank(
        a, {n: drawn(seed + 1, SHAPES[n][0], r) for n, r in ranks.items()}, dict.fromkeys(ranks, 0.5), **more
    )


# --- sparse ---


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_a_density_is_a_share(density):
    with pytest.raises(ValueError, match=r"density = .*: should lie in \(0, 1\]"):
        Sparse.nearest({Q: torch.ones(32, 32)}, density=density)


def test_the_largest_numbers_are_kept_whatever_their_sign_and_one_at_least():
    values = torch.tensor([0.5, -3.0, 1.0, 2.0])
    two, one = (Sparse.nearest({"norm": values}, density=d) for d in (0.5, 0.01))
    assert two.indices["norm"].tolist() == [1, 3] and two.values["norm"].tolist() == [-3.0, 2.0]
    assert one.indices["norm"].tolist() == [1] and one.values["norm"].tolist() == [-3.0]


@pytest.mark.parametrize("places", [[5, 1024], [-1, 5], [1024]])
def test_a_place_outside_of_the_matrix_is_named(places):
    part = Sparse({Q: torch.tensor(places)}, {Q: torch.ones(len(places))}, {Q: (32, 32)})
    assert list(part.problems(SHAPES)) == [f"{Q}: an index lies outside 0..1023"]
    last = Sparse({Q: torch.tensor([0, 1023])}, {Q: torch.ones(2)}, {Q: (32, 32)})
    assert not list(last.problems(SHAPES))


def test_places_of_a_bias_move_up_where_neurons_are_removed():
    view, bias = view_of("bert"), "bert.encoder.layer.1.intermediate.dense.bias"
    part = Sparse({bias: torch.tensor([0, 1, 6, 63])}, {bias: torch.tensor([1.0, 2.0, 3.0, 4.0])}, {bias: (64,)})
    left = part.cut_by(Structure.removing(view.anatomy, neurons={1: [0, 5, 63]}))
    assert left.indices[bias].tolist() == [0, 4] and left.values[bias].tolist() == [2.0, 3.0]
    assert left.shapes == {bias: (61,)}


# --- low-rank ---


def test_factors_of_different_matrices_are_at_right_angles():
    one, other = low_rank({Q: 2, V: 3}), low_rank({V: 2, UP: 2}, seed=5)
    assert low_rank({Q: 2}).inner(low_rank({UP: 2})) == 0.0
    expected = float((dict(one.deltas())[V].double() * dict(other.deltas())[V].double()).sum())
    assert one.inner(other) == pytest.approx(expected, rel=1e-5)


def test_factors_wider_than_their_matrix_are_brought_to_its_rank():
    part = low_rank({V: 40})
    found, lost = part.compacted(32)
    assert found.a[V].shape == (16, 32) and found.b[V].shape == (16, 16) and lost == 0.0
    torch.testing.assert_close(dict(found.deltas())[V], dict(part.deltas())[V], atol=1e-4, rtol=1e-5)


def test_factors_of_zero_lose_nothing():
    part = LowRank({Q: torch.zeros(2, 32)}, {Q: torch.ones(32, 2)}, {Q: 1.0})
    assert part.compacted(1)[1] == 0.0


def test_factors_of_two_ranks_do_not_fit():
    part = LowRank({Q: torch.ones(2, 32)}, {Q: torch.ones(32, 3)}, {Q: 1.0})
    assert list(part.problems(SHAPES)) == [f"{Q}: B A is None, the base (32, 32)"]


def test_factors_that_are_left_out_take_their_orientation_with_them():
    part = low_rank({Q: 2, UP: 2}, transposed=frozenset((Q, UP)))
    assert part.without([Q]).transposed == frozenset([UP]) and list(part.without([Q]).a) == [UP]


def test_factors_are_not_bound_beside_a_layer_whose_norms_are_read():
    view = view_of()
    Peft(type="LORA", options={"r": 2, "use_dora": True}).attach(view)
    with (
        pytest.raises(LuthierError, match="q_proj has a DoRA adapter, whose norms would not see a low-rank term"),
        Update(view.base, (low_rank({Q: 2}),)).bind(view),
    ):
        pass


def test_pefts_folder_by_hand():
    """The most common rank is the rank; alpha = scale * rank, here 0.5 * 2 and 0.5 * 4."""
    part, score = low_rank({Q: 4, V: 2, UP: 2}), torch.ones(2, 32)
    head = Replace(
        {"score.weight": score, "classifier.dense.weight": drawn(1, 3, 3), "classifier.dense.bias": drawn(2, 3)}
    )
    alone, both = part.peft([]), part.peft([head])
    q = Q.removesuffix(".weight")
    for folder in (alone, both):
        assert (folder.config["r"], folder.config["lora_alpha"]) == (2, 1.0)
        assert folder.config["rank_pattern"] == {q: 4} and folder.config["alpha_pattern"] == {q: 2.0}
        assert folder.config["inference_mode"] is True and folder.config["fan_in_fan_out"] is False
        assert torch.equal(folder.tensors[f"base_model.model.{q}.lora_A.weight"], part.a[Q])
    assert alone.config["modules_to_save"] is None and both.config["modules_to_save"] == ["classifier", "score"]
    assert both.tensors.keys() - alone.tensors.keys() == {f"base_model.model.{n}" for n in head.values}
    assert torch.equal(both.tensors["base_model.model.score.weight"], score)
    assert low_rank({Q: 2}, transposed=frozenset([Q])).peft([]).config["fan_in_fan_out"] is True


# --- seeds ---


@pytest.mark.parametrize(
    ("seed", "index", "mixed"),
    [
        # (seed * 11400714819323198485 + (index + 1) * 13787848793156543929) mod 9223372036854775808
        (3, 0, 1873133066852260344),
        (3, 1, 6437609823154028465),
        (99_999_999_999, 2, 2098744528533273878),
    ],
)
def test_noise_is_the_same_for_every_party_and_version(seed, index, mixed):
    assert (seed * 11400714819323198485 + (index + 1) * 13787848793156543929) % 9223372036854775808 == mixed
    expected = torch.randn(4, 3, generator=torch.Generator().manual_seed(mixed))
    assert torch.equal(noise(seed, index, (4, 3)), expected)


def test_each_seed_counts_as_often_as_its_scalar_says():
    given, scalars = torch.tensor([3, 8, 9]), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    found = dict(Seeds(given, scalars, {Q: (32, 32), V: (16, 32)}).deltas())
    for index, (name, shape) in enumerate(((Q, (32, 32)), (V, (16, 32)))):
        torch.testing.assert_close(found[name], noise(3, index, shape) - noise(8, index, shape))


def test_seeds_of_which_one_parameter_is_shortened_become_whole_differences():
    view = view_of()
    part = Seeds(torch.tensor([3]), torch.tensor([0.5], dtype=torch.float64), {UP: SHAPES[UP], Q: SHAPES[Q]})
    left = part.cut_by(Structure.removing(view.anatomy, {0: [2, 3]}))
    assert isinstance(left, Dense) and {n: tuple(t.shape) for n, t in left.changes.items()} == {
        UP: (64, 32),
        Q: (16, 32),
    }
    torch.testing.assert_close(left.changes[UP], 0.5 * noise(3, 0, (64, 32)))
    torch.testing.assert_close(left.changes[Q], 0.5 * noise(3, 1, (32, 32))[:16])
    assert part.cut_by(Structure.removing(view.anatomy, {2: [2, 3]})) is part


# --- from peft's folder ---


@pytest.mark.parametrize("root, q, up", [(False, 3 / 4, 5 / 16), (True, 3 / 2, 5 / 4)])
def test_the_scale_of_factors_is_alpha_over_the_rank_or_its_root(root, q, up):
    config = {
        "peft_type": "LORA", "use_rslora": root, "r": 4, "lora_alpha": 3,
        "rank_pattern": {"up_proj": 16}, "alpha_pattern": {"up_proj": 5},
    }  # fmt: skip
    ranks = {Q: 4, UP: 16}
    tensors = {}
    for name, rank in ranks.items():
        module = PEFT_PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = drawn(0, rank, SHAPES[name][1])
        tensors[f"{module}.lora_B.weight"] = drawn(1, SHAPES[name][0], rank)
    part = LowRank.from_peft(PeftFolder(config, tensors))
    assert isinstance(part, LowRank) and part.scale == {Q: q, UP: up}
