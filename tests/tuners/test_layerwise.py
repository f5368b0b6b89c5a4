"""The exact checks of biomed-stability's sheet; numbers in names are the sheet's."""

import re
from types import SimpleNamespace

import pytest
import torch

from luthier.method import Facts
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.base import default_optimizer
from luthier.tuners.layerwise import Layerwise, new_weights, rate_factor, reinitialised


def test_1_decay_table():
    contiguous = [rate_factor(d, 12, 0.8, "contiguous") for d in (14, 13, 12, 1, 0)]
    assert contiguous == pytest.approx([1.0, 1.0, 0.8, 0.8**12, 0.8**13], abs=1e-12)
    head_gap = [rate_factor(d, 12, 0.8, "head_gap") for d in (14, 12, 1, 0)]
    assert head_gap == pytest.approx([1.0, 0.8**2, 0.8**13, 0.8**14], abs=1e-12)


def test_1_no_decay_is_an_ungrouped_optimiser():
    view, plain = view_of(), view_of()
    trainable = Layerwise(decay=1.0).attach(view)
    grouped = torch.optim.SGD([{"params": g.params, "lr": 0.1 * g.lr_factor} for g in trainable.groups()])
    flat = torch.optim.SGD(plain.module.parameters(), lr=0.1)
    from luthier.objectives.base import Forward

    for _ in range(3):
        for v, o in ((view, grouped), (plain, flat)):
            Forward(batch_of(), v).nll().mean().backward()
            o.step()
            o.zero_grad()
    for (n, p), (_, q) in zip(view.module.named_parameters(), plain.module.named_parameters(), strict=True):
        assert torch.equal(p, q), n


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert-classifier"])
@pytest.mark.parametrize("freeze", [0, 1])
def test_2_groups_are_a_partition_of_what_trains(kind, freeze):
    view = ModelView(tiny(kind))
    trainable = Layerwise(freeze_blocks=freeze).attach(view)
    ids = [id(p) for g in trainable.groups() for p in g.params]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in view.module.parameters() if p.requires_grad}
    if view.anatomy.tied:
        assert view.anatomy.depth(f"{view.anatomy.embedding}.weight") == 0


def test_2_depths():
    anatomy = ModelView(tiny("bert-classifier")).anatomy
    depth = anatomy.depth
    assert depth("bert.embeddings.LayerNorm.weight") == 0
    assert depth("bert.encoder.layer.2.output.dense.weight") == 3
    assert depth("bert.pooler.dense.weight") == 4 and depth("classifier.weight") == 5
    llama = ModelView(tiny("llama")).anatomy
    assert llama.depth("model.norm.weight") == 4 and llama.depth("lm_head.weight") == 5


# --- golden: rate and weight decay of every parameter, from its name alone ---


def published(name, decay, convention, blocks=3):
    """(rate, factor of weight decay) of code Z ("contiguous": the rate shrinks on the way down) or code E ("head_gap")."""
    found = re.search(r"\.(?:layer|layers|h)\.(\d+)\.", name)
    if re.match(r"(classifier|cls|lm_head)\.", name):
        place = "head"
    elif ".pooler." in name or re.search(r"^(model\.norm|transformer\.ln_f)\.", name):
        place = "last"
    else:
        place = int(found[1]) if found else "embeddings"
    if convention == "contiguous":
        rates, rate = {"head": 1.0, "last": 1.0}, 1.0
        for place_below in [*reversed(range(blocks)), "embeddings"]:
            rate *= decay
            rates[place_below] = rate
        rate = rates[place]
    else:  # key_to_depths of ELECTRA: embeddings 0, layer i: i + 1, task_specific: n + 2
        depth = {"embeddings": 0, "last": blocks + 1, "head": blocks + 2}.get(place, -1)
        rate = decay ** (blocks + 2 - (place + 1 if depth < 0 else depth))
    still = name.endswith("bias") or "norm" in name.lower() or ".ln_" in name
    return rate, 0.0 if still or (place in ("head", "last") and decay < 1) else 1.0


