"""Whether vLLM loads an adapter: its rules, read from its loader (vllm/lora/peft_helper.py, lora_model.py, utils.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
HEADS = ("lm_head", "embed_tokens")


def refused_by_vllm(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Why vLLM refuses an adapter, in a few words; None if it loads it.

    config  adapter_config.json
    names   of the tensors in adapter_model.safetensors
    """
    if config.get("peft_type") != "LORA":
        return f"{config.get('peft_type')} is not LoRA"
    if missing := [k for k in ("r", "lora_alpha", "target_modules") if config.get(k) is None]:
        return f"{missing[0]} is missing"
    if config.get("modules_to_save"):
        return "it holds whole modules (modules_to_save)"
    if config.get("use_dora"):
        return "it uses DoRA"
    if config.get("bias", "none") != "none":
        return "it holds biases"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "its layers have different ranks or alphas, and vLLM reads one of each"
    if config["r"] > RANKS[-1]:
        return f"rank {config['r']} is larger than {RANKS[-1]}"
    return _refused_name(names)


def _refused_name(names: Iterable[str]) -> str | None:
    for name in names:
        module, _, kind = name.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            return f"it does not know the tensor {name}"
        if module.rpartition(".")[2] in HEADS:
            return f"it has no adapter for {module.rpartition('.')[2]} in most models"
    return None


def rank_to_serve(config: Mapping[str, Any]) -> int:
    """The --max-lora-rank that vLLM needs."""
    return next(r for r in RANKS if r >= config["r"])
