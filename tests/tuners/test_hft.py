"""The exact checks of the sheet; numbers in names are the sheet's. 7 is a claim."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf

from luthier.model.anatomy import Anatomy
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import labelled_rows, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.hft import Hft, categories, counts, draw_plan, half_reset
from luthier.update import Update

SETTINGS = TrainSettings(max_steps=20, batch_size=4, learning_rate=1e-3, weight_decay=0.1)


def of(plan, block, *names):
    return sorted(n for n in names if any(p.startswith(f"model.layers.{block}.") and f".{n}." in p for p in plan))


@pytest.mark.parametrize("layers", [3, 4, 7])
@pytest.mark.parametrize("balance", ["params", "tensors"])
def test_1_counts_in_every_block_and_over_all(layers, balance):
    anatomy = view_of(layers=layers).anatomy
    for seed in range(20):
        plan, ffn = draw_plan(anatomy, balance=balance, seed=seed), []
        for b in range(layers):
            attention = of(plan, b, "q_proj", "k_proj", "v_proj", "o_proj")
            assert len(attention) == 2
            if balance == "params":
                assert len(set(attention) & {"q_proj", "o_proj"}) == 1
            assert len(of(plan, b, "input_layernorm", "post_attention_layernorm")) == 1
            ffn.append(len(of(plan, b, "gate_proj", "up_proj", "down_proj")))
        assert set(ffn) <= {1, 2} and sum(ffn) == (3 * layers + layers % 2) // 2
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= plan


def test_1_balanced_by_weights_it_is_exactly_half():
    anatomy = view_of(layers=4).anatomy
    inside = {x.name: x.shape[0] * x.shape[1] for x in anatomy.block_linears}
    shares = set()
    for seed in range(30):
        plan = draw_plan(anatomy, seed=seed)
        shares.add(sum(n for p, n in inside.items() if p in plan) / sum(inside.values()))
    assert shares == {0.5}


def test_1_the_plain_rule_is_half_only_on_average():
    """The sheet's numbers for SmolLM2-135M's shape: 47.5% to 52.1% over 2000 draws, mean 49.99%; here 100."""
    config = tf.LlamaConfig(vocab_size=8, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            intermediate_size=1536)  # fmt: skip
    with torch.device("meta"):
        anatomy = Anatomy(tf.LlamaForCausalLM(config))
    inside = {x.name: x.shape[0] * x.shape[1] for x in anatomy.block_linears}
    whole = sum(inside.values())
    shares = [sum(inside.get(p, 0) for p in draw_plan(anatomy, balance="tensors", seed=s)) / whole for s in range(100)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.002) and 0.46 < min(shares) < 0.49 and 0.51 < max(shares) < 0.54


@pytest.mark.parametrize("resample", ["stage", "epoch"])
def test_2_and_3_frozen_tensors_stay_to_the_bit_and_have_no_state(resample):
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    tuner = Hft(resample=resample)
    settings = SETTINGS.model_copy(update={"batch_size": 2, "max_steps": 6})
    loop = Loop(view, rows_of(tuple([12] * 12)), tuner.attach(view), Sft(), settings)  # one epoch
    for _ in range(6):
        loop.step()
    plan = tuner.plan(view.anatomy)
    for n, p in view.module.named_parameters():
        assert torch.equal(before[n], p) == (n not in plan), n
    with_state = {id(p) for p in loop.optimizer.state}
    assert with_state == {id(loop.trainable.master(n)) for n in plan}


def test_3_after_a_new_plan_no_state_of_what_is_frozen_is_left():
    view, tuner = view_of(), Hft(resample="epoch")
    loop = Loop(view, rows_of(tuple([12] * 8)), tuner.attach(view), Sft(), SETTINGS.model_copy(update={"max_steps": 4}))
    plans = []
    for _ in range(4):  # two steps an epoch
        before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
        loop.step()
        plan = loop.trainable.chosen
        assert {n for n, p in view.module.named_parameters() if not torch.equal(before[n], p)} == plan
        assert {id(p) for p in loop.optimizer.state} == {id(loop.trainable.master(n)) for n in plan}
        plans.append(plan)
    assert plans[0] == plans[1] != plans[2] == plans[3]
    fresh = {n for n in plans[2] if n not in plans[0]}
    steps = {n: int(loop.optimizer.state[loop.trainable.master(n)]["step"]) for n in plans[2]}
    assert all(steps[n] == 2 for n in fresh) and max(steps.values()) == 4, "newly trained tensors start from nothing"


def test_4_one_step_of_sgd_is_the_masked_gradient():
    whole, half, rows = view_of(), view_of(), rows_of()
    tuner, results = Hft(), []
    for view, t in ((whole, Full()), (half, tuner)):
        tuned = t.attach(view)
        loop = Loop(view, rows, tuned, Sft(), SETTINGS.model_copy(update={"max_grad_norm": 1e9, "weight_decay": 0.0}))
        loop.optimizer = torch.optim.SGD([p for g in tuned.groups() for p in g.params], lr=0.1)
        before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
        loop.step()
        results.append({n: p.detach() - before[n] for n, p in view.module.named_parameters()})
    plan = tuner.plan(half.anatomy)
    for n, change in results[1].items():
        wanted = results[0][n] if n in plan else torch.zeros_like(change)
        assert torch.allclose(change, wanted, atol=1e-7), n


def test_5_seeds_and_stages():
    anatomy = view_of(layers=4).anatomy
    assert draw_plan(anatomy, seed=3, stage=1) == draw_plan(anatomy, seed=3, stage=1)
    assert draw_plan(anatomy, seed=3, stage=1) != draw_plan(anatomy, seed=3, stage=2)
    assert Hft(stage=2).plan(anatomy) == draw_plan(anatomy, stage=2)
    often = {x.name: 0 for x in anatomy.block_linears if x.role in "qkvo"}
    for stage in range(20):
        for n in often.keys() & draw_plan(anatomy, stage=stage):
            often[n] += 1
    assert all(5 <= c <= 15 for c in often.values())


def test_6_half_reset():
    view, tuner = view_of(), Hft()
    for trained, plan in ((Full(), draw_plan(view.anatomy)), (tuner, tuner.plan(view.anatomy))):
        v = view_of()
        loop = Loop(v, rows_of(), trained.attach(v), Sft(), SETTINGS)
        for _ in range(3):
            loop.step()
        update = loop.trainable.update()
        names = set(update.parts[0].tensors())
        whole, nothing = half_reset(update, names), half_reset(update, ())
        assert all(torch.equal(d, update.parts[0].tensors()[n]) for n, d in whole.parts[0].tensors().items())
        assert not any(d.any() for d in nothing.parts[0].tensors().values())
        reset = half_reset(update, plan).parts[0].tensors()
        for n, d in update.parts[0].tensors().items():
            assert torch.equal(reset[n], d if n in plan else torch.zeros_like(d))
        if trained is tuner:
            assert all(torch.equal(reset[n], d) for n, d in update.parts[0].tensors().items()), "its own plan"
    with pytest.raises(KeyError, match="belongs to another model"):
        half_reset(update, ["no.such.weight"])
    from luthier.tuners.adapter import Adapter

    other = Adapter(rank=2).attach(view_of()).update()
    for parts in (other.parts, (*update.parts, *other.parts)):
        with pytest.raises(TypeError, match="whole tensors"):
            half_reset(Update(update.base, parts), ())


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("tensors", [2, 3, 4])
def test_any_share_is_met_within_one_tensor(fraction, tensors):
    for blocks in (1, 5, 12):
        found = counts(blocks, tensors, fraction, np.random.default_rng(0))
        assert abs(found.sum() - fraction * tensors * blocks) <= 0.5 and found.max() - found.min() <= 1


@pytest.mark.parametrize("level", ["layer", "model"])
def test_other_levels_take_half_too(level):
    anatomy = view_of(layers=8).anatomy
    inside = {x.name: x.shape[0] * x.shape[1] for x in anatomy.block_linears}
    plan = draw_plan(anatomy, level=level)
    assert sum(n for p, n in inside.items() if p in plan) / sum(inside.values()) == pytest.approx(0.5, abs=0.06)
    if level == "layer":
        whole = [
            len(of(plan, b, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
            for b in range(8)
        ]
        assert sorted(whole) == [0] * 4 + [7] * 4


def test_without_embeddings_these_stay():
    plan = draw_plan(view_of().anatomy, embeddings=False)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & plan and "model.norm.weight" in plan


def test_biases_and_inner_norms_follow_their_matrix():
    for kind, inner in (("opt", "bias"), ("qwen3", "q_norm")):
        anatomy = view_of(kind).anatomy
        for found in categories(anatomy):
            q = found["attention"]["q"]
            assert any(inner in p for p in q) and all("q_" in p for p in q)


def test_what_cannot_be_halved_is_refused_with_what_was_found(caplog):
    with pytest.raises(LuthierError, match=r"c_attn.* is a fused projection"):
        Hft().attach(tiny("gpt2"))
    with pytest.raises(LuthierError, match=r"layers\.0\.conv\.in_proj\.weight is a projection of an unknown kind"):
        Hft().attach(tiny("lfm2"))
    for wrong in (0, 1, -0.5):
        with pytest.raises(ValueError, match="fraction"):
            Hft(fraction=wrong)
    anatomy = view_of(layers=3).anatomy
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        draw_plan(anatomy, fraction=0.5)
        assert not caplog.records
        draw_plan(anatomy, fraction=0.05)  # of 12, 9 and 6 tensors in three blocks
    assert [r.message.rpartition("category ")[2] for r in caplog.records] == ["ffn trains", "norms trains"]


def test_it_halves_the_state_and_saves_a_sixth_of_the_work():
    spent, states = {}, {}
    for name, tuner in (("full", Full()), ("hft", Hft())):
        view = view_of(layers=4)
        loop = Loop(view, rows_of(tuple([40] * 4)), tuner.attach(view), Sft(), SETTINGS)
        loop.step()
        spent[name] = sum(loop.progress.flops.values())
        inside = [loop.trainable.master(n).numel() for n in loop.trainable.names if ".layers." in n and "norm" not in n]
        states[name] = sum(inside)
    assert states["hft"] == states["full"] / 2
    assert spent["hft"] / spent["full"] == pytest.approx(5 / 6, abs=0.05), (
        "attention cores and the head add the same to both"
    )


def test_which_blocks_get_the_odd_tensor_is_drawn():
    """Two of five blocks with three tensors train two; over seeds every block is among them as often as the others."""
    drawn = np.array([counts(5, 3, 0.5, np.random.default_rng(s)) for s in range(400)])
    assert set(drawn.sum(1).tolist()) == {8} and set(drawn.reshape(-1).tolist()) == {1, 2}
    assert np.allclose((drawn == 2).mean(0), 3 / 5, atol=0.08)


def test_any_run_of_blocks_gets_its_share_before_blocks_are_shuffled():
    class InOrder:
        def permutation(self, values):
            return values

    found = counts(7, 3, 0.5, InOrder())
    assert found.tolist() == [2, 1, 2, 1, 2, 1, 2]  # running totals 1.5, 3, 4.5, ... rounded up at a half
    assert counts(4, 2, 0.3, InOrder()).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("balance", "kv_heads", "pairs"), [("params", 2, 4), ("tensors", 2, 6), ("params", 4, 6), ("tensors", 4, 6)]
)
def test_every_allowed_choice_is_drawn_equally_often(balance, kv_heads, pairs):
    """Four of the attention's six pairs are exactly half of the weights where queries share keys."""
    anatomy, seen = view_of(layers=4, num_key_value_heads=kv_heads).anatomy, {}
    for seed in range(150):
        plan = draw_plan(anatomy, balance=balance, seed=seed)
        for block in range(4):
            for names in (
                ("q_proj", "k_proj", "v_proj", "o_proj"),
                ("gate_proj", "up_proj", "down_proj"),
                ("input_layernorm", "post_attention_layernorm"),
            ):
                found = tuple(of(plan, block, *names))
                seen.setdefault((names[0], len(found)), []).append(found)
    kinds = {
        ("q_proj", 2): pairs,
        ("gate_proj", 1): 3,
        ("gate_proj", 2): 3,
        ("input_layernorm", 1): 2,
    }
    assert seen.keys() == kinds.keys()
    for key, number in kinds.items():
        often = [seen[key].count(x) / len(seen[key]) for x in set(seen[key])]
        assert len(often) == number and all(abs(share - 1 / number) < 0.09 for share in often), (key, often)