@pytest.mark.parametrize("kind", ["bert-classifier", "bert", "llama", "gpt2"])
@pytest.mark.parametrize("convention", ["contiguous", "head_gap"])
@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_rate_and_weight_decay_of_every_parameter(kind, convention, decay):
    view = ModelView(tiny(kind))
    trainable = Layerwise(decay=decay, convention=convention).attach(view)
    optimizer = trainable.optimizer(
        trainable.groups(), lambda g: default_optimizer(g, 0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    )
    names, seen = {id(p): n for n, p in view.module.named_parameters()}, {}
    for group in optimizer.param_groups:
        seen |= {names[id(p)]: (group["lr"] / 0.5, group["weight_decay"] / 0.1) for p in group["params"]}
    assert seen.keys() == set(names.values()) and len(seen) > 25
    for name, found in seen.items():
        assert found == pytest.approx(published(name, decay, convention), abs=1e-12), name


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "bert"])
def test_what_is_frozen_has_no_dropout_and_the_rest_keeps_its_own(kind):
    view = ModelView(dropping(kind), layout="padded")
    trainable = Layerwise(freeze_blocks=2).attach(view)
    view.module.train()
    first, second = (view.trace(batch_of(), (1, 2, -1)).hidden for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert not torch.equal(first[-1], second[-1])
    trainable.detach()
    view.module.eval()
    view.module.train()
    assert all(m.training for m in view.module.modules())
    first, second = (view.trace(batch_of(), (1, 2, -1)).hidden for _ in range(2))
    assert not torch.equal(first[1], second[1])


def dropping(kind):
    """A model whose dropout is on, in the way that its architecture has it."""
    names = {
        "llama": ("attention_dropout",), "opt": ("dropout",), "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    }  # fmt: skip
    model = tiny(kind)
    config = type(model.config)(**{**model.config.to_dict(), **dict.fromkeys(names[kind], 0.5)})
    return type(model)(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_3_frozen_tensors_stay_under_weight_decay(dtype):
    view = view_of()
    view.module.to(dtype)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    trainable = Layerwise(freeze_blocks=2, decay=0.9).attach(view)
    settings = TrainSettings(max_steps=5, batch_size=4, learning_rate=1e-2, weight_decay=0.1, warmup_fraction=0)
    loop = Loop(view, rows_of(), trainable, Sft(), settings)
    for _ in range(5):
        loop.step()
    for n, p in view.module.named_parameters():
        frozen = view.anatomy.depth(n) <= 2
        assert torch.equal(before[n], p) == frozen, n
        assert not frozen or p.grad is None


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_5_reinitialised_blocks(kind):
    view = ModelView(tiny(kind, hidden_size=64, intermediate_size=128))
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    Layerwise(reinit_blocks=1).attach(view)
    fresh = set(reinitialised(view.anatomy, 1))
    std = view.module.config.initializer_range
    for n, p in view.module.named_parameters():
        if n not in fresh:
            assert torch.equal(before[n], p), n
        elif n.endswith(".bias"):
            assert bool((p == 0).all())
        elif p.ndim == 2 and p.numel() > 4000:
            assert float(p.std()) == pytest.approx(std, rel=0.05)
        elif p.ndim == 1:
            assert bool((p == 1).all())
    assert any(view.anatomy.depth(n) == 3 for n in fresh)


def test_5_every_tensor_is_drawn_by_its_own_name_and_the_seed():
    views = [ModelView(tiny()) for _ in range(3)]
    for view, seed in zip(views, (0, 0, 1), strict=True):
        Layerwise(reinit_blocks=2, seed=seed).attach(view)
    first, same, other = (v.weight("model.layers.2.mlp.up_proj.weight") for v in views)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first, views[0].weight("model.layers.2.mlp.gate_proj.weight"))
    assert not torch.equal(first, views[0].weight("model.layers.1.mlp.up_proj.weight"))


def test_5_the_pooler_starts_anew_with_the_top_block_and_not_without():
    view = ModelView(tiny("bert-classifier", hidden_size=64, intermediate_size=128))
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    trainable = Layerwise(reinit_blocks=1).attach(view)
    pooler = view.weight("bert.pooler.dense.weight")
    assert not torch.equal(pooler, before["bert.pooler.dense.weight"])
    assert float(pooler.std()) == pytest.approx(view.module.config.initializer_range, rel=0.05)
    (_, replaced) = trainable.update().parts
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(replaced.values)
    trainable.detach()
    Layerwise(reinit_blocks=0).attach(view)
    assert torch.equal(pooler, before["bert.pooler.dense.weight"])


@pytest.mark.parametrize(("kind", "value"), [("llama", 1.0), ("gemma3", 0.0), ("bert", 1.0), ("qwen3", 1.0)])
def test_5_norms_start_where_they_change_nothing(kind, value):
    """Gemma's norms multiply by 1 + w."""
    view = ModelView(tiny(kind))
    with torch.no_grad():
        for p in view.module.parameters():
            p.add_(0.3)
    Layerwise(reinit_blocks=2).attach(view)
    norms = [n for n in reinitialised(view.anatomy, 2) if "norm" in n.lower() and n.endswith("weight")]
    assert len(norms) >= 4 and all(bool((view.weight(n) == value).all()) for n in norms)


def test_5_a_convolutions_kernel_is_drawn_and_its_block_has_no_zero_residual():
    view = ModelView(tiny("lfm2"))
    std = view.module.config.initializer_range
    Layerwise(reinit_blocks=1).attach(view)
    kernel = view.weight("model.layers.2.conv.conv.weight")
    assert kernel.ndim == 3 and float(kernel.std()) == pytest.approx(std, rel=0.3)
    with pytest.raises(RecipeError, match=r"reinit_style: zero_residual, and block 2 has no attention or MLP output"):
        Layerwise(reinit_blocks=1, reinit_style="zero_residual").attach(ModelView(tiny("lfm2")))
    assert view.anatomy.depth("model.embedding_norm.weight") == 4, "its last norm, whatever it is called"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_5_zero_residual_starts_as_the_identity(kind):
    view, batch = view_of(kind), batch_of()
    without = view.trace(batch, (2, -1)).hidden[2].detach()
    norm = view.module.get_submodule(view.anatomy.final_norm)
    Layerwise(reinit_blocks=1, reinit_style="zero_residual").attach(view)
    torch.testing.assert_close(view.trace(batch).hidden[-1], norm(without), atol=1e-6, rtol=0)


def test_reinitialised_updates_replace_and_detach_restores():
    view, batch = view_of(), batch_of()
    base = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    trainable = Layerwise(reinit_blocks=1).attach(view)
    loop = Loop(view, rows_of(), trainable, Sft(), TrainSettings(max_steps=2, batch_size=4))
    loop.step()
    live, update = view.trace(batch).hidden[-1].detach(), trainable.update()
    assert [p.kind for p in update.parts] == ["dense", "replace"]
    trainable.detach()
    assert all(torch.equal(base[n], p) for n, p in view.module.named_parameters())
    with update.bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-6, rtol=0)


def test_a_quantised_weight_is_refused_before_anything_is_drawn_anew():
    view = view_of()
    view.module.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, 1).byte(), requires_grad=False)
    top = view.weight("model.layers.2.mlp.up_proj.weight").detach().clone()
    with pytest.raises(LuthierError, match=r"layers.0.mlp.up_proj.weight is quantised"):
        Layerwise(reinit_blocks=1).attach(view)
    assert torch.equal(view.weight("model.layers.2.mlp.up_proj.weight"), top)


