"""Small models made on this machine from local text: pairs with one tokenizer, and no download."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.data.rendering import Renderer
from luthier.model.loading import load_model, load_tokenizer, locate
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.rng import Streams
from luthier.support.sources import code_key
from luthier.training.loop import Loop
from luthier.tuners.full import Full

END = "<|endoftext|>"
Said = Callable[[dict[str, float]], None]


class Shape(NamedTuple):
    """The shape of a small Llama."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int


SMALL, LARGE = Shape(48, 2, 4, 2, 128), Shape(96, 3, 4, 2, 256)


class Pretraining(NamedTuple):
    """How long a model is pretrained: `steps` of `batch` rows, at learning rate `rate`."""

    steps: int = 1500
    batch: int = 32
    rate: float = 3e-3
    seed: int = 0


PRETRAINING = Pretraining()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and one mark for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {t: i for i, t in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def pieces(
    sources: Mapping[str, str], shares: Mapping[str, float], count: int, width: int, streams: Streams
) -> list[dict[str, str]]:
    """`count` rows of `width` characters from random places; each row's source is drawn by its share."""
    names, generator = sorted(shares), streams.at("pieces")
    chances = [shares[n] / sum(shares.values()) for n in names]
    chosen = generator.choice(len(names), size=count, p=chances)
    out = []
    for i in chosen:
        text = sources[names[i]]
        start = int(generator.integers(0, max(1, len(text) - width)))
        out.append({"text": text[start : start + width]})
    return out


def rendered(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Training rows of bare texts, or of prompts with completions."""
    renderer = Renderer(tokenizer, plain=True)
    segments = [renderer.segments(r) for r in rows]
    encoded = renderer.encode(segments)
    return [renderer.training_row(s, p, str(i)) for i, (s, p) in enumerate(zip(segments, encoded, strict=True))]


def pretrained(
    rows: Sequence[Mapping[str, Any]], shape: Shape, pretraining: Pretraining = PRETRAINING, say: Said = lambda entry: None,
    tokenizer: Any = None,
) -> Path:  # fmt: skip
    """The folder of a Llama that is pretrained on these rows; made once, kept in the cache.

    tokenizer  of another model, which this one shares; None: bytes
    It is small and has read very little. It can test a procedure, but says nothing about the quality of real models.
    """
    words = [] if tokenizer is None else [sorted(tokenizer.get_vocab().items())]
    folder, s = (
        cache_folder() / "local" / key_of(list(rows), shape, pretraining, code_key(__name__), *words),
        pretraining,
    )
    if folder.exists():
        return folder
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=shape.hidden, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, intermediate_size=shape.inner,
                max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    view = ModelView(model, tokenizer, name="made from local text")
    settings = TrainSettings(
        max_steps=s.steps, batch_size=s.batch, learning_rate=s.rate, lr_scheduler_type="cosine", seed=s.seed,
        tokens_per_forward=8192, warmup_fraction=0.02,
    )  # fmt: skip
    loop = Loop(view, rendered(rows, tokenizer), Full(seed=s.seed).attach(view, None, s.steps), Sft(), settings)
    for _ in range(s.steps):
        say(loop.step())
    with made(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def opened(folder: Path | str) -> ModelView:
    """A model by its folder or name, with its tokenizer."""
    located = locate(str(folder))
    return load_model(located, tokenizer=load_tokenizer(located))


@cache
def python_sources() -> dict[str, str]:
    """Texts of several kinds that are part of every Python: code by package, and prose about the language."""
    library = Path(sysconfig.get_paths()["stdlib"])
    from pydoc_data.topics import topics

    def code(*places: str) -> str:
        files = [
            f
            for p in places
            for f in (sorted((library / p).rglob("*.py")) if (library / p).is_dir() else [library / p])
        ]
        return "\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)

    return {
        "asyncio": code("asyncio", "concurrent"),
        "encodings": code("encodings"),
        "mail and web": code("email", "http", "urllib"),
        "manual": "\n".join(topics.values()),
        "numbers": code("_pydecimal.py", "fractions.py", "statistics.py", "datetime.py", "random.py"),
    }
