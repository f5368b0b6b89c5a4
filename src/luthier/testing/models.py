"""Tiny models, tokenizers, rows and batches, made on the spot: what tests of methods need."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from luthier.data.batch import IGNORE, Batch, collate
from luthier.model.view import ModelView, probe_layout

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


ENCODERS: dict[str, tuple[type[tf.PreTrainedConfig], type[tf.PreTrainedModel]]] = {
    "bert": (tf.BertConfig, tf.BertForMaskedLM),
    "roberta": (tf.RobertaConfig, tf.RobertaForMaskedLM),
    "distilbert": (tf.DistilBertConfig, tf.DistilBertForMaskedLM),
    "electra": (tf.ElectraConfig, tf.ElectraForMaskedLM),
    "modernbert": (tf.ModernBertConfig, tf.ModernBertForMaskedLM),
}
ENCODER_SIZES: dict[str, Any] = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
    "electra": {"embedding_size": 16},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
}


def tiny(kind: str = "llama", seed: int = 0, layers: int = 3, **more: Any) -> tf.PreTrainedModel:
    """A randomly initialised float32 model of a real architecture."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, **TOKENS, "num_hidden_layers": layers, **more}
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**{"num_key_value_heads": 2, **sizes}))
    if kind == "qwen3":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
    if kind == "gemma3":
        pattern = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
        return tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=pattern)
        )
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                **TOKENS,
                resid_pdrop=0,
                attn_pdrop=0,
                embd_pdrop=0,
            )
        )
    if kind == "opt":
        return tf.OPTForCausalLM(
            tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, ffn_dim=64,
                         word_embed_proj_dim=32, dropout=0.0, **TOKENS)
        )  # fmt: skip
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind in ENCODERS:
        config, model = ENCODERS[kind]
        return model(config(**{**sizes, **no_dropout, **ENCODER_SIZES.get(kind, {})}))
    if kind == "bert-classifier":
        return tf.BertForSequenceClassification(tf.BertConfig(**{**sizes, **no_dropout, "num_labels": 3}))
    if kind == "llama-classifier":
        return tf.LlamaForSequenceClassification(tf.LlamaConfig(**{"num_key_value_heads": 2, **sizes, "num_labels": 3}))
    if kind == "gpt2-classifier":
        no_drop: dict[str, Any] = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0, "num_labels": 3}
        return tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, **TOKENS, **no_drop)
        )
    if kind == "lfm2":
        pattern = ["conv" if i % 2 == 0 else "full_attention" for i in range(layers)]
        return tf.Lfm2ForCausalLM(tf.Lfm2Config(**sizes, num_key_value_heads=2, layer_types=pattern))
    raise ValueError(kind)


def tiny_classifier() -> tf.PreTrainedModel:
    """Two named classes over bytes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, **TOKENS, "vocab_size": 260, "num_key_value_heads": 2}
    return tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**sizes, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    )


def view_of(kind: str = "llama", **more: Any) -> ModelView:
    """A tiny model's view, in the layout the probe finds, in eval mode."""
    view = ModelView(tiny(kind, **more).eval())
    view.layout, _ = probe_layout(view)
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
    """Random rows of a class each, nothing else supervised."""
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
    return collate(rows_of(lengths, seed, answer))


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


WORDS = "the a it was is not very film book day good bad great terrible fine poor long short saw read liked in on ."


def word_tokenizer(words: str = WORDS, marks: str = "[PAD] [UNK] [CLS] [SEP] [MASK]") -> tf.PreTrainedTokenizerFast:
    """Words as tokens with an encoder's marks, as BERT puts them; made for texts of these words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = marks.split()
    vocabulary = {t: i for i, t in enumerate([*special, *dict.fromkeys(words.split())])}
    pad, unknown, first, last, mask = special
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(t, vocabulary[t]) for t in (first, last)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last, mask_token=mask
    )


def byte_tokenizer(template: str | None = TEMPLATE) -> tf.PreTrainedTokenizerFast:
    """Bytes as tokens, with SmolLM2's markers and template."""
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