def test_bad_input():
    with pytest.raises(ValueError, match="decay"):
        Layerwise(decay=0.0)
    with pytest.raises(RecipeError, match=r"freeze_blocks: 3 of 3 blocks; at most 2"):
        Layerwise(freeze_blocks=3).attach(view_of())
    with pytest.raises(RecipeError, match=r"reinit_blocks: 2 of 3 blocks with 2 frozen"):
        Layerwise(freeze_blocks=2, reinit_blocks=2).attach(view_of())


def test_6_steps_are_those_of_the_corrected_adam_from_the_first_on():
    """With a constant gradient a corrected step is lr x factor at every t; the uncorrected one f(t) times as long."""
    view = view_of()
    trainable = Layerwise(decay=0.9).attach(view)
    groups = trainable.groups()
    optimizer = trainable.optimizer(
        groups, lambda g: default_optimizer(g, 1e-2, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0)
    )
    weight, factor = trainable.dense.master("model.layers.0.mlp.up_proj.weight"), 0.9**3
    with torch.no_grad():
        weight.zero_()
    sheet, m, v, gradient = {1: 3.162, 5: 5.797, 12: 6.569, 100: 3.241}, 0.0, 0.0, -0.7
    for t in range(1, 101):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        step = (weight.detach() - before).double()
        assert step.max() == step.min() == pytest.approx(1e-2 * factor, rel=1e-4)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2  # as BERT's own code had it
        if t in sheet:
            biased = -1e-2 * factor * m / v**0.5
            assert biased / float(step.mean()) == pytest.approx(sheet[t], abs=2e-3)


def test_the_tuners_optimiser_is_the_corrected_one():
    view = view_of()
    trainable = Layerwise(decay=1.0).attach(view)
    settings = TrainSettings(
        max_steps=2, batch_size=4, learning_rate=1e-3, warmup_fraction=0, lr_scheduler_type="constant"
    )
    loop = Loop(view, rows_of(), trainable, Sft(), settings)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    loop.step()
    largest = max(float((p.detach() - before[n]).abs().max()) for n, p in view.module.named_parameters())
    assert largest == pytest.approx(1e-3, rel=0.02)  # three times that without the correction


