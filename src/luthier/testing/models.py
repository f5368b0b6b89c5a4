"""Tiny models, tokenizers, rows and batches, made on the spot: what tests of methods need."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers as tf

from luthier.data.batch import IGNORE, Batch, collate
from luthier.model.view import ModelView, probe_layout

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
STEADY: dict[str, Any] = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # encoders have dropout by default
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "intermediate_size": ""}  # fmt: skip
GPT2_STEADY: dict[str, Any] = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
DISTILBERT_NAMES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                    "intermediate_size": "hidden_dim"}  # fmt: skip


SAME: Mapping[str, str] = MappingProxyType({})


class Architecture(NamedTuple):
    """How a tiny model of one architecture is made.

    own    settings beside SIZES and TOKENS
    names  what its configuration calls a setting of SIZES; "": it has none of this kind
    turns  types of layers that take turns
    """

    config: type[tf.PreTrainedConfig]
    model: type[tf.PreTrainedModel]
    own: dict[str, Any]
    names: Mapping[str, str] = SAME
    turns: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(tf.LlamaConfig, tf.LlamaForCausalLM, GROUPED),
    "llama-classifier": Architecture(tf.LlamaConfig, tf.LlamaForSequenceClassification, {**GROUPED, "num_labels": 3}),
    "qwen3": Architecture(tf.Qwen3Config, tf.Qwen3ForCausalLM, {**GROUPED, "head_dim": 8}),
    "gemma3": Architecture(
        tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, {**GROUPED, "head_dim": 8, "sliding_window": 4},
        turns=("sliding_attention", "full_attention"),
    ),
    "lfm2": Architecture(tf.Lfm2Config, tf.Lfm2ForCausalLM, GROUPED, turns=("conv", "full_attention")),
    "gpt2": Architecture(tf.GPT2Config, tf.GPT2LMHeadModel, GPT2_STEADY, GPT2_NAMES),
    "gpt2-classifier": Architecture(
        tf.GPT2Config, tf.GPT2ForSequenceClassification, {**GPT2_STEADY, "num_labels": 3}, GPT2_NAMES
    ),
    "opt": Architecture(tf.OPTConfig, tf.OPTForCausalLM, {"dropout": 0.0}, {"intermediate_size": "ffn_dim"}),
    "bert": Architecture(tf.BertConfig, tf.BertForMaskedLM, STEADY),
    "bert-classifier": Architecture(tf.BertConfig, tf.BertForSequenceClassification, {**STEADY, "num_labels": 3}),
    "bert-tagger": Architecture(tf.BertConfig, tf.BertForTokenClassification, {**STEADY, "num_labels": 3}),
    "llama-tagger": Architecture(tf.LlamaConfig, tf.LlamaForTokenClassification, {**GROUPED, "num_labels": 3}),
    "roberta": Architecture(tf.RobertaConfig, tf.RobertaForMaskedLM, STEADY),
    "distilbert": Architecture(
        tf.DistilBertConfig, tf.DistilBertForMaskedLM, {"dropout": 0.0, "attention_dropout": 0.0}, DISTILBERT_NAMES
    ),
    "electra": Architecture(tf.ElectraConfig, tf.ElectraForMaskedLM, {**STEADY, "embedding_size": 16}),
    "modernbert": Architecture(
        tf.ModernBertConfig, tf.ModernBertForMaskedLM, {**STEADY, "cls_token_id": 1, "sep_token_id": 2}
    ),
}  # fmt: skip


_LAYOUTS: dict[str, str] = {}  # by kind and settings; a probe takes longer than making the model


def tiny(kind: str = "llama", seed: int = 0, layers: int = 3, **more: Any) -> tf.PreTrainedModel:
    """A randomly initialised float32 model of a real architecture.

    kind  a key of ARCHITECTURES
    more  settings of its configuration
    """
    config, model, own, names, turns = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, **TOKENS, "num_hidden_layers": layers, **more}
    settings = {**own, **{names.get(n, n): value for n, value in sizes.items() if names.get(n, n)}}
    if turns:
        settings.setdefault("layer_types", [turns[i % len(turns)] for i in range(layers)])
    return model(config(**settings))


def tiny_classifier() -> tf.PreTrainedModel:
    """A classifier of bytes with the classes "bad" and "good"."""
    names: dict[str, Any] = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return tiny("llama-classifier", vocab_size=260, num_labels=2, **names)


def view_of(kind: str = "llama", **more: Any) -> ModelView:
    """The view of a tiny model, in the layout that the probe finds, in eval mode; arguments as in `tiny`."""
    view, key = ModelView(tiny(kind, **more).eval()), repr((kind, sorted(more.items())))
    if key not in _LAYOUTS:
        _LAYOUTS[key], _ = probe_layout(view)
    view.layout = _LAYOUTS[key]
    return view


def rows_of(lengths: tuple[int, ...] = (9, 5, 12, 7), seed: int = 0, answer: int = 4) -> list[dict[str, Any]]:
    """Random rows whose last `answer` tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for key, n in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
        k = min(answer, n - 1)
        prompt = [1] * (n - k) + [0] * k
        out.append(
            {
                "ids": ids,
                "labels": [IGNORE] * (n - k) + ids[n - k :],
                "key": str(key),
                "token": {"prompt": prompt},
            }
        )
    return out


def labelled_rows(lengths: tuple[int, ...] = (9, 5, 12, 7), seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """Random rows, each with a class; no token is supervised."""
    return [
        {
            "ids": r["ids"],
            "labels": [IGNORE] * len(r["ids"]),
            "key": r["key"],
            "row": {"label": torch.tensor(i % classes)},
        }
        for i, r in enumerate(rows_of(lengths, seed))
    ]


def batch_of(lengths: tuple[int, ...] = (9, 5, 12, 7), seed: int = 0, answer: int = 4) -> Batch:
    """The rows of `rows_of` as a batch."""
    return collate(rows_of(lengths, seed, answer))


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


WORDS = "the a it was is not very film book day good bad great terrible fine poor long short saw read liked in on ."


def word_tokenizer(words: str = WORDS, marks: str = "[PAD] [UNK] [CLS] [SEP] [MASK]") -> tf.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these words, with the special tokens of BERT around each text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = marks.split()
    vocabulary = {t: i for i, t in enumerate([*special, *dict.fromkeys(words.split())])}
    pad, unknown, first, last, mask = special
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(t, vocabulary[t]) for t in (first, last)],
    )  # fmt: skip
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last, mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_tokenizer(template: str | None = TEMPLATE) -> tf.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, with SmolLM2's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*marks, *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = template
    return fast
