"""What the anatomy says about a block is what the block computes; if that is unclear, it says that it does not know."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from luthier.model.anatomy import Anatomy
from luthier.model.blocks import Attention, GatedMlp, Unknown, queries_and_keys
from luthier.model.view import attention_implementation
from luthier.testing.models import SIZES, TOKENS, tiny

SOME = {**SIZES, **TOKENS, "num_key_value_heads": 2}


def biased():
    model = tiny("llama", mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(n)))
    return model


KNOWN = {
    "llama": lambda: tiny("llama"),
    "llama with biases": biased,
    "qwen3": lambda: tiny("qwen3"),
    "gemma3": lambda: tiny("gemma3"),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SOME)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SOME, sliding_window=5)),
}


def made(kind):
    """A model whose scores differ and whose norms do something: new ones are all ones, or zeros that stand for ones."""
    model = KNOWN[kind]().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            elif n.endswith(("q_proj.weight", "k_proj.weight")):
                p.mul_(10)
    return model


@pytest.mark.parametrize("kind", KNOWN)
def test_queries_and_keys_are_those_behind_the_models_own_attention_probabilities(kind):
    """At positions that are all zero nothing is turned: log p_ij - log p_ii is then scale (q_i k_j - q_i k_i)."""
    model = made(kind)
    anatomy = Anatomy(model)
    seen = []
    attention = model.get_submodule(anatomy.attention(1).module)
    attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attention_implementation(model, "eager"):
        out = model.base_model(
            ids, position_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids), output_attentions=True
        )
        q, k = queries_and_keys(model.get_submodule, anatomy.attention(1), seen[0])
    p, scores = out.attentions[1][0], attention.scaling * (q @ k.repeat_interleave(2, 0).transpose(1, 2))  # [H, T, T]
    i, j = (torch.arange(9)[:, None], torch.arange(9)[None, :])
    window = anatomy.attention(1).window or 99
    visible = (j <= i) & (i - j < window)
    assert torch.equal(p > 0, visible.expand_as(p)), "causal, and the window, are as the anatomy says"
    expected = p.log() - p.log().diagonal(dim1=1, dim2=2)[..., None]
    ours = scores - scores.diagonal(dim1=1, dim2=2)[..., None]
    assert float(ours[:, visible].abs().max()) > 0.1
    torch.testing.assert_close(ours[:, visible], expected[:, visible], atol=2e-5, rtol=1e-4)


def test_what_the_anatomy_knows_of_each():
    """Norms by head or over all heads, none; windows of the layers that have one; biases and activations of MLPs."""
    told = {kind: Anatomy(made(kind)) for kind in KNOWN}
    norms = {kind: (a.attention(1).q_norm, a.attention(1).k_norm) for kind, a in told.items()}
    at = "model.layers.1.self_attn"
    normed = {"qwen3", "gemma3", "olmo2"}
    assert norms == {k: (f"{at}.q_norm", f"{at}.k_norm") if k in normed else (None, None) for k in KNOWN}
    assert [k for k in normed if not told[k].attention(1).norm_by_head] == ["olmo2"]
    assert [told["gemma3"].attention(i).window for i in range(3)] == [4, None, 4]
    assert told["mistral"].attention(0).window == 5 and told["llama"].attention(0).window is None
    activations = {k: type(a.gated_mlp(0).activation).__name__ for k, a in told.items()}
    assert activations == {k: "GELUTanh" if k == "gemma3" else "SiLUActivation" for k in KNOWN}
    assert all(a.attention(0).causal for a in told.values())


@pytest.mark.parametrize("kind", KNOWN)
def test_the_formula_is_the_mlps_own(kind):
    model = made(kind)
    parts = Anatomy(model).gated_mlp(2)
    gate, up, down = (model.get_submodule(n) for n in (parts.gate, parts.up, parts.down))
    act = {"gemma3": lambda x: F.gelu(x, approximate="tanh")}.get(kind, F.silu)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    linear = lambda x, layer: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    with torch.no_grad():
        formula = linear(act(linear(x, gate)) * linear(x, up), down)
        torch.testing.assert_close(model.get_submodule(parts.module)(x), formula, atol=1e-6, rtol=1e-6)


def falcon(**more):
    return tf.FalconH1ForCausalLM(tf.FalconH1Config(**SOME, **more))


NOT_KNOWN = {
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SOME)), "no separate q, k, v", "no separate gate, up"),
    "gpt2": (lambda: tiny("gpt2"), "no separate q, k, v", "no separate gate"),
    "opt": (lambda: tiny("opt"), "compares other vectors", "no separate gate"),  # scales its queries itself
    "bert": (lambda: tiny("bert"), "stand in different modules", "no separate gate"),
    "falcon-h1": (
        lambda: falcon(mlp_multipliers=[1.5, 0.7], key_multiplier=0.5),  # numbers beside the layers
        "compares other vectors",
        "something else than down",
    ),
    "falcon-h1 without": (lambda: falcon(mlp_multipliers=[1.0, 1.0], key_multiplier=1.0), None, None),
    "qwen2-moe": (lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SOME)), None, "one part of a larger MLP"),
    "qwen3-next": (  # half of what q_proj makes are gates
        lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**SOME, head_dim=8, layer_types=["full_attention"] * 3)),
        "compares other vectors",
        "one part of a larger MLP",
    ),
    "lfm2": (lambda: tiny("lfm2"), None, "another activation than one module"),
}


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_what_is_not_known_is_said(kind):
    make, attention, mlp = NOT_KNOWN[kind]
    anatomy = Anatomy(make())
    for answer, why, known in ((anatomy.attention(1), attention, Attention), (anatomy.gated_mlp(1), mlp, GatedMlp)):
        if why is None:
            assert isinstance(answer, known)
        else:
            assert isinstance(answer, Unknown) and why in answer.why


class OnlyWhole(torch.nn.Module):
    """Treats no number by itself."""

    def forward(self, x):
        return x.softmax(-1)


class Scaled(torch.nn.Module):
    """Holds a weight."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def test_activations_over_the_whole_vector_or_with_weights_are_not_known():
    for activation, why in (
        (OnlyWhole(), "something else than down"),
        (Scaled(), "another activation than one module"),
    ):
        model = tiny("llama")
        model.model.layers[0].mlp.act_fn = activation
        anatomy = Anatomy(model)
        assert why in anatomy.gated_mlp(0).why and isinstance(anatomy.gated_mlp(1), GatedMlp)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_model_without_weights_gives_the_same_answers_and_asking_leaves_no_trace(kind):
    model = made(kind)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    drawn, name = torch.get_rng_state(), model.config._attn_implementation
    anatomy = Anatomy(model)
    attentions, mlps = [anatomy.attention(i) for i in range(3)], [anatomy.gated_mlp(i) for i in range(3)]
    assert torch.equal(drawn, torch.get_rng_state()) and model.config._attn_implementation == name
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    with torch.device("meta"):
        bare = Anatomy(type(model)(model.config))
    assert [bare.attention(i) for i in range(3)] == attentions
    names = lambda parts: (parts.module, parts.gate, parts.up, parts.down, type(parts.activation))  # noqa: E731
    assert [names(bare.gated_mlp(i)) for i in range(3)] == [names(m) for m in mlps]
