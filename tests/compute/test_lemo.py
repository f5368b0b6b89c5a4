"""The exact checks of the sheet; numbers in names are the sheet's."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from luthier.cli.check import check_recipe
from luthier.compute.lemo import Lemo, block_scores, kept_blocks, layer_keep, pruned_mlp, tokens_of
from luthier.method import Facts
from luthier.model.anatomy import Anatomy
from luthier.model.blocks import queries_and_keys
from luthier.model.view import ModelView, attention_implementation
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.recipe import load_file
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import SIZES, TOKENS, batch_of, byte_tokenizer, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

KINDS = {  # blocks that differ in what methods are tempted to assume: biases, norms, activations, windows
    "llama": {"mlp_bias": True, "attention_bias": True},
    "qwen3": {},
    "gemma3": {},
}


def stirred(kind, layers=6, seed=0):
    """A model of which no part is neutral: biases and norms drawn, scores that differ."""
    view = view_of(kind, layers=layers, **KINDS.get(kind, {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in view.module.named_parameters():
            if p.ndim == 1 or n.endswith(("q_proj.weight", "k_proj.weight")) or ".mlp." in n:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return view


def nll_and_grads(view, batch, compute):
    trainable = Lora(rank=2, targets=("q_proj", "v_proj")).attach(view)
    with torch.no_grad():
        for p in trainable.b.values():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with compute.patch(view, "train") as state:
        loss = Forward(batch, view).nll().sum()
        loss.backward()
    grads = [p.grad.clone() for p in trainable.parameters()]
    trainable.detach()
    return float(loss.detach()), grads, state


def test_1_keeping_everything_is_the_model():
    batch = batch_of((24, 17, 9))
    dense = nll_and_grads(view_of(layers=6), batch, Lemo(keep_fraction=1.0))
    # Every block kept through the sparse path: one block a sequence can never be dropped.
    whole = nll_and_grads(view_of(layers=6), batch, Lemo(keep_fraction=0.999, block_size=64))
    assert whole[2].kept and dense[0] == pytest.approx(whole[0], abs=1e-5)
    for a, b in zip(dense[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [2, 3])
def test_2_the_gather_path_equals_dense_attention_with_eliminated_keys_masked(kind, layer):
    """By transformers' own eager attention over all tokens, at their own places; a Gemma3 layer sees a window of 4."""
    view, batch = stirred(kind), batch_of((32, 21))
    seen = {}

    def record(module, args, kwargs, output):
        seen["in"], seen["at"], seen["out"] = kwargs["hidden_states"], kwargs["position_embeddings"], output[0]

    attention = view.module.model.layers[layer].self_attn
    with torch.no_grad(), Lemo(keep_fraction=0.5, block_size=4).patch(view, "train") as state:
        handle = attention.register_forward_hook(record, with_kwargs=True)
        view.trace(batch)
        handle.remove()
    kept = state.kept[layer]
    assert len(kept) == 4 * (8 // 2) + 4 * (6 // 2) - 3 * bool(kept[-1] == 52)
    i, j = torch.arange(53)[:, None], torch.arange(53)[None, :]
    allowed = (batch.seq[:, None] == batch.seq[None, :]) & (j <= i) & torch.isin(j, kept)
    if (window := getattr(attention, "sliding_window", None)) is not None:
        allowed &= i - j < window
    assert (window is not None) == (kind == "gemma3" and layer == 2)
    mask = torch.zeros(53, 53).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad(), attention_implementation(view.module, "eager"):
        full = attention(seen["in"], position_embeddings=seen["at"], attention_mask=mask[None, None])[0]
    expected = torch.zeros_like(full)
    expected[:, kept] = full[:, kept]
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["trained", "asked", "ordinary operations"])
def test_a_window_counts_the_places_tokens_had(how):
    """With and without a gradient and inside a forward-mode derivative: tokens that were left out still lie between."""
    from luthier.kernels.plain import plain_operations
    from luthier.model.attention import flat_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 7, 8, generator=generator, requires_grad=how == "trained") for h in (4, 2, 2))
    places = torch.tensor([0, 1, 6, 7, 0, 3, 4])  # of two sequences; a window of 3
    module = torch.nn.Module()
    with plain_operations() if how == "ordinary operations" else torch.enable_grad():
        out, _ = flat_attention(module, q, k, v, None, sequence_lengths=(4, 3), sliding_window=3, kept_places=places)
    sees = torch.zeros(7, 7, dtype=torch.bool)
    for i, j in ((0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3), (4, 4), (5, 5), (6, 5), (6, 6)):
        sees[i, j] = True
    dense = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).masked_fill(~sees, float("-inf")).softmax(-1)
    expected = (dense @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_3_counts_layers_and_zero_rows():
    assert [layer_keep(i, 8, 0.4) for i in range(8)] == [1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4, 1.0]
    view, batch = view_of(layers=6), batch_of((40, 33))
    out = {}
    attention = view.module.model.layers[3].self_attn
    with Lemo(keep_fraction=0.4, block_size=8).patch(view, "train") as state:
        handle = attention.register_forward_hook(lambda m, a, o: out.update(y=o[0]))
        view.trace(batch)
        handle.remove()
    assert sorted(state.kept) == [2, 3, 4]
    kept = state.kept[3]
    assert torch.equal(kept, kept.sort().values)
    first = kept[kept < 40]
    assert len(first) == 8 * int(5 * 0.4)
    gone = torch.ones(73, dtype=torch.bool)
    gone[kept] = False
    assert bool((out["y"][0, gone] == 0).all()) and bool((out["y"][0, kept] != 0).any(-1).all())


def naive_scores(q, k, size, symmetrise, causal=True, window=None):
    heads, length, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[0], 0)
    n = -(-length // size)
    out = torch.zeros(n, n)
    for i in range(length):
        for j in range(length):
            if (causal and j > i) or (window is not None and abs(i - j) >= window):
                continue
            s = sum(max(float(q[h, i] @ k[h, j]) / dim**0.5, 0.0) for h in range(heads)) / heads
            out[i // size, j // size] = max(float(out[i // size, j // size]), s)
    if causal and symmetrise:
        for m in range(n):
            for j in range(m):
                out[j, m] = out[m, j]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("symmetrise", [True, False])
def test_4_scores_equal_four_loops_and_only_positives_count(symmetrise, causal, window):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 11, 8, generator=generator), torch.randn(2, 11, 8, generator=generator)
    ours = block_scores(q, k, 4, causal, symmetrise, window)
    torch.testing.assert_close(ours, naive_scores(q, k, 4, symmetrise, causal, window), atol=1e-5, rtol=0)
    # A head whose score is negative may become more negative: nothing changes.
    q1, k1 = torch.ones(1, 2, 1), torch.tensor([[[-1.0], [-1.0]]])
    assert torch.equal(block_scores(q1, k1, 1), block_scores(q1, 5 * k1, 1))


def normed(x, norm, kind):
    """An RMS norm written out; Gemma's weights are distances from one."""
    weight = norm.weight + (kind == "gemma3")
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def dense_choice(attention, kind, hidden, count, size, first, symmetrise):
    """The blocks of one sequence [L, D], from all of its scores at once and the words of the paper."""
    q = F.linear(hidden, attention.q_proj.weight, attention.q_proj.bias).view(-1, 4, 8)  # [L, H, d]
    k = F.linear(hidden, attention.k_proj.weight, attention.k_proj.bias).view(-1, 2, 8)
    if kind in ("qwen3", "gemma3"):
        q, k = normed(q, attention.q_norm, kind), normed(k, attention.k_norm, kind)
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    window = getattr(attention, "sliding_window", None)
    total = naive_scores(q, k, size, symmetrise, window=window).sum(0)  # over the blocks that ask
    order = sorted(range(len(total)), key=lambda n: -float(total[n]))[:count]
    if first and 0 not in order:
        order[-1] = 0
    return sorted(order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_blocks_are_those_of_a_dense_computation(kind, seed):
    """Two sequences a batch, four sparse layers: 96 choices over kinds and seeds, with and without the first block."""
    view, batch = stirred(kind, layers=7, seed=seed), batch_of((22, 17), seed=seed)
    hidden = {}
    compute = Lemo(keep_fraction=0.5, block_size=4, keep_first_block=seed % 2 == 0, symmetrise=seed < 2)
    with torch.no_grad(), compute.patch(view, "train") as state:
        handles = []
        for i in range(7):
            keep = lambda m, a, k, i=i: hidden.update({i: k["hidden_states"][0]})  # noqa: E731
            handles.append(view.block(i).self_attn.register_forward_pre_hook(keep, with_kwargs=True))
        view.trace(batch)
        for h in handles:
            h.remove()
        assert sorted(state.kept) == [2, 3, 4, 5]
        for layer, kept in state.kept.items():
            expected = []
            for start, length in ((0, 22), (22, 17)):
                part, n = hidden[layer][start : start + length], -(-length // 4)
                how = (n // 2, 4, compute.keep_first_block, compute.symmetrise)
                blocks = dense_choice(view.block(layer).self_attn, kind, part, *how)
                expected += [start + t for b in blocks for t in range(4 * b, min(4 * b + 4, length))]
            assert kept.tolist() == expected, layer


def test_a_block_counts_by_who_looks_at_it_not_by_where_it_looks():
    scores = torch.tensor([[0.0, 0.0, 0.0], [9.0, 1.0, 0.0], [1.0, 2.0, 0.0]])  # row: the block that asks
    assert kept_blocks(scores, 1, keep_first=False).tolist() == [0]  # columns 10, 3, 0; rows 0, 10, 3
    assert kept_blocks(scores, 2, keep_first=False).tolist() == [0, 1]


def test_kept_blocks_hold_the_first():
    scores = torch.diag(torch.tensor([0.1, 5.0, 3.0, 4.0]))
    assert kept_blocks(torch.eye(4), 2, keep_first=False).tolist() == [0, 1]  # the earlier of equals
    assert kept_blocks(torch.diag(torch.tensor([2.0, 5.0, 3.0, 4.0])), 4).tolist() == [0, 1, 2, 3]
    assert kept_blocks(scores, 2).tolist() == [0, 1]
    assert kept_blocks(scores, 2, keep_first=False).tolist() == [1, 3]
    assert tokens_of(torch.tensor([0, 2]), 4, 10).tolist() == [0, 1, 2, 3, 8, 9]


def test_an_attention_that_looks_ahead_is_scored_so_and_short_sequences_keep_a_block():
    view = stirred("llama")
    parts = replace(view.anatomy.attention(3), causal=False)
    hidden = torch.randn(1, 35, 32, generator=torch.Generator().manual_seed(0))
    compute = Lemo(block_size=4, keep_first_block=False)
    with torch.no_grad():
        kept, short = compute.choose(view, parts, hidden, (24, 8, 3), 0.5)
        assert compute.choose(view, parts, hidden, (24, 8, 3), 0.45)[1] == (8, 4, 3)  # int(2.7), never more
        q, k = queries_and_keys(view.module.get_submodule, parts, hidden[:, :24])
    total = naive_scores(q, k, 4, symmetrise=True, causal=False).sum(0)
    blocks = sorted(sorted(range(6), key=lambda n: -float(total[n]))[:3])
    assert kept[:12].tolist() == [t for b in blocks for t in range(4 * b, 4 * b + 4)]
    assert short == (12, 4, 3) and kept[-3:].tolist() == [32, 33, 34]


ACTIVATIONS = {"llama": F.silu, "qwen3": F.silu, "gemma3": lambda x: F.gelu(x, approximate="tanh")}


def neurons_of(mlp, x, act, keep):
    """([..., I] what a neuron hands on, its mask): written out, with biases."""
    linear = lambda layer: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    inner, up = act(linear(mlp.gate_proj)), linear(mlp.up_proj)
    flat = lambda t: t.detach().reshape(-1, t.shape[-1])  # noqa: E731
    score = flat(inner).norm(dim=0) + flat(up).norm(dim=0)
    return inner * up, torch.zeros_like(score).index_fill(0, score.topk(keep).indices, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [64, 32, 1])
def test_5_mlp_forward_is_exact_and_the_backward_is_that_of_the_masked_mlp(kind, keep):
    mlp = stirred(kind).module.model.layers[1].mlp.requires_grad_(False).double()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    out = pruned_mlp(x, mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, keep)
    plain = mlp(x)
    assert torch.equal(out, plain)
    ours, exact = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, plain))
    handed, mask = neurons_of(mlp, x, ACTIVATIONS[kind], keep)
    masked = F.linear(handed * mask, mlp.down_proj.weight, mlp.down_proj.bias)
    (theirs,) = torch.autograd.grad((masked * (2 * plain).detach()).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    if keep == 64:
        torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)
    else:
        assert float((ours - exact).norm()) > 0.05 * float(exact.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_5_a_pruned_model_says_what_it_did_and_learns_through_the_masked_mlps(kind):
    """Every block's own activation and biases: the loss is the model's, gradients those of formulas written out."""
    batch, keep = batch_of((24, 17, 9)), int(64 * (1 - 0.7))
    loss, grads, _ = nll_and_grads(stirred(kind), batch, Lemo(keep_fraction=1.0, mlp_prune_fraction=0.7))
    plain, exact, _ = nll_and_grads(stirred(kind), batch, Lemo(keep_fraction=1.0))
    assert loss == pytest.approx(plain, abs=1e-6 * plain)
    view = stirred(kind)

    def written_out(mlp, own, x):
        handed, mask = neurons_of(mlp, x, ACTIVATIONS[kind], keep)
        masked = F.linear(handed * mask, mlp.down_proj.weight, mlp.down_proj.bias)
        return masked + (own(x) - masked).detach()

    for i in range(6):
        mlp = view.block(i).mlp
        mlp.forward = partial(written_out, mlp, mlp.forward)
    _, expected, _ = nll_and_grads(view, batch, Lemo(keep_fraction=1.0))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    far = sum(float((a - b).square().sum()) for a, b in zip(grads, exact, strict=True))
    assert far > 1e-4 * sum(float(b.square().sum()) for b in exact)


def attention_bytes(view, batch, compute):
    """By layer: bytes that its attention keeps for the backward, once each, beside weights."""
    kept, now = {i: {} for i in range(len(view.anatomy.blocks))}, []

    def pack(t):
        if now:
            kept[now[-1]][t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    trainable = Lora(rank=2, targets=("q_proj", "k_proj", "v_proj", "o_proj")).attach(view)
    handles = []
    for i in kept:
        attention = view.block(i).self_attn
        handles.append(attention.register_forward_pre_hook(lambda *_, i=i: now.append(i)))
        handles.append(attention.register_forward_hook(lambda *_: now.clear()))
    with compute.patch(view, "train"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = view.trace(batch).hidden[-1]
    weights = {p.untyped_storage().data_ptr() for p in view.module.parameters()}
    for h in handles:
        h.remove()
    trainable.detach()
    del hidden
    return [sum(n for p, n in kept[i].items() if p not in weights) for i in kept]


def test_7_sparse_layers_keep_that_share_of_the_attentions_memory():
    """Long enough for the kernel whose memory is linear in tokens, which the source has too; 25 of 64 blocks stay."""
    view, batch = view_of(layers=6), batch_of((1024,))
    dense = attention_bytes(view, batch, Lemo(keep_fraction=1.0))
    sparse = attention_bytes(view, batch, Lemo(keep_fraction=0.4, block_size=16))
    share = [s / d for s, d in zip(sparse, dense, strict=True)]
    assert [round(share[i], 3) for i in (0, 1, 5)] == [1.0, 1.0, 1.0]
    assert share[2:5] == pytest.approx([0.4] * 3, rel=0.1)


def test_7_pruned_mlps_keep_that_share_of_their_neurons():
    x = torch.randn(50, 32, requires_grad=True)
    mlp, saved = view_of().block(0).mlp.requires_grad_(False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        pruned_mlp(x, mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, 16)
    assert sum(saved) == 2 * 50 * 16 * 4 + 16 * 8  # gate and up of the kept neurons, and which those are


def test_training_is_sparse_and_evaluation_dense():
    view = view_of(layers=6)
    rows = rows_of((40, 33, 28, 36))
    loop = Loop(
        view,
        rows,
        Lora(rank=2).attach(view),
        Sft(),
        TrainSettings(max_steps=3, batch_size=4),
        compute=Lemo(block_size=4),
    )
    for _ in range(3):
        assert loop.step()["loss"] > 0
    assert not any("forward" in vars(m) for m in (view.block(i).self_attn for i in range(6)))
    with Lemo(block_size=4).patch(view, "score") as state:
        view.trace(batch_of((40,)))
    assert state.kept == {}


def test_bad_input():
    for fields in ({"keep_fraction": 0.0}, {"block_size": 0}, {"mlp_prune_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Lemo(**fields)
    view = view_of(layers=6)
    view.layout = "padded"
    with pytest.raises(LuthierError, match="padded layout"), Lemo().patch(view, "train"):
        pass
    view = view_of(layers=6)
    Lora(targets=("gate_proj",)).attach(view)
    with (
        pytest.raises(LuthierError, match="something in the MLP is trained"),
        Lemo(mlp_prune_fraction=0.5).patch(view, "train"),
    ):
        pass
    view = view_of(layers=6)
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(RuntimeError, match="generate and evaluate outside"), Lemo(block_size=2).patch(view, "train"):
        view.module.generate(input_ids=ids, max_new_tokens=2, use_cache=True)


def phi3():
    sizes = {**SIZES, **TOKENS, "vocab_size": 260, "num_hidden_layers": 6, "num_key_value_heads": 2}
    return tf.Phi3ForCausalLM(tf.Phi3Config(**sizes))


@pytest.mark.parametrize(
    ("fields", "key", "what"),
    [
        ({}, "keep_fraction", "the attention of block 2 is not known: it has no separate q, k, v; set it to 1"),
        (
            {"keep_fraction": 1.0, "mlp_prune_fraction": 0.5},
            "mlp_prune_fraction",
            "the MLP of block 0 is not known: it has no separate gate, up; set it to 0",
        ),
    ],
)
def test_fused_projections_are_refused_by_check_and_by_patch(fields, key, what, tmp_path):
    model = phi3()
    problems = Lemo(**fields).check(Facts(anatomy=Anatomy(model)))
    assert [(p.key, f"{p.what}; {p.remedy}") for p in problems] == [(key, what)]
    with (
        pytest.raises(LuthierError, match=f"compute.lemo.{key}: .*{what}"),
        Lemo(**fields).patch(ModelView(model.eval()), "train"),
    ):
        pass
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    recipe = {"model": str(tmp_path), "data": {"train": "rows.jsonl"}, "compute": {"lemo": fields}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=f"compute.lemo.{key}: the "):
        check_recipe(load_file(tmp_path / "r.yaml"), tmp_path, measure=False)


def test_what_a_method_is_not_asked_for_need_not_be_known():
    known = Facts(anatomy=Anatomy(phi3()))
    assert Lemo(keep_fraction=1.0).check(known) == []
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    moe = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**{**SIZES, **TOKENS, **experts, "num_hidden_layers": 6}))
    facts = Facts(anatomy=Anatomy(moe))
    assert Lemo().check(facts) == []
    assert [p.key for p in Lemo(mlp_prune_fraction=0.5).check(facts)] == ["mlp_prune_fraction"]


def test_a_layers_own_attention_is_given_the_places_its_tokens_had():
    view, batch, given = view_of(layers=6), batch_of((32, 21)), {}
    attention = view.block(3).self_attn
    own = attention.forward
    attention.forward = other = lambda *a, **k: given.update(k) or own(*a, **k)
    with Lemo(block_size=4).patch(view, "train") as state:
        view.trace(batch)
    assert attention.forward is other, "what was there before is there again"
    kept = state.kept[3]
    assert 0 < len(kept) < 53 and torch.equal(given["position_ids"], batch.pos[kept][None])
    assert torch.equal(given["kept_places"], batch.pos[kept])
    assert given["sequence_lengths"] == (int((kept < 32).sum()), int((kept >= 32).sum()))


def test_pruning_beside_a_tuner_that_trains_mlps_is_refused():
    pruned = Lemo(mlp_prune_fraction=0.5)
    for tuner, problems in ((Full(), ["mlp_prune_fraction"]), (Lora(), []), (Spiel(targets=("q_proj",)), [])):
        assert [p.key for p in pruned.check(Facts(others=(tuner, pruned)))] == problems
    assert Lemo().check(Facts(others=(Full(),))) == []


def test_an_adapter_on_one_layer_of_an_mlp_is_refused_and_a_lemo_that_leaves_nothing_out_changes_nothing():
    view = view_of(layers=6)
    view.module.requires_grad_(False)
    trainable = Lora(rank=2, targets=("up_proj",)).attach(view)
    with pytest.raises(LuthierError, match="trained or quantised"), Lemo(mlp_prune_fraction=0.5).patch(view, "train"):
        pass
    trainable.detach()
    view.layout = "padded"
    with Lemo(keep_fraction=1.0).patch(view, "train"):
        assert not any("forward" in vars(m) for m in view.module.modules())
    with pytest.raises(LuthierError, match="needs the padded layout"), Lemo(keep_fraction=0.5).patch(view, "train"):
        pass


def test_one_neuron_stays_however_many_are_pruned():
    batch = batch_of((9, 7))
    _, grads, _ = nll_and_grads(stirred("llama"), batch, Lemo(keep_fraction=1.0, mlp_prune_fraction=0.999))
    _, one, _ = nll_and_grads(stirred("llama"), batch, Lemo(keep_fraction=1.0, mlp_prune_fraction=63 / 64))
    assert all(torch.equal(a, b) for a, b in zip(grads, one, strict=True))
    _, two, _ = nll_and_grads(stirred("llama"), batch, Lemo(keep_fraction=1.0, mlp_prune_fraction=62 / 64))
    assert not any(torch.equal(a, b) for a, b in zip(two, one, strict=True))


def test_a_pruned_backward_is_charged_for_its_three_products():
    def spent(fraction):
        view = stirred("llama")
        nll_and_grads(view, batch_of((24, 17, 9)), Lemo(keep_fraction=1.0, mlp_prune_fraction=fraction))
        return view.meter.total

    assert spent(0.5) - spent(0.75) == 6 * 3 * 2 * 50 * 32 * 16, "six blocks, 50 tokens, 16 neurons of 32 numbers"


def test_packed_weights_of_an_mlp_are_refused():
    view = view_of(layers=6)
    view.module.requires_grad_(False)
    down = view.block(1).mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(LuthierError, match="trained or quantised"), Lemo(mlp_prune_fraction=0.5).patch(view, "train"):
        pass


def test_one_layer_of_an_mlp_with_another_forward_is_refused():
    view = view_of(layers=6)
    view.module.requires_grad_(False)
    up = view.block(1).mlp.up_proj
    up.forward = up.forward
    with pytest.raises(LuthierError, match="trained or quantised"), Lemo(mlp_prune_fraction=0.5).patch(view, "train"):
        pass


def test_a_quantised_mlp_is_refused_before_it_is_loaded():
    assert Lemo().check(Facts(quantized=True)) == []
    assert [p.what for p in Lemo(mlp_prune_fraction=0.5).check(Facts(quantized=True))] == [
        "its backward reads weights, and this model's are packed"
    ]


@pytest.mark.parametrize("where", [0, 4])
def test_a_refusal_halfway_leaves_the_model_as_it_was(where):
    view = view_of(layers=6)
    view.block(where).mlp.down_proj.weight.requires_grad_(True)
    for i in range(6):
        view.block(i).mlp.requires_grad_(i == where)
    with pytest.raises(LuthierError, match="trained or quantised"), Lemo(mlp_prune_fraction=0.5).patch(view, "train"):
        pass
    assert not any("forward" in vars(m) for m in view.module.modules())
