"""Packed equals alone, on every architecture: in the flat layout where the probe allows it, padded elsewhere."""

import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from luthier.data.batch import IGNORE, collate, pad, unpad
from luthier.kernels.plain import plain_operations
from luthier.model import attention
from luthier.model.attention import _fused, _plain, _varlen, flat_attention
from luthier.model.loading import load_model, locate
from luthier.model.view import ModelView, probe_layout
from luthier.objectives.base import Forward
from luthier.testing.models import batch_of, tiny, view_of

KINDS = ["llama", "qwen3", "gemma3", "gpt2", "opt", "bert", "lfm2"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone_equals_the_plain_model(kind):
    view, batch = view_of(kind), batch_of((9, 5, 12, 7))
    together = view.trace(batch).hidden[-1]
    for i, start in enumerate(batch.starts.tolist()):
        one = batch.select(torch.tensor([i]))
        plain = view.trunk(input_ids=one.ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(together[start : start + batch.lengths[i]], plain, atol=2e-5, rtol=1e-4)


def test_the_probe_pads_what_leaks():
    assert probe_layout(ModelView(tiny("llama").eval()))[0] == "flat"
    assert probe_layout(ModelView(tiny("lfm2").eval()))[0] == "padded"


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_gradients_agree_between_layouts(kind):
    grads = []
    for layout in ("flat", "padded"):
        view = view_of(kind)
        view.layout = layout
        Forward(batch_of(), view).nll().sum().backward()
        grads.append({n: p.grad for n, p in view.module.named_parameters()})
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_short_attention_equals_the_fused_kernel_and_ordinary_operations(causal, window):
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 9, 1)
    shapes = ((1, 4, 15, 8), (1, 2, 15, 8), (1, 2, 15, 8))
    q, k, v = (torch.randn(*s, generator=generator, requires_grad=True) for s in shapes)
    module = torch.nn.Module()
    module.is_causal = causal
    results = []
    for how in ("short", "plain", "fused"):
        if how == "fused":
            parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
            out = torch.cat([_fused(*p, 8**-0.5, causal, window, 0.0) for p in parts], dim=2).transpose(1, 2)
        elif how == "plain":
            with plain_operations():
                out, _ = flat_attention(module, q, k, v, None, sequence_lengths=lengths, sliding_window=window)
        else:
            out, _ = flat_attention(module, q, k, v, None, sequence_lengths=lengths, sliding_window=window)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_without_a_gradient_is_the_same(causal, window):
    module = torch.nn.Module()
    module.is_causal = causal
    q, k, v = (torch.randn(1, h, 15, 8, requires_grad=True) for h in (4, 2, 2))
    trained, _ = flat_attention(module, q, k, v, None, sequence_lengths=(5, 9, 1), sliding_window=window)
    with torch.no_grad():
        asked, _ = flat_attention(module, q, k, v, None, sequence_lengths=(5, 9, 1), sliding_window=window)
    assert trained.grad_fn.name().startswith("_ShortAttention") and asked.grad_fn is None
    torch.testing.assert_close(asked, trained)


def documented_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch's varlen_attn as its documentation describes it, for machines without its kernel."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = (x if x >= 0 else max_q for x in window_size)
    out = []
    for start, stop in itertools.pairwise(cu_seq_q):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        away = torch.arange(stop - start)[None, :] - torch.arange(stop - start)[:, None]
        seen = (away >= -left) & (away <= right)
        out.append(((q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("more", [set(), {"enable_gqa"}], ids=["torch 2.11", "torch 2.13"])
def test_the_variable_length_kernel_is_asked_for_the_same_attention(causal, window, key_heads, more, monkeypatch):
    import torch.nn.attention.varlen as kernels

    monkeypatch.setattr(kernels, "varlen_attn", documented_varlen)
    monkeypatch.setattr(attention, "_varlen_keys", lambda: frozenset({"scale", "window_size", *more}))
    lengths, heads = (6, 1, 9), (4, key_heads, key_heads)
    q, k, v = (torch.randn(1, h, 16, 8, generator=torch.Generator().manual_seed(h)) for h in heads)
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    wanted = torch.cat([_plain(*p, 8**-0.5, causal, window, 0.0) for p in parts], dim=2).transpose(1, 2)
    torch.testing.assert_close(_varlen(q, k, v, lengths, 8**-0.5, causal, window), wanted)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch has this kernel for GPUs only; what is asked of it is tested above"
)
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_the_variable_length_kernel_equals_one_sequence_at_a_time(window):
    lengths, module = (6, 1, 9), torch.nn.Module()
    module.is_causal = True
    q, k, v = (torch.randn(1, h, 16, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    out, _ = flat_attention(module, q, k, v, None, sequence_lengths=lengths, sliding_window=window)
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    one = torch.cat([_plain(*p, 64**-0.5, True, window, 0.0) for p in parts], dim=2).transpose(1, 2)
    torch.testing.assert_close(out.float(), one.float(), atol=2e-2, rtol=2e-2)


def test_hidden_states_of_any_layer_equal_the_models_own():
    view, batch = view_of(), batch_of((11,))
    own = view.trunk(input_ids=batch.ids.unsqueeze(0), output_hidden_states=True).hidden_states
    trace = view.trace(batch, (0, 1, 2, -1))
    for layer in (0, 1, 2, -1):
        torch.testing.assert_close(trace.hidden[layer], own[layer][0], atol=1e-5, rtol=0)


def test_collate_shifts_once():
    batch = collate([{"ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"ids": [8, 9], "labels": [IGNORE, 9]}])
    assert batch.labels.tolist() == [6, 7, IGNORE, 9, IGNORE]
    assert batch.pos.tolist() == [0, 1, 2, 0, 1] and batch.seq.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(unpad(pad(batch.ids, batch), batch), batch.ids)


def test_soft_caps_and_scales_of_the_head_are_honoured():
    view, batch = view_of("gemma3", final_logit_softcapping=0.5), batch_of((9,))
    own = view.module(input_ids=batch.ids.unsqueeze(0)).logits[0].float()
    ours = Forward(batch, view).logits(torch.arange(9))
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    expected = torch.nn.functional.cross_entropy(
        own[batch.supervised], batch.labels[batch.supervised], reduction="none"
    )
    torch.testing.assert_close(Forward(batch, view).nll(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_class_logits_equal_the_models_own(layout):
    view = ModelView(tiny("bert-classifier").eval())
    view.layout = layout
    batch = batch_of((9, 5, 7))
    for i in range(3):
        one = batch.select(torch.tensor([i]))
        own = view.module(input_ids=one.ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(Forward(batch, view).logits()[i], own, atol=1e-5, rtol=0)


def test_a_classifier_keeps_the_classes_of_its_file(tmp_path):
    tiny("bert-classifier").save_pretrained(tmp_path)
    view = load_model(locate(str(tmp_path)), AutoModelForSequenceClassification)
    assert view.classes == ["LABEL_0", "LABEL_1", "LABEL_2"]