def test_whole_blocks_and_tensors_of_the_model_are_drawn_from_all():
    anatomy = view_of(layers=4).anatomy
    for level in ("layer", "model"):
        often = {x.name: 0 for x in anatomy.block_linears}
        for seed in range(100):
            for n in often.keys() & draw_plan(anatomy, level=level, seed=seed):
                often[n] += 1
        assert all(30 <= c <= 70 for c in often.values()), level


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_by_model_the_share_is_counted_in_weights(fraction):
    """The last tensor taken may go over: at most by the largest one."""
    anatomy = view_of(layers=4).anatomy
    inside = {n: int(np.prod(s)) for n, s in anatomy.parameters.items() if ".layers." in n}
    for seed in range(20):
        plan = draw_plan(anatomy, fraction, level="model", seed=seed)
        taken = sum(size for n, size in inside.items() if n in plan)
        assert 0 <= taken - fraction * sum(inside.values()) < max(inside.values())


def test_an_epoch_of_one_stage_is_no_stage_of_its_own():
    anatomy = view_of(layers=4).anatomy
    epochs = {(s, e): Hft(stage=s, resample="epoch").plan(anatomy, e) for s in (None, 1, 2) for e in (0, 1, 2)}
    assert len(set(epochs.values())) == 9
    assert epochs[1, 0] == Hft(stage=1).plan(anatomy, 2) == draw_plan(anatomy, stage=1)
    assert epochs[None, 0] == draw_plan(anatomy) == Hft(stage=0).plan(anatomy)


