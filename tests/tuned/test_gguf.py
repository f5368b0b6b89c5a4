"""GGUF files: the vocabulary's model and pre-tokenizer, special tokens, rope scaling, template; and what is refused."""

import gguf
import pytest
import torch
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from helpers.finished import finished
from luthier.data.rendering import Renderer
from luthier.model.gguf_rope import divisors
from luthier.model.loading import load_config, load_model, load_tokenizer, locate
from luthier.model.pre_tokenizers import DIGIT, GPT2, LLAMA3, NAMES, cut_as, name_of, rules_of
from luthier.support.errors import LuthierError
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned import llama_cpp
from luthier.tuned.export import export
from luthier.tuned.gguf_vocabulary import vocabulary_of
from luthier.tuned.modelfile import modelfile
from luthier.tuned.probe import difference

PIECES = [
    "▁a",
    "▁t",
    "he",
    "re",
    "er",
    "on",
    "in",
    "▁the",
    "▁say",
    "say",
    "▁s",
    "ay",
    "12",
    "▁▁",
    "▁▁▁▁",
    "do",
    "og",
    "▁do",
    "▁dog",
    "fo",
    "ox",
    "▁f",
    "▁fo",
    "▁fox",
    "in",
    "ing",
    "▁in",
    "▁ing",
]
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(prefix="legacy", template=TURNS):
    """A tokenizer like Llama 2's: control tokens, bytes, pieces whose order is their score."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    letters = sorted({c for p in PIECES for c in p} | set("abcdefghijklmnopqrstuvwxyz0123456789[]/INST."))
    vocabulary = {t: i for i, t in enumerate([*base, *dict.fromkeys(PIECES), *letters])}
    merges = [(p[:i], p[i:]) for p in dict.fromkeys(PIECES) for i in range(1, len(p))]
    merges = [m for m in merges if m[0] in vocabulary and m[1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in base[:3]])
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


def saved(folder, tokenizer, kind="llama", **more):
    tiny(kind, vocab_size=len(tokenizer) + 5, layers=2, max_position_embeddings=512, **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fields(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    short = {n: f.contents() for n, f in reader.fields.items()}
    return short, {t.name: t.data for t in reader.tensors}


def test_a_sentencepiece_model_is_written_as_llama_with_scores_and_types(tmp_path):
    tokenizer = sentencepiece()
    run = finished(tmp_path / "r", saved(tmp_path / "m", tokenizer))
    assert export(run, "gguf", tmp_path / "g")["difference"] < 0.02
    said, _ = fields(tmp_path / "g")
    assert said["tokenizer.ggml.model"] == "llama" and said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_space_prefix"] is True and said["tokenizer.ggml.add_eos_token"] is False
    tokens, types, scores = (said[f"tokenizer.ggml.{n}"] for n in ("tokens", "token_type", "scores"))
    by = dict(zip(tokens, types, strict=True))
    kinds = gguf.TokenType
    assert (by["<unk>"], by["</s>"], by["<0x41>"], by["▁the"]) == (
        kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE, kinds.NORMAL
    )  # fmt: skip
    assert types[-5:] == [kinds.UNUSED] * 5 and len(tokens) == len(tokenizer) + 5
    # Pieces that are joined earlier have larger scores.
    assert scores[tokens.index("▁t")] > scores[tokens.index("he")] > scores[tokens.index("▁the")]
    assert said["tokenizer.chat_template"] == TURNS and said["tokenizer.ggml.bos_token_id"] == 1


@pytest.mark.parametrize("prefix, expected", [("legacy", True), ("never", False)])
def test_the_space_before_text_is_what_the_tokenizer_does(prefix, expected):
    tokenizer = sentencepiece(prefix, template=None)
    assert vocabulary_of(Renderer(tokenizer), len(tokenizer)).space_prefix is expected


def test_a_vocabulary_that_llama_cpp_would_read_otherwise_is_refused():
    tokenizer = sentencepiece("first", template=None)  # a space before the text, none after a token in it
    with pytest.raises(LuthierError, match="llama.cpp would find other token ids than this tokenizer, for example in"):
        vocabulary_of(Renderer(tokenizer), len(tokenizer), ("<s>dog", "dog"))


@pytest.mark.parametrize(
    "steps, whole, name",
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "smollm"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], True, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], False, None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False, None),
    ],
)  # fmt: skip
def test_the_pre_tokenizer_is_found_by_its_rules(steps, whole, name):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.model.ignore_merges = whole
    if name is None:
        with pytest.raises(LuthierError, match="llama.cpp has no name for how this tokenizer cuts text"):
            vocabulary_of(Renderer(tokenizer), len(tokenizer))
        return
    assert vocabulary_of(Renderer(tokenizer), len(tokenizer)).pre == name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_rules_that_give_the_name(name):
    import json

    backend = byte_tokenizer().backend_tokenizer
    assert cut_as(backend, name)
    raw = json.loads(backend.to_str())
    assert rules_of(raw) == NAMES[name] and NAMES[name_of(raw)] == NAMES[name]
    assert not cut_as(backend, "of nobody")


def test_the_rules_of_smollm_cut_digits_alone():
    backend = byte_tokenizer().backend_tokenizer
    cut_as(backend, "smollm")
    assert [t for t, _ in backend.pre_tokenizer.pre_tokenize_str("a 12")] == ["a", "Ġ", "1", "2"]
    assert NAMES["smollm"].cuts == (DIGIT, GPT2)


def test_a_gguf_file_is_tokenised_as_it_says(tmp_path):
    tokenizer = byte_tokenizer()
    cut_as(tokenizer.backend_tokenizer, "smollm")
    run = finished(tmp_path / "r", saved(tmp_path / "m", tokenizer))
    export(run, "gguf", tmp_path / "g")
    found = load_tokenizer(locate(str(tmp_path / "g" / "model.gguf")))
    assert [t for t, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")] == ["a", "Ġ", "1", "2"]
    assert vocabulary_of(Renderer(found), len(found)).pre == "smollm"


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_embeddings_are_written_and_read_back(tmp_path, kind):
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    run = finished(tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), rope_parameters=rope))
    assert export(run, "gguf", tmp_path / "g")["difference"] < 0.02
    said, tensors = fields(tmp_path / "g")
    if kind == "llama3":
        assert tensors["rope_freqs.weight"].tolist() == pytest.approx(divisors(rope, 8).tolist())
    else:
        assert said["llama.rope.scaling.type"] == kind and said["llama.rope.scaling.factor"] == 4.0


def test_llama_3s_divisors_are_those_of_transformers():
    rope = {"rope_theta": 500000.0, **ROPES["llama3"]}
    config = tf.LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=rope)
    scaled = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(torch.tensor(divisors(rope, 128)), plain / scaled, rtol=1e-5, atol=0)


def test_a_scaling_without_a_place_is_refused_before_anything_is_written(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    run = finished(tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), rope_parameters=rope))
    with pytest.raises(LuthierError, match="rope_type dynamic has no place in a GGUF file"):
        export(run, "gguf", tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_qwen3_keeps_its_norms_and_its_head_width(tmp_path):
    run = finished(tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), "qwen3", head_dim=16))
    assert export(run, "gguf", tmp_path / "g")["difference"] < 0.02
    said, tensors = fields(tmp_path / "g")
    assert said["general.architecture"] == "qwen3" and said["qwen3.attention.key_length"] == 16
    assert "blk.1.attn_k_norm.weight" in tensors


def test_other_tokenizers_and_models_are_refused_by_name(tmp_path):
    run = finished(tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), "gpt2"))
    with pytest.raises(LuthierError, match="gpt2 models are not supported, only llama, mistral, qwen2, qwen3"):
        export(run, "gguf", tmp_path / "g")
    from luthier.testing.models import word_tokenizer

    words = word_tokenizer()
    with pytest.raises(LuthierError, match="WordPiece tokenizers are not supported"):
        vocabulary_of(Renderer(words), len(words))
    with pytest.raises(LuthierError, match=r"the tokenizer has \d+ tokens, the model embeddings for 20"):
        vocabulary_of(Renderer(byte_tokenizer()), 20)


def test_the_modelfile_says_the_template_in_ollamas_language():
    said = modelfile(Renderer(byte_tokenizer(), system="Be brief."), "model.gguf")
    turn = "<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n"
    assert said.startswith('FROM ./model.gguf\nTEMPLATE """') and turn in said
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" in said
    assert '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}' in said
    assert 'SYSTEM """Be brief."""' in said and 'PARAMETER stop "<|im_end|>"' in said
    odd = byte_tokenizer("{{ messages | length }}{{ messages[-1]['content'] | upper }}")
    assert "TEMPLATE" not in modelfile(Renderer(odd), "model.gguf")


