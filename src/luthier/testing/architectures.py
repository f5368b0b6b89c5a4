"""A tiny model of every architecture of the installed transformers, for each task that luthier trains.

One rule makes nearly all of them small: the default configuration with its sizes replaced by name. What else an architecture
needs is in OWN. A few layers are chosen so that every kind of layer occurs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

VOCABULARY, CLASSES = 97, 3
TABLE = 128  # positions
WORDS = 80  # ids from 3 up to this one are plain words in every architecture; marks of images and sounds come after it

# What stands on the trunk.
NEXT_TOKEN, TEXT_CLASS, TOKEN_CLASS = "next token", "class of a text", "classes of tokens"
HEADS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    NEXT_TOKEN: (tf.AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    TEXT_CLASS: (tf.AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    TOKEN_CLASS: (tf.AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
}

# By the name of a setting: its small value, where the default is a number.
_SMALL: dict[str, int] = {
    **dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim", "decoder_hidden_size",
        "embedding_dim", "lru_width", "text_embed_dim",
    ), 32),
    **dict.fromkeys((
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size",
        "hidden_dim", "d_inner", "mlp_dim", "dim_ff", "intermediate_size_mlp", "true_hidden_size", "dense_intermediate_size",
    ), 64),
    **dict.fromkeys((
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "kv_lora_rank", "q_lora_rank",
        "moe_shared_expert_intermediate_size", "embedding_size", "mamba_d_head", "mamba_head_dim", "expert_ffn_hidden_size",
        "bottleneck_size", "intra_bottleneck_size", "o_lora_rank", "expert_dim",
    ), 16),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "swa_num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "sliding_window", "sliding_window_size", "attention_chunk_size", "rotary_dim", "qk_rope_head_dim",
        "index_topk", "mamba_d_conv", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_conv_kernel_dim",
        "linear_num_heads", "attention_window_size", "mamba_chunk_size", "num_experts_per_layer", "local_attention",
    ), 4),
    **dict.fromkeys((
        "head_dim", "qk_nope_head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim",
        "global_head_dim", "query_pre_attn_scalar", "index_head_dim", "mamba_d_state", "state_size", "ssm_state_size",
        "hidden_size_per_layer_input", "kv_channels",
    ), 8),
    "index_n_heads": 16,  # with few, many scores are 0, and which of them are chosen is not defined
    "v_head_dim": 12,  # another width than keys, as DeepSeek's code allows
    **dict.fromkeys((
        "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k", "n_group",
        "linear_num_key_heads", "mamba_expand", "expand", "n_mamba_heads", "num_memory_blocks",
    ), 2),
    **dict.fromkeys((
        "topk_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "first_k_dense_replace",
        "mamba_n_groups", "n_groups", "num_dense_layers",
    ), 1),
    **dict.fromkeys((
        "max_position_embeddings", "n_positions", "context_length", "max_source_positions", "max_target_positions", "n_ctx",
        "seq_length", "max_seq_len", "original_max_position_embeddings", "max_sequence_length",
    ), TABLE),
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_KEY_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_WIDE = {"initializer_range": 0.2, "init_std": 0.2, "initializer_factor": 1.0}  # so that every part changes the result

# What else an architecture needs, by its model type.
_GROUPED: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2}
_ALTERNATING: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 8,
}  # fmt: skip
_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 2, "moe_layers": [1], "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
}  # fmt: skip
_QWEN4: dict[str, Any] = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 2, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "cohere_compass_text": {
        **_ALTERNATING, "sliding_window": 4,
        "rope_parameters": {n: {"rope_type": "default", "rope_theta": 10000.0} for n in _ALTERNATING["layer_types"]},
    },
    "cpmant": {"dim_head": 8},
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "deepseek_v2": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4, "token_dropout": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _ALTERNATING},
    "gemma4_assistant": {"text_config": {**_ALTERNATING, "hidden_size_per_layer_input": 0}},
    "gemma4_text": _ALTERNATING,
    "gemma4_unified": {"text_config": _ALTERNATING},
    "gemma4_unified_text": _ALTERNATING,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "mamba_d_head": 16},
    "hunyuan_v1_dense": _GROUPED,
    "hunyuan_v1_moe": _GROUPED,
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2, "qk_head_dim": 12},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mamba2": {"head_dim": 16, "chunk_size": 4},
    "ministral": {"head_dim": 8},
    "mpnet": {"pad_token_id": 1},
    "mistral4": {"head_dim": 12, "mlp_layer_types": None},
    "nemotron": _GROUPED,
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "num_self_attention_heads": 4},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8, "feed_forward_size": 64,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attn_layers": ["local", "lsh"], "hash_seed": 0,
        "num_buckets": 2,
    },
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "squeezebert": {"embedding_size": 32},
    "t5": {"decoder_start_token_id": 0},
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def model_types(head: str) -> list[str]:
    """The model types that transformers has a class for, in its order."""
    return list(HEADS[head][1])


def tiny_config(model_type: str, head: str = NEXT_TOKEN, **more: Any) -> tf.PreTrainedConfig:
    """A small configuration of this architecture.

    more  further settings
    """
    own: dict[str, Any] = {}
    if head != NEXT_TOKEN:
        own["num_labels"] = CLASSES
    if head == TOKEN_CLASS:
        own["classifier_dropout"] = 0.0  # without a setting, transformers drops a tenth before the heads of decoders
    settings = _small(tf.CONFIG_MAPPING[model_type](), {**OWN.get(model_type, {}), **more})
    if (
        head == NEXT_TOKEN
        and settings.get("is_decoder") is False
        and "is_decoder" not in more
        and "is_encoder_decoder" not in settings
    ):
        settings["is_decoder"] = True
    return tf.CONFIG_MAPPING[model_type](**{**settings, **own})


def tiny_model(model_type: str, head: str = NEXT_TOKEN, seed: int = 0, **more: Any) -> tf.PreTrainedModel:
    """A small model with random weights, in float32 and eval mode."""
    torch.manual_seed(seed)
    model: Any = HEADS[head][0].from_config(tiny_config(model_type, head, **more))
    tiny: tf.PreTrainedModel = model.float().eval()
    return tiny


def _small(default: tf.PreTrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that differ from its default."""
    values = {n: v for n, v in default.to_dict().items() if not n.startswith("_")}
    out: dict[str, Any] = {}
    kept = _chosen_layers(values)
    for name, value in values.items():
        part = getattr(default, name) if name in default.sub_configs else None
        if isinstance(part, tf.PreTrainedConfig):
            out[name] = {**_small(part, own.get(name, {})), "model_type": part.model_type}
        elif name in _LAYERS and isinstance(value, int):
            out[name] = len(kept)
        elif isinstance(value, (list, tuple)) and len(value) == _depth(values) and _depth(values) > 0:
            out[name] = [_SMALL.get(name, value[i]) for i in kept]
        elif (small := _small_value(name, value, values)) is not None:
            out[name] = small
    if "is_decoder" in values:
        out["is_decoder"] = values["is_decoder"]
    return {**out, **{n: v for n, v in own.items() if n not in default.sub_configs}}