def test_a_stage_of_a_pipeline_draws_for_its_number_unless_the_recipe_names_one():
    assert [Hft().in_stage(k).stage for k in (0, 1, 5)] == [0, 1, 5]
    assert [Hft(stage=3).in_stage(k).stage for k in (0, 5)] == [3, 3]


def test_a_plan_an_epoch_starts_with_the_first_and_goes_on_where_it_was_saved():
    tuner, view, other = Hft(resample="epoch"), view_of(), view_of()
    trainable, resumed = tuner.attach(view), tuner.attach(other)
    plans = [tuner.plan(view.anatomy, e) for e in (0, 2)]
    assert trainable.chosen == plans[0] != plans[1]
    trainable.draw(2)
    with torch.no_grad():
        trainable.master("model.layers.0.mlp.up_proj.weight").add_(1.0)
    resumed.load_state_dict(trainable.state_dict())
    assert (resumed.epoch, resumed.chosen) == (2, plans[1])
    assert {n for n, p in other.module.named_parameters() if p.requires_grad} == plans[1]
    assert torch.equal(*(t.master("model.layers.0.mlp.up_proj.weight") for t in (trainable, resumed)))
    resumed.before_window()  # loops that know of no window are in the first epoch
    assert (resumed.epoch, resumed.chosen) == (0, plans[0])


