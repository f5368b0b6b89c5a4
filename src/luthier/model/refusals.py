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
    "CanineForSequenceClassification": "it has no table of token embeddings",
    "CpmAntForCausalLM": "it sees the tokens that it should predict",
    "Emu3ForCausalLM": _NO_FOLDER,
    "FunnelForSequenceClassification": "it joins neighbouring tokens, so its trunk gives fewer states than there are tokens",
    "Gemma4AssistantForCausalLM": _DRAFTS,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFTS,
    "IBertForSequenceClassification": "it computes with rounded integers, which have no gradient",
    "LayoutLMv2ForSequenceClassification": "it reads pictures of pages, not text alone",
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
    "FlaubertWithLMHeadModel",
    "XLMForSequenceClassification",
    "XLMWithLMHeadModel",
)


def page() -> str:
    """The page of the docs."""
    lines = [
        "# Models",
        "",
        "luthier opens every model that transformers opens for [causal-lm](methods/causal-lm.md),",
        "[masked-lm](methods/masked-lm.md) or [classification](methods/task-classification.md), except those below. When a",
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