@pytest.mark.skipif(not llama_cpp.installed(), reason="llama-cpp-python is not installed")
def test_llama_cpp_itself_agrees(tmp_path):
    run = finished(tmp_path / "r", saved(tmp_path / "m", sentencepiece()))
    export(run, "gguf", tmp_path / "g")  # compares ids and answers in llama.cpp


@pytest.mark.parametrize("kind", ROPES)
def test_a_gguf_file_is_opened_with_its_scaled_rotary_embeddings(tmp_path, kind):
    rope = {
        "rope_theta": 500000.0,
        **ROPES[kind],
    }  # as Llama 3 has it: its slowest frequency is divided by the whole factor
    run = finished(
        tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), rope_parameters=rope), tuner="full", dtype="float32"
    )
    export(run, "gguf", tmp_path / "g")
    config = load_config(locate(str(tmp_path / "g" / "model.gguf")))
    assert {k: config.rope_parameters[k] for k in rope} == pytest.approx(rope)
    ids = torch.arange(40, 60)[None].repeat(1, 5)  # 100 positions: beyond the first 64
    found = load_model(locate(str(tmp_path / "g" / "model.gguf")), dtype=torch.float32, device="cpu").module
    own = tf.AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        assert difference(found(ids).logits, own(ids).logits) < 0.02


