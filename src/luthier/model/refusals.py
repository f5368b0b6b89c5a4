"""The architectures that luthier cannot train, each with its reason: one list, which `check`, loading and the docs read.

What is not in it is tried when it is loaded: its states and logits are compared with the model's own call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from luthier.support.errors import RecipeError

_DRAFTS = "it drafts for another model and reads that model's keys and values"
_SOUNDS = "it writes codes of sounds, several at a time, and no text"
_NO_FOLDER = "it is the text part of a larger model, and transformers cannot open what it saves of that part"
_FIXED = "it trains only on texts of one fixed length"

# By the class that transformers opens.
REFUSED: Mapping[str, str] = {
    "BltForCausalLM": "it reads bytes in pieces that a second model cuts",
    "BrosForTokenClassification": "it reads the places of words on pages, not text alone",
    "CanineForSequenceClassification": "it has no table of token embeddings",
    "CanineForTokenClassification": "it has no table of token embeddings",
    "CpmAntForCausalLM": "it sees the tokens that it should predict",
    "Emu3ForCausalLM": _NO_FOLDER,
    "FunnelForSequenceClassification": "it joins neighbouring tokens, so its trunk gives fewer states than there are tokens",
    "Gemma4AssistantForCausalLM": _DRAFTS,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFTS,
    "IBertForSequenceClassification": "it computes with rounded integers, which have no gradient",
    "IBertForTokenClassification": "it computes with rounded integers, which have no gradient",
    "LayoutLMv2ForSequenceClassification": "it reads pictures of pages, not text alone",
    "LayoutLMv2ForTokenClassification": "it reads pictures of pages, not text alone",
    "MllamaForCausalLM": _NO_FOLDER,
    "MusicgenForCausalLM": _SOUNDS,
    "MusicgenMelodyForCausalLM": _SOUNDS,
    "PerceiverForSequenceClassification": "its blocks run over a few latent vectors, not over tokens",
    "ProphetNetForCausalLM": "it predicts several tokens ahead at each place",
    "ReformerForSequenceClassification": _FIXED,
    "ReformerModelWithLMHead": _FIXED,
    "XLNetLMHeadModel": "it sees the tokens that it should predict; it was trained on texts in permuted order",
}
# Their code keeps keys between calls of a block, so a block cannot be computed again in the backward pass.
NOT_AGAIN = (
    "FlaubertForSequenceClassification",
    "FlaubertForTokenClassification",
    "FlaubertWithLMHeadModel",
    "XLMForSequenceClassification",
    "XLMForTokenClassification",
    "XLMWithLMHeadModel",
)


_FILES = (
    "",
    "## Files",
    "",
    "`luthier check` tests the files of a folder before anything is loaded, and names a file that is missing, cut short or",
    "damaged.",
    "",
    "| what | how it is taken |",
    "|---|---|",
    "| safetensors, whole or in shards | read; weights that the model lacks a place for are said, missing ones are refused |",
    "| pytorch_model.bin, whole or in shards | read, if it holds nothing but tensors; a pickle that runs code is refused |",
    "| float16 | loaded in float32, which holds its values exactly; `dtype: bfloat16` takes half the memory |",
    "| several dtypes, and none in config.json | loaded in float32 |",
    "| bitsandbytes, 4 or 8 bits | stays packed, beside it bfloat16 for float16; lora, peft, adapter and dept train on top, and "
    "`export` merges into the numbers that the bits stand for |",
    "| FP8, MXFP4 | become plain weights in the dtype of config.json; every tuner works |",
    "| GPTQ (2, 4, 8 bits), AWQ (gemm) | unpacked by luthier into plain weights, in safetensors; every tuner works |",
    "| compressed-tensors, torchao | become plain weights, with the package of that name; what such a checkpoint rounds in "
    "activations is not rounded |",
    "| HQQ, EXL2, MLX, AutoRound and all others | refused by name, with the reason; take the model they were made from |",
    "| .gguf | dequantised once, with its rotary scaling; an unknown way of cutting text is said |",
    "| an adapter of peft's as `model`, a folder or an id on the Hub | merged into its base, which is found by its "
    "base_model_name_or_path |",
    "| a plain LoRA as `start` (rsLoRA, ranks by layer, a trained head too) | stays beside the weights; the result is one "
    "adapter that holds both |",
    "| other adapters as `start` (DoRA, PiSSA, biases, whole embeddings, IA3, LoHa, LoKr, VeRA, OFT) | become the difference of "
    "weights that peft makes of them; the result is in luthier's own files; not on packed weights |",
    "| adapters with other logits in the weights than beside them (of one of two tied tables) | refused when they are merged |",
    "| aLoRA, repeated layers, CorDA, LoftQ, PiSSA with a random start, prompts and other types | refused by name |",
    "| a classifier from masked-LM weights without a pooler | a pooler is drawn at random, from the recipe's seed, as the head "
    "is, and trained and saved with it |",
    "| generation_config.json | its end tokens and stop strings end answers; it is kept in what is saved |",
    "| more embeddings than tokens | trained and kept as they are |",
    "| more tokens than embeddings | refused if a row has such a token, with the row and the token |",
)


def page() -> str:
    """The page of the docs."""
    lines = [
        "# Models",
        "",
        "luthier opens every model that transformers opens for [causal-lm](methods/causal-lm.md),",
        "[masked-lm](methods/masked-lm.md), [classification](methods/task-classification.md) or",
        "[token-classification](methods/token-classification.md), except those below. When a",
        "model is loaded, its hidden states and logits are compared with the model's own call on two short texts; a model that",
        "differs is refused in a sentence. `make soak` tries a tiny model of every architecture: loss, logits, steps of three",
        "tuners, merging, opening again with transformers and peft, answers in a batch, gradient checkpointing.",
        "",
        "These are refused by name, before anything is loaded:",
        "",
        "| class | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in sorted(REFUSED.items())),
        "",
        "These cannot be trained with `gradient_checkpointing`, because their code keeps keys between calls of a block: "
        + ", ".join(NOT_AGAIN)
        + ".",
        "",
        "Experts of mixtures (Mixtral, OLMoE, GPT-OSS, Qwen3-MoE, DeepSeek) are stacked in one tensor for each block, so",
        "they are no linear layers: `all-linear` leaves them out, and `luthier check` says how many weights they are. The",
        "tuner `full` trains them.",
        *_FILES,
    ]
    return "\n".join(lines) + "\n"


def class_of(auto: Any, config: PreTrainedConfig) -> str | None:
    """The name of the class that this Auto class of transformers opens; None if it opens none."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        return None
    name: str = (found[0] if isinstance(found, (list, tuple)) else found).__name__
    return name


def refuse_architecture(auto: Any, config: PreTrainedConfig) -> None:
    """Raises RecipeError for a model that luthier cannot train."""
    name = class_of(auto, config)
    if name is not None and name in REFUSED:
        raise RecipeError(
            "model", f"{name}: {REFUSED[name]}", "choose another model; docs/models.md lists what is refused"
        )
