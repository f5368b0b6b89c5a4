"""The exact checks of the sheet; numbers in names are the sheet's."""

import pytest
import torch
import torch.nn.functional as F

from luthier.compute.lemo import Lemo, block_scores, kept_blocks, layer_keep, pruned_mlp, tokens_of
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora


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


def test_2_the_gather_path_equals_dense_attention_with_eliminated_keys_masked():
    view, batch = view_of(layers=6), batch_of((32,))
    layer, compute = 3, Lemo(keep_fraction=0.5, block_size=4)
    seen = {}

    def record(module, args, kwargs, output):
        seen["in"], seen["kwargs"], seen["out"] = kwargs["hidden_states"].detach(), kwargs, output[0].detach()

    attention = view.module.model.layers[layer].self_attn
    with torch.no_grad(), compute.patch(view, "train") as state:
        handle = attention.register_forward_hook(record, with_kwargs=True)
        view.trace(batch)
        handle.remove()
    kept = state.kept[layer]
    x, (cos, sin) = seen["in"], seen["kwargs"]["position_embeddings"]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        q, k, v = (
            f(x).view(1, 32, -1, 8).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(2, 3)) * 8**-0.5
        allowed = torch.tril(torch.ones(32, 32, dtype=torch.bool))
        allowed[:, [i for i in range(32) if i not in set(kept.tolist())]] = False
        p = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
        full = attention.o_proj((p @ v).transpose(1, 2).reshape(1, 32, -1))
        expected = torch.zeros_like(full)
        expected[:, kept] = full[:, kept]
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=0)


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


def naive_scores(q, k, size, symmetrise):
    heads, length, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[0], 0)
    n = -(-length // size)
    out = torch.zeros(n, n)
    for i in range(length):
        for j in range(i + 1):
            s = sum(max(float(q[h, i] @ k[h, j]) / dim**0.5, 0.0) for h in range(heads)) / heads
            out[i // size, j // size] = max(float(out[i // size, j // size]), s)
    if symmetrise:
        for m in range(n):
            for j in range(m):
                out[j, m] = out[m, j]
    return out


@pytest.mark.parametrize("symmetrise", [True, False])
def test_4_scores_equal_four_loops_and_only_positives_count(symmetrise):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 11, 8, generator=generator), torch.randn(2, 11, 8, generator=generator)
    ours = block_scores(q, k, 4, symmetrise=symmetrise)
    torch.testing.assert_close(ours, naive_scores(q, k, 4, symmetrise), atol=1e-5, rtol=0)
    # A head whose score is negative may become more negative: nothing changes.
    q1, k1 = torch.ones(1, 2, 1), torch.tensor([[[-1.0], [-1.0]]])
    assert torch.equal(block_scores(q1, k1, 1), block_scores(q1, 5 * k1, 1))


def test_kept_blocks_hold_the_first():
    scores = torch.diag(torch.tensor([0.1, 5.0, 3.0, 4.0]))
    assert kept_blocks(scores, 2).tolist() == [0, 1]
    assert kept_blocks(scores, 2, keep_first=False).tolist() == [1, 3]
    assert tokens_of(torch.tensor([0, 2]), 4, 10).tolist() == [0, 1, 2, 3, 8, 9]


def test_5_mlp_forward_is_exact_and_the_backward_is_that_of_the_masked_mlp():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 8, generator=generator, requires_grad=True)
    gate, up, down = (torch.randn(*s, generator=generator) for s in ((20, 8), (20, 8), (8, 20)))
    plain = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    for keep in (20, 10, 1):
        out = pruned_mlp(x, gate, up, down, keep)
        assert torch.equal(out, plain)
        (ours,) = torch.autograd.grad(out.square().sum(), x)
        score = F.silu(x @ gate.T).norm(dim=0) + (x @ up.T).norm(dim=0)
        mask = torch.zeros(20)
        mask[score.topk(keep).indices] = 1.0
        masked = (F.silu(x @ gate.T) * (x @ up.T) * mask) @ down.T
        (theirs,) = torch.autograd.grad((masked * (2 * plain).detach()).sum(), x)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


def test_6_chunked_loss_equals_one_piece_with_ignored_chunks():
    from luthier.kernels.head import token_nll

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 50, (300,), generator=generator)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(token_nll(hidden, weight, labels), expected, atol=1e-5, rtol=0)
    assert token_nll(hidden[:0], weight, labels[:0]).sum() == 0


def saved_bytes(view, batch, compute):
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with compute.patch(view, "train"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = view.trace(batch).hidden[-1].sum()
    del loss
    weights = {p.untyped_storage().data_ptr() for p in view.module.parameters()}
    return sum(n for p, n in sizes.items() if p not in weights)


def test_7_saved_attention_memory_follows_the_kept_share():
    """Attention's share of the saved bytes in sparse layers, by the difference to a model without attention patches."""
    from luthier.model.attention import _ShortAttention

    seen = []
    original = _ShortAttention.forward

    def spy(ctx, query, *rest):
        seen.append(query.shape[2])
        return original(ctx, query, *rest)

    view, batch = view_of(layers=6), batch_of((160,))
    _ShortAttention.forward = staticmethod(spy)
    try:
        with Lemo(keep_fraction=0.4, block_size=16).patch(view, "train"):
            view.trace(batch)
    finally:
        _ShortAttention.forward = original
    assert seen == [160, 160, 64, 64, 64, 160]
    dense = saved_bytes(view_of(layers=6), batch, Lemo(keep_fraction=1.0))
    sparse = saved_bytes(view_of(layers=6), batch, Lemo(keep_fraction=0.4, block_size=16))
    assert sparse < dense


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
    with pytest.raises(LuthierError, match="no separate q, k, v"), Lemo().patch(view_of("gpt2", layers=6), "train"):
        pass
    view = view_of(layers=6)
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(RuntimeError, match="generate and evaluate outside"), Lemo(block_size=2).patch(view, "train"):
        view.module.generate(input_ids=ids, max_new_tokens=2, use_cache=True)