def written(folder, pre, **more):
    """A GGUF file with another name for how it cuts text."""
    run = finished(folder / "r", saved(folder / "m", byte_tokenizer(), **more))
    export(run, "gguf", folder / "g")
    file = folder / "g" / "model.gguf"
    data, name = file.read_bytes(), b"tokenizer.ggml.pre"
    assert data.count(name) == 1
    at = data.index(name) + len(name) + 4  # behind the type of the value: the length of the text, and the text
    assert data[at + 8 : at + 13] == b"gpt-2" and len(pre) == 5
    file.write_bytes(data[: at + 8] + pre + data[at + 13 :])
    return file


@pytest.mark.parametrize("pre, said", [(b"nobod", True), (b"qwen2", False)])
def test_an_unknown_way_of_cutting_text_is_said(tmp_path, caplog, pre, said):
    file = written(tmp_path, pre)
    with caplog.at_level("WARNING", logger="luthier"):
        locate(str(file))
    assert ("cuts text as 'nobod', which luthier does not know" in caplog.text) is said


def test_a_head_width_of_its_own_is_read_from_a_gguf_file(tmp_path):
    run = finished(tmp_path / "r", saved(tmp_path / "m", byte_tokenizer(), "qwen3", head_dim=16))
    export(run, "gguf", tmp_path / "g")
    assert load_config(locate(str(tmp_path / "g" / "model.gguf"))).head_dim == 16


def test_unigram_tokenizers_are_refused_by_name():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(
        LuthierError, match="export --to gguf: Unigram tokenizers are not supported, only .*; use --to hf"
    ):
        vocabulary_of(Renderer(tokenizer), len(tokenizer))
