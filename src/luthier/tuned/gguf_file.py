"""A GGUF file of a model: its sizes, its tensors under llama.cpp's names, its tokenizer; and the file read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from luthier.model.gguf_rope import FREQUENCIES, rope_of, scaling_in
from luthier.support.errors import LuthierError
from luthier.tuned.gguf_vocabulary import Vocabulary

# transformers' name of an architecture -> (llama.cpp's, whether its rotary rows lie interleaved).
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
ADD = {str: "add_string", float: "add_float32", int: "add_uint32"}  # of gguf.GGUFWriter


def refuse_architecture(config: Any) -> None:
    """Raises LuthierError for a model that is not written as GGUF."""
    if config.model_type not in ARCHITECTURES:
        raise LuthierError(
            f"export --to gguf: {config.model_type} models are not supported, only {', '.join(ARCHITECTURES)}; use --to hf"
        )
    rope_of(config.rope_parameters, head_dim(config), config.max_position_embeddings)


def head_dim(config: Any) -> int:
    """The width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_of(config: Any) -> int:
    """How many positions the file states. llama.cpp attends to all of them, so a sliding window is the most there can be."""
    window = getattr(config, "sliding_window", None)
    slides = window is not None and getattr(config, "use_sliding_window", True)
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows: [heads, 2, d / 2] -> [heads, d / 2, 2]."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_name(name: str, model_type: str, blocks: int) -> str:
    """llama.cpp's name of a parameter, from gguf's tables. Raises LuthierError if it has none."""
    import gguf

    architecture = ARCHITECTURES[model_type][0]
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    found: str | None = gguf.get_tensor_name_map(number, blocks).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise LuthierError(f"export --to gguf: {name} has no place in a {architecture} file; use --to hf")
    return found


def write(file: Path, model: PreTrainedModel, vocabulary: Vocabulary, name: str, about: dict[str, str]) -> None:
    """Write a model: matrices in float16, vectors in float32.

    about  general metadata: license
    """
    import gguf

    config = model.config
    architecture, interleaved = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name(name)
    if "license" in about:
        writer.add_license(about["license"])
    rope = rope_of(config.rope_parameters, head_dim(config), config.max_position_embeddings)
    _add_sizes(writer, config)
    for key, value in rope.entries.items():
        getattr(writer, ADD[type(value)])(f"{architecture}.rope.scaling.{key}", value)
    vocabulary.write(writer)
    if rope.divisors is not None:
        writer.add_tensor(FREQUENCIES, rope.divisors)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
    for parameter, p in model.named_parameters():
        value = p.detach().float().cpu().numpy()
        role = parameter.split(".")[-2]
        value = permuted(value, heads[role]) if role in heads else value
        kind = np.float16 if p.ndim > 1 else np.float32
        writer.add_tensor(gguf_name(parameter, config.model_type, config.num_hidden_layers), value.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Any) -> None:
    import gguf

    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def read_back(file: Path, config: Any) -> PreTrainedModel:
    """The model that the file holds, float32. transformers leaves scaled rotary embeddings out; they are read here.

    config  of the model that was written: whether layers have biases, and the head's width where transformers does not read it
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    theta = found.rope_parameters["rope_theta"]
    found.rope_parameters = {
        **found.rope_parameters,
        **scaling_in(str(file), theta, head_dim(found), config.rope_parameters),
    }
    for name in ("attention_bias", "mlp_bias", "head_dim"):
        if hasattr(config, name):
            setattr(found, name, getattr(config, name))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, config=found, quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )  # fmt: skip
    return model
