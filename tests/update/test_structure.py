"""Removed heads and neurons: the model without them, its files, its merged form, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from luthier.model.view import ModelView
from luthier.support.errors import LuthierError
from luthier.testing.architectures import tiny_model
from luthier.testing.models import batch_of, tiny, view_of
from luthier.tuners import Full, Lora
from luthier.update import Dense, LowRank, Modules, Replace, Seeds, Sparse, Structure, Update
from luthier.update.files import load, save_update

# Whole key-value groups where queries share one; in Llama's last block one query head of each group.
HEADS = {
    "llama": {0: [2, 3], 2: [0, 3]}, "qwen3": {0: [0, 1]}, "gemma3": {1: [2, 3]}, "bert": {0: [1, 3], 1: [0]}, "opt": {2: [3]},
}  # fmt: skip
NEURONS = {1: [0, 5, 63], 2: [7]}


def zeroed(kind, heads=None, neurons=None, update=None):
    """The view of a model, with an update merged into it, where these heads and neurons are there and say nothing."""
    view = view_of(kind)
    if update is not None:
        update.merge_into(view.module)
    width = view.anatomy.head_dim
    with torch.no_grad():
        for x in view.anatomy.block_linears:
            weight = view.weight(x.name).T if x.transposed else view.weight(x.name)
            if x.role == "o":
                for h in (heads or {}).get(x.block, ()):
                    weight[:, h * width : (h + 1) * width] = 0
            elif x.role == "down":
                weight[:, (neurons or {}).get(x.block, [])] = 0
    return view


def states(view):
    return view.trace(batch_of()).hidden[-1].detach()


def without(view, heads=None, neurons=None):
    return Update(view.base, (Structure.removing(view.anatomy, heads, neurons),))


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("kind", HEADS)
def test_without_heads_it_is_the_model_whose_heads_say_nothing(kind, layout):
    view, reference = view_of(kind), zeroed(kind, HEADS[kind])
    view.layout = reference.layout = layout
    plain, anatomy = states(view), view.anatomy
    shapes = {n: p.shape for n, p in view.module.named_parameters()}
    with without(view, HEADS[kind]).bind(view):
        torch.testing.assert_close(states(view), states(reference), atol=2e-6, rtol=1e-6)
        assert float((states(view) - plain).abs().max()) > 1e-2
        fewer = sum(p.numel() for p in view.module.parameters())
        # Every head takes its rows of q and o's columns with it, and the last of a group those of k and v.
        assert view.anatomy.parameters == {n: tuple(p.shape) for n, p in view.module.named_parameters()}
    assert fewer < sum(p.numel() for p in view.module.parameters())
    assert view.anatomy is anatomy and {n: p.shape for n, p in view.module.named_parameters()} == shapes
    assert torch.equal(states(view), plain)


def test_the_weights_of_a_group_go_and_those_of_half_a_group_stay():
    view = view_of()
    with without(view, {0: [2, 3], 2: [0, 3]}).bind(view):
        shapes = {n.removeprefix("model.layers."): s for n, s in view.anatomy.parameters.items()}
        attention = [view.module.get_submodule(f"model.layers.{i}.self_attn") for i in range(3)]
    of = lambda block: [shapes[f"{block}.self_attn.{x}_proj.weight"] for x in "qkvo"]  # noqa: E731
    assert of(0) == [(16, 32), (8, 32), (8, 32), (32, 16)]
    assert of(1) == [(32, 32), (16, 32), (16, 32), (32, 32)]
    assert of(2) == [(16, 32), (16, 32), (16, 32), (32, 16)]
    assert [a.num_key_value_groups for a in attention] == [2, 2, 2]
    with without(view, {2: [0, 3]}).bind(view):
        assert [a.num_key_value_groups for a in attention] == [2, 2, 1]


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "opt"])
def test_without_neurons_it_is_the_model_whose_neurons_say_nothing(kind):
    view, reference = view_of(kind), zeroed(kind, neurons=NEURONS)
    plain = states(view)
    with without(view, neurons=NEURONS).bind(view):
        torch.testing.assert_close(states(view), states(reference), atol=2e-6, rtol=1e-6)
    assert torch.equal(states(view), plain)


def test_generation_with_a_cache_sees_the_smaller_model():
    view, reference = view_of(), zeroed("llama", HEADS["llama"], NEURONS)
    ids = torch.tensor([[1, 5, 9, 20, 31]])
    with without(view, HEADS["llama"], NEURONS).bind(view):
        ours = view.module.generate(ids, max_new_tokens=6, do_sample=False)
    assert ours.tolist() == reference.module.generate(ids, max_new_tokens=6, do_sample=False).tolist()


def test_files_give_back_the_same_structure(tmp_path):
    view = view_of()
    update = without(view, HEADS["llama"], NEURONS)
    save_update(update, tmp_path)
    again = load(tmp_path)
    assert again.digest() == update.digest()
    with update.bind(view):
        expected = states(view)
    with again.bind(view):
        assert torch.equal(states(view), expected)


@pytest.mark.parametrize(
    ("kind", "heads", "neurons", "opens"),
    [
        ("llama", [2, 3], None, AutoModelForCausalLM),
        ("llama", [0, 2], [1, 2, 3], AutoModelForCausalLM),
        ("qwen3", [0, 1], [0], AutoModelForCausalLM),
        ("bert", None, [0, 63], AutoModelForMaskedLM),
        ("gpt2", None, [5], AutoModelForCausalLM),
        ("opt", None, [5], AutoModelForCausalLM),
    ],
)
def test_merged_it_is_a_smaller_model_that_transformers_opens(kind, heads, neurons, opens, tmp_path):
    every = lambda x: None if x is None else dict.fromkeys(range(3), x)  # noqa: E731
    view, model = view_of(kind), tiny(kind)
    update = without(view, every(heads), every(neurons))
    assert update.refusal(model) is None
    update.merge_into(model)
    model.save_pretrained(tmp_path)
    opened = opens.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 20, 31]])
    with update.bind(view):
        expected = view.module(input_ids=ids).logits
    torch.testing.assert_close(opened(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
    assert {n: p.shape for n, p in opened.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert sum(p.numel() for p in opened.parameters()) < sum(p.numel() for p in tiny(kind).parameters())


@pytest.mark.parametrize(
    ("kind", "heads", "words"),
    [
        (
            "llama",
            {0: [2, 3]},
            r"blocks keep different numbers of heads \(\[2, 4\]\), and LlamaConfig holds one for all",
        ),
        ("bert", dict.fromkeys(range(3), (1, 3)), "BertConfig cannot say what is left: .*query.weight the shape"),
        (
            "bert",
            dict.fromkeys(range(3), (1,)),
            r"BertConfig does not allow what is left \(The hidden size \(32\) is not a",
        ),
    ],
)
def test_what_no_configuration_can_say_is_not_merged(kind, heads, words):
    view, model = view_of(kind), tiny(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = model.config.to_dict()
    with pytest.raises(LuthierError, match=f"a structure part cannot be merged into weights: {words}"):
        without(view, heads).merge_into(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and model.config.to_dict() == config


@pytest.mark.parametrize(
    ("kind", "heads", "neurons", "words"),
    [
        ("llama", {0: [4]}, None, r"block 0: a removed head lies outside 0\.\.3"),
        ("llama", {0: [-1]}, None, r"block 0: a removed head lies outside 0\.\.3"),
        ("llama", {0: [-1, 2]}, None, r"block 0: a removed head lies outside 0\.\.3"),
        ("llama", {0: [0, 1, 2, 3]}, None, "block 0: all 4 heads would be removed; keep one"),
        ("llama", {1: [0]}, None, r"block 1: key-value heads would keep \[1, 2\] query heads; remove whole groups"),
        ("llama", {0: [1, 1]}, None, "heads of block 0 are not a list of whole numbers without repetition"),
        (
            "llama",
            {3: [0, 1]},
            None,
            "block 3: heads are removed where q, k, v and o have a matrix each; its matrices are none",
        ),
        ("lfm2", {0: [0]}, None, "block 0: heads are removed where q, k, v and o"),
        ("gpt2", {0: [0]}, None, r"block 0: heads are removed where .* transformer\.h\.0\.attn\.c_attn\.weight"),
        ("llama", None, {0: [64]}, r"block 0: a removed neuron lies outside 0\.\.63"),
        ("llama", None, {0: [-1]}, r"block 0: a removed neuron lies outside 0\.\.63"),
        ("llama", None, {0: [-1, 5]}, r"block 0: a removed neuron lies outside 0\.\.63"),
        ("llama", None, {0: [5, 64]}, r"block 0: a removed neuron lies outside 0\.\.63"),
        ("llama", None, {0: range(64)}, "block 0: all 64 neurons would be removed"),
        (
            "llama",
            None,
            {9: [1]},
            "block 9: neurons are removed where up and down have a matrix each; its matrices are none",
        ),
    ],
)
def test_what_cannot_be_removed_is_named(kind, heads, neurons, words):
    with pytest.raises(ValueError, match=words):
        Structure.removing(view_of(kind).anatomy, heads, neurons)


def test_a_norm_over_all_heads_is_not_passed_over():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    model = Olmo2ForCausalLM(
        Olmo2Config(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    )
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight counts heads too"):
        Structure.removing(ModelView(model).anatomy, {0: [1]})


def test_a_number_for_each_head_is_not_passed_over():
    view = ModelView(tiny_model("gpt_oss"))
    with pytest.raises(ValueError, match=r"block 0: model\.layers\.0\.self_attn\.sinks counts heads too"):
        Structure.removing(view.anatomy, {0: [0]})


def test_norms_within_a_head_count_no_heads_though_there_is_one_key_value_head():
    """k is then as wide as one head, and so is the norm of each head."""
    view, reference = (view_of("qwen3", num_key_value_heads=1) for _ in range(2))
    with torch.no_grad():
        reference.weight("model.layers.0.self_attn.o_proj.weight")[:, :16] = 0
    with without(view, {0: [0, 1]}).bind(view):
        torch.testing.assert_close(states(view), states(reference), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mlp.down_proj": (32, 60)}, r"block 0: its MLP's matrices have inner widths \[60, 64\], one is needed"),
        ({"mlp.gate_proj": (62, 32)}, r"block 0: its MLP's matrices have inner widths \[62, 64\], one is needed"),
        ({"mlp.gate_proj": (64, 32), "mlp.other.gate_proj": (64, 32)}, "its matrices are .*mlp.other.gate_proj.weight"),
        ({"mlp.gate_proj": (64, 32)}, None),
    ],
)
def test_the_matrices_of_an_mlp_have_one_inner_width_and_one_of_each_role(more, words):
    shapes = {"mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64), **more}
    part = Structure({}, {}, {0: torch.tensor([1])}, "model.layers", 8)
    found = list(part.problems({f"model.layers.0.{n}.weight": s for n, s in shapes.items()}))
    assert len(found) == (words is not None) and all(re.search(words, x) for x in found)


def test_a_structure_has_no_half():
    view = view_of()
    with (
        pytest.raises(TypeError, match="a structure part cannot be scaled"),
        without(view, {0: [2, 3]}).bind(view, 0.5),
    ):
        pass
    assert view.weight(Q).shape == (32, 32)


def test_attention_modules_say_what_is_left_of_them():
    """Two of 4 heads are left, each of 8 numbers, and as many key-value heads."""
    view, model = view_of("bert"), tiny()
    attention = view.module.get_submodule("bert.encoder.layer.0.attention.self")
    with without(view, {0: [1, 3]}).bind(view):
        assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
    assert (attention.num_attention_heads, attention.all_head_size) == (4, 32)
    assert model.model.layers[1].self_attn.num_key_value_groups == 2
    without(view_of(), dict.fromkeys(range(3), (0, 2))).merge_into(model)
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [1, 1, 1]


def test_the_base_that_is_asked_in_between_is_whole_and_the_smaller_model_comes_back():
    view = view_of()
    layer, whole = view.module.get_submodule("model.layers.2.self_attn"), view.anatomy

    def seen():
        return layer.num_key_value_groups, layer.q_proj.out_features, layer.o_proj.in_features, view.anatomy is whole

    with without(view, {2: [0, 3]}).bind(view):
        with view.without_update():
            assert seen() == (2, 32, 32, True)
        assert seen() == (1, 16, 16, False)
        assert view.anatomy.parameters["model.layers.2.self_attn.q_proj.weight"] == (16, 32)
    assert seen() == (2, 32, 32, True)


def test_a_strangers_structure_is_checked_before_anything_is_touched(tmp_path):
    view = view_of()
    save_update(without(view, {0: [2, 3]}), tmp_path)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    tensors, header = load_file(tmp_path / "update.safetensors"), json.loads((tmp_path / "update.json").read_text())
    entry = header["parts"][0]["header"]
    for changed, words in (
        ({"0.heads.0": torch.tensor([2.0, 3.0])}, "without repetition"),
        ({"0.heads.0": torch.tensor(2)}, "without repetition"),
        ({"0.heads.0": torch.tensor([2])}, "key-value heads go with all of their 2 query heads"),
        ({"0.kv_heads.0": torch.tensor([0])}, "key-value heads go with all of their 2 query heads"),
        ({"0.kv_heads.1": torch.tensor([0])}, "key-value heads go with all of their 2 query heads"),
        ({"0.heads.0": torch.tensor([1 << 60, 3])}, "outside"),
        ({"0.heads.x": torch.tensor([1])}, r"update\.json"),
        ({"head_dim": 0}, "a head's width is 0"),
        ({"head_dim": 7}, "are not heads of 7 each"),
        ({"head_dim": float("inf")}, r"update\.json"),
        ({"blocks": "nowhere"}, "its matrices are none"),
        ({"blocks": "model"}, "its matrices are none"),
        ({"transposed": True}, "key-value heads go with all of their 1 query heads"),
    ):
        save_file(tensors | {k: v for k, v in changed.items() if k.startswith("0.")}, tmp_path / "update.safetensors")
        header["parts"][0]["header"] = {**entry, **{k: v for k, v in changed.items() if not k.startswith("0.")}}
        (tmp_path / "update.json").write_text(json.dumps(header))
        with pytest.raises(LuthierError, match=words), load(tmp_path).bind(view):
            pass
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


def test_a_structure_of_matrices_stored_the_other_way_round_is_refused():
    view = view_of("bert")  # whose matrices of attention are square, so that shapes do not tell
    (part,) = without(view, {0: [1]}).parts
    with (
        pytest.raises(LuthierError, match="made for matrices stored as .in, out., this model stores them as .out, in."),
        Update(view.base, (replace(part, transposed=True),)).bind(view),
    ):
        pass


# --- before and after other parts ---

Q, K, OUT = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qko")
DOWN = "model.layers.0.mlp.down_proj.weight"


def drawn(seed, *shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def earlier(shapes):
    """Every form that has rows or columns to lose."""
    flat = torch.arange(0, 32 * 32, 7)
    names = (Q, K, OUT, DOWN)
    a = {n: drawn(4, 2, shapes[n][1]) for n in names}
    values = {OUT: drawn(2, len(flat)), Q: drawn(3, len(flat))}
    return {
        "dense": Dense({n: drawn(1, *shapes[n]) for n in names}),
        "sparse": Sparse({OUT: flat, Q: flat + 1}, values, dict.fromkeys((OUT, Q), (32, 32))),
        "lowrank": LowRank(a, {n: drawn(5, shapes[n][0], 2) for n in names}, dict.fromkeys(names, 2.0)),
        "seeds": Seeds(torch.tensor([3]), torch.tensor([0.05], dtype=torch.float64), {n: shapes[n] for n in names}),
        "replace": Replace({n: drawn(6, *shapes[n]) for n in names}),
        "modules": Modules({"model.layers.0.mlp.down_proj": drawn(7, 2, 32)}, {"model.layers.0.mlp.down_proj": drawn(8, 32, 2)}),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["dense", "sparse", "lowrank", "seeds", "replace", "modules"])
def test_what_was_learnt_before_heads_are_removed_is_shortened_with_them(form, tmp_path):
    view = view_of()
    heads, neurons = {0: [2, 3], 2: [0, 3]}, {0: [0, 5, 63]}
    first = Update(view.base, (earlier(view.anatomy.parameters)[form],))
    second = without(view, heads, neurons)
    whole = first.then(second)
    assert whole.parts[0].kind == "structure" and len(whole.parts) == 2
    with whole.bind(view):
        torch.testing.assert_close(states(view), states(zeroed("llama", heads, neurons, first)), atol=3e-6, rtol=1e-6)
    save_update(whole, tmp_path)
    assert load(tmp_path).digest() == whole.digest()


def test_low_rank_factors_of_transposed_matrices_lose_the_right_side():
    view = view_of("gpt2")
    up, down = "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"
    a = {up: drawn(1, 2, 32), down: drawn(2, 2, 128)}
    part = LowRank(a, {up: drawn(3, 128, 2), down: drawn(4, 32, 2)}, {up: 1.0, down: 1.0}, frozenset((up, down)))
    first, second = Update(view.base, (part,)), without(view, neurons={1: [0, 64, 127]})
    with first.then(second).bind(view):
        ours = states(view)
    merged = view_of("gpt2")
    first.merge_into(merged.module)
    undo = second.parts[0].bind(merged).undo
    torch.testing.assert_close(ours, states(merged), atol=2e-6, rtol=1e-6)
    undo()


def test_a_second_structure_counts_what_the_first_left():
    view = view_of("bert")
    first = without(view, {0: [1]}, {1: [0, 1], 2: [3]})
    with first.bind(view):
        second = without(view, {0: [0, 2], 2: [3]}, {1: [0, 61]})
        undo = second.parts[0].bind(view).undo
        live = states(view)
        undo()
    both = first.then(second)
    assert [t.tolist() for t in both.parts[0].heads.values()] == [[0, 1, 3], [3]]
    assert {b: t.tolist() for b, t in both.parts[0].neurons.items()} == {1: [0, 1, 2, 63], 2: [3]}
    with both.bind(view):
        assert torch.equal(states(view), live)


@pytest.mark.parametrize(
    ("first", "then", "both"),
    [
        ([1], [0, 2], [0, 1, 3]),  # 0 2 3 4 are left
        ([0, 1, 4], [0, 1, 2], [0, 1, 2, 3, 4, 5]),  # 2 3 5 6 are left
        ([4, 0], [3], [0, 4, 5]),  # 1 2 3 5 are left
        ([2], [], [2]),
        ([], [2], [2]),
    ],
)
def test_places_that_count_what_is_left_by_hand(first, then, both):
    one, other = (Structure({}, {}, {0: torch.tensor(x, dtype=torch.int64)}, "model.layers", 8) for x in (first, then))
    assert one.followed_by(other)[0].neurons[0].tolist() == both


def test_outputs_that_modules_read_cannot_be_taken_away_afterwards():
    view = view_of()
    behind = Modules({Q.removesuffix(".weight"): drawn(1, 2, 32)}, {Q.removesuffix(".weight"): drawn(2, 32, 2)})
    with pytest.raises(TypeError, match=r"cannot take outputs of model\.layers\.0\.self_attn\.q_proj away"):
        Update(view.base, (behind,)).then(without(view, {0: [2, 3]}))


@pytest.mark.parametrize("tuner", [Full(), Lora(rank=2)])
def test_the_smaller_model_is_tuned_and_given_back(tuner, tmp_path):
    """Recovery after pruning: the tuner sees the shapes that are left, and its update stands on the base."""
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    smaller = without(view, HEADS["llama"], NEURONS)
    with smaller.in_place(view):
        trainable = tuner.attach(view)
        with torch.no_grad():
            for p in trainable.parameters():
                p.add_(0.01)
        trainable.after_step(None)
        live, later = states(view), trainable.update()
        trainable.detach()
    whole = smaller.then(later)
    save_update(whole, tmp_path)
    with load(tmp_path).bind(view):
        torch.testing.assert_close(states(view), live, atol=2e-6, rtol=1e-6)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in view.module.named_parameters())