def _small_value(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """The small value of a setting; None: it stays as it is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _KEY_HEADS and number:
        heads = values.get("num_attention_heads") or values.get("n_head") or value
        return 1 if value == 1 else 4 if value == heads else 2
    if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        return _SMALL[name]
    if name == "head_dim" and "qk_rope_head_dim" in values:  # DeepSeek's name for the part that positions turn
        return _SMALL["qk_rope_head_dim"]
    if name in _SMALL and number:
        return _SMALL[name]
    if name in _WIDE and number:
        return _WIDE[name]
    if re.search(r"drop|jitter", name) and number and value <= 1:
        return type(value)(0)
    if name.endswith("_multiplier") and isinstance(value, float) and value == 1.0:
        return 0.5
    if re.search(r"_token_(id|index)$|_id$", name) and number and value >= WORDS:
        return WORDS + sum(map(ord, name)) % (VOCABULARY - WORDS)
    return None


def _depth(values: Mapping[str, Any]) -> int:
    """Number of blocks of the default configuration."""
    return next((values[n] for n in _LAYERS if isinstance(values.get(n), int)), 0)


def _chosen_layers(values: Mapping[str, Any]) -> Sequence[int]:
    """A few layers, so that each kind of layer occurs: the first of each kind, at least two."""
    depth = _depth(values)
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == depth]
    kinds: Iterable[str] = [str([v[i] for v in lists]) for i in range(depth)]
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    more = [i for i in range(depth) if i not in chosen]
    return sorted([*chosen, *more[: max(0, 2 - len(chosen))]])
