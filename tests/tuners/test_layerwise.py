"""The exact checks of biomed-stability's sheet; numbers in names are the sheet's."""

import pytest
import torch

from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import RecipeError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.layerwise import Layerwise, rate_factor, reinitialised


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


def test_bad_input():
    with pytest.raises(ValueError, match="decay"):
        Layerwise(decay=0.0)
    with pytest.raises(RecipeError, match=r"freeze_blocks: 3 of 3 blocks; at most 2"):
        Layerwise(freeze_blocks=3).attach(view_of())
    with pytest.raises(RecipeError, match=r"reinit_blocks: 2 of 3 blocks with 2 frozen"):
        Layerwise(freeze_blocks=2, reinit_blocks=2).attach(view_of())


class BiasedAdamW(torch.optim.Optimizer):
    """Adam as BERT's original code had it, without bias correction: a baseline for tests only."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m, v = (
                    self.state[p].setdefault("m", torch.zeros_like(p)),
                    self.state[p].setdefault("v", torch.zeros_like(p)),
                )
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


def test_6_without_bias_correction_a_short_run_hides_a_larger_rate():
    """What the tuner's optimiser avoids: step t is (1 - b1^t) / sqrt(1 - b2^t) times as long."""
    p, q = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    biased, corrected = BiasedAdamW([p], 1e-3, eps=0.0), torch.optim.AdamW([q], 1e-3, eps=0.0, weight_decay=0.0)
    expected = {1: 3.162, 5: 5.797, 12: 6.569, 100: 3.241}
    for t in range(1, 101):
        before = p.item(), q.item()
        for x, optimizer in ((p, biased), (q, corrected)):
            x.grad = torch.full_like(x, 0.7)
            optimizer.step()
        ratio = (p.item() - before[0]) / (q.item() - before[1])
        assert ratio == pytest.approx((1 - 0.9**t) / (1 - 0.999**t) ** 0.5, rel=1e-6)
        if t in expected:
            assert ratio == pytest.approx(expected[t], abs=1e-3)


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
    with trainable.phase("train"):
        once = view.trace(batch).hidden[-1]
        assert set(trainable.features.states) == set(keys_of(batch)) and len(set(keys_of(batch))) == 2
        torch.testing.assert_close(view.trace(batch).hidden[-1], once)
        other = batch_of((5, 6), seed=3)
        torch.testing.assert_close(view.trace(other).hidden[-1], view_of().trace(other).hidden[-1])
    with pytest.raises(RecipeError, match=r"layerwise\.cache_features: no block is frozen"):
        Layerwise(cache_features=True).attach(view_of())
