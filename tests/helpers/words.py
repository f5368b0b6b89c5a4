"""Tiny tokenizers of the kinds in use, made on the spot. `TOKENIZERS` lists them by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from helpers.templates import MARKS, WRITTEN

TEXT = [
    "the answer is the number that follows the question", "hello there, how are you today?", "I am fine, and you?",
    "assistant user system model final", "the dash — and the ümlaut", "two plus two is four\nand six is seven", "[INST] [/INST]",
] * 3  # fmt: skip
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACE = "▁"


def _finished(tokenizer: Tokenizer, template: str | None, marks: Any = MARKS, **named: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in WRITTEN])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **named})
    fast.chat_template = template
    return fast


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen: BPE of bytes, nothing around a text."""
    return _finished(Tokenizer.from_str(_byte_level()), template)


def byte_level_with_bos(template: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama-3: the post-processor puts BOS first, whatever the settings say."""
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]),
        ]
    )  # fmt: skip
    return _finished(tokenizer, template)


@cache
def _pieces() -> str:
    """SentencePiece's BPE with bytes for unknown characters, without a normalizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator([SPACE + t for t in TEXT], trainer)
    return tokenizer.to_str()


def sentencepiece(template: str | None = None, lead: str = "normalizer") -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral.

    lead  how the space before a text comes about: "normalizer" (Llama-2), "first" or "always" (Metaspace), "never" (Gemma)
    """
    tokenizer = Tokenizer.from_str(_pieces())
    if lead == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif lead in ("first", "always"):
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=lead, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if lead != "never" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _finished(tokenizer, template, unk_token="<unk>")


@cache
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def unigram(template: str | None = None) -> PreTrainedTokenizerFast:
    """As XGLM: Unigram, a space before each text, EOS before it too."""
    tokenizer = Tokenizer.from_str(_unigram())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return _finished(tokenizer, template, unk_token="<unk>")


def word_pieces(template: str | None = None) -> PreTrainedTokenizerFast:
    """As BERT: lower case, [CLS] before a text and [SEP] after it, no end token unless a template writes it."""
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz.,?!:",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {} if template else {"bos_token": None, "eos_token": None}
    return _finished(tokenizer, template, unk_token="[UNK]", **named)


def slow_bytes(template: str | None = None) -> ByT5Tokenizer:
    """As ByT5: bytes, written in Python, EOS after each text."""
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=MARKS[2:])
    tokenizer.bos_token = "<pad>"
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS: dict[str, Callable[..., Any]] = {
    "byte-level": byte_level,
    "byte-level-bos": byte_level_with_bos,
    "sentencepiece": sentencepiece,
    "metaspace-first": partial(sentencepiece, lead="first"),
    "metaspace-always": partial(sentencepiece, lead="always"),
    "no-lead": partial(sentencepiece, lead="never"),
    "unigram": unigram,
    "word-pieces": word_pieces,
    "slow-bytes": slow_bytes,
}