def test_blocks_with_more_tensors_of_a_category_than_others_train_their_share():
    modules = [("b.0", ("q", "up", "n1", "n2")), ("b.1", ("q", "up", "n1", "n2", "n3", "n4"))]
    roles = {"q": "q", "up": "up"}
    anatomy = SimpleNamespace(
        linears=[SimpleNamespace(module=f"{b}.{n}", role=roles[n]) for b, names in modules for n in names if n in roles],
        blocks=[b for b, _ in modules], parameters={f"{b}.{n}.weight": (2,) for b, names in modules for n in names},
        num_kv_heads=1, num_heads=1,
    )  # fmt: skip
    assert draw_plan(anatomy, fraction=0.99) == set(anatomy.parameters)


def test_half_reset_keeps_a_task_head_that_is_in_the_plan():
    view = view_of("llama-classifier")
    loop = Loop(view, labelled_rows(), Hft().attach(view), Sft(), SETTINGS)
    loop.step()
    loop.step()
    update, plan = loop.trainable.update(), Hft().plan(view.anatomy)
    kinds = {p.kind: p for p in half_reset(update, plan).parts}
    assert torch.equal(kinds["replace"].values["score.weight"], view.weight("score.weight"))
    assert [p.kind for p in half_reset(update, plan - {"score.weight"}).parts] == ["dense"]


def test_a_block_without_a_category_is_refused_with_the_names_of_what_it_has():
    anatomy = SimpleNamespace(
        linears=[SimpleNamespace(module="b.0.q_proj", role="q"), SimpleNamespace(module="b.0.mlp.up", role="up")],
        blocks=["b.0"],
        parameters={"b.0.q_proj.weight": (2, 2), "b.0.mlp.up.weight": (2, 2), "b.0.mlp.up.bias": (2,)},
    )
    with pytest.raises(LuthierError, match="block 0 has no norms, which hft halves; it has q_proj, up;"):
        categories(anatomy)


def test_what_cannot_be_halved_is_known_without_weights():
    Hft().check_model(Anatomy(tiny()))
    with pytest.raises(LuthierError, match="is a fused projection"):
        Hft().check_model(Anatomy(tiny("gpt2")))