@pytest.mark.parametrize("kind", ["llama", "bert-classifier", "gpt2", "lfm2"])
def test_4_cached_features_give_the_same_weights_without_running_the_frozen_blocks(kind):
    weights, calls = [], []
    for cached in (False, True):
        view, counted = view_of(kind), []
        rows = rows_of((9, 5, 12, 7))
        if kind == "bert-classifier":
            rows = [{**r, "labels": [-100] * len(r["ids"]), "row": {"label": i % 3}} for i, r in enumerate(rows)]
        tuner = Layerwise(freeze_blocks=2, cache_features=cached)
        attention = next(m for n, m in view.block(1).named_modules() if n.endswith(("q_proj", "query", "c_attn")))
        attention.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        settings = TrainSettings(max_steps=6, batch_size=2, learning_rate=1e-3)
        loop = Loop(view, rows, tuner.attach(view), Sft(), settings)
        loop.run()
        weights.append({n: p.detach().clone() for n, p in view.module.named_parameters()})
        calls.append(len(counted))
        loop.trainable.detach()
        assert not view.input_hooks
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-6) for n in weights[0])
    assert calls == [6, 2], "two forwards see every row once; the other four take what was kept"


def test_4_features_are_known_by_tokens_and_positions_and_kept_in_training_only():
    from luthier.model.features import keys_of

    view, batch = view_of(), batch_of((5, 6))
    trainable = Layerwise(freeze_blocks=1, cache_features=True).attach(view)
    view.trace(batch)
    assert not trainable.features.states
    with trainable.phase("score"):
        view.trace(batch)
    assert not trainable.features.states and not trainable.features.active
    with trainable.phase("train"):
        once = view.trace(batch).hidden[-1]
        assert set(trainable.features.states) == set(keys_of(batch)) and len(set(keys_of(batch))) == 2
        torch.testing.assert_close(view.trace(batch).hidden[-1], once)
        other = batch_of((5, 6), seed=3)
        torch.testing.assert_close(view.trace(other).hidden[-1], view_of().trace(other).hidden[-1])
    with pytest.raises(RecipeError, match=r"layerwise\.cache_features: no block is frozen"):
        Layerwise(cache_features=True).attach(view_of())
    hiding = Facts(task="masked-lm", redraws=True)
    assert [p.key for p in Layerwise(cache_features=True, freeze_blocks=1).check(hiding)] == ["cache_features"]
    assert not Layerwise(freeze_blocks=1).check(hiding)


def test_all_blocks_that_are_not_frozen_can_start_anew():
    trainable = Layerwise(freeze_blocks=1, reinit_blocks=2).attach(view_of())
    assert {n.split(".")[2] for n in trainable.fresh} == {"1", "2"}


def test_a_state_is_taken_over():
    first, second = (Layerwise(freeze_blocks=1).attach(view_of()) for _ in range(2))
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.5)
    second.load_state_dict({k: t.clone() for k, t in first.state_dict().items()})
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_taken_off_what_was_frozen_follows_the_models_mode_again(training):
    view = view_of()
    trainable = Layerwise(freeze_blocks=1).attach(view)
    view.module.train(training)
    assert not view.block(0).training
    trainable.detach()
    assert all(m.training == training for m in view.module.modules())
    view.module.train(not training)
    assert view.block(0).training != training


def test_with_zero_residual_the_two_output_projections_are_zero_and_no_other_matrix():
    view = view_of()
    fresh = new_weights(view, 1, "zero_residual", Streams(0))
    zero = {n.split(".")[-2] for n, t in fresh.items() if t.ndim > 1 and not t.any()}
    assert zero == {"o_proj", "down_proj"} and sum(t.ndim > 1 for t in fresh.values()) == 7


def test_where_the_configuration_names_no_spread_it_is_two_hundredths():
    view = view_of()
    view.module.config.get_text_config = SimpleNamespace
    drawn = torch.cat([t.flatten() for t in new_weights(view, 2, "normal", Streams(0)).values() if t.ndim > 1])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.02)


def test_a_vector_that_the_architecture_does_not_start_is_refused():
    model = tiny()
    model.model.layers[2].register_parameter("odd", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(LuthierError, match=r"how model\.layers\.2\.odd starts is not known"):
        Layerwise(reinit_blocks=1).attach(ModelView(model))
