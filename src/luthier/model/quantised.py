"""Checkpoints that others quantised: which are loaded, how, and which are refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from luthier.support.errors import RecipeError

# Turned into plain weights while they are loaded, so every tuner works.
UNPACKED: Mapping[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
PACKED = ("bitsandbytes",)  # kept as they are; tuners that leave the weights alone train beside them
NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "exl2": "EXL2", "exl3": "EXL3", "eetq": "EETQ", "vptq": "VPTQ",
    "spqr": "SpQR", "quip": "QuIP#", "bitnet": "BitNet", "mlx": "MLX", "modelopt": "ModelOpt", "fbgemm_fp8": "FBGEMM FP8",
    "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "mxfp8": "MXFP8", "nvfp4": "NVFP4",
}  # fmt: skip
# Files beside config.json in which older tools name the method.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def method_of(config: PreTrainedConfig, folder: str = "") -> str | None:
    """The method that a checkpoint is quantised by, as its files name it; None for plain weights.

    folder  where it lies, if it is a folder
    """
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            found = _as_dict(getattr(part, key, None))
            if found.get("load_in_4bit") or found.get("load_in_8bit"):
                return "bitsandbytes"
            if found:
                return str(found.get("quant_method") or "a method that config.json does not name")
        if isinstance(getattr(part, "quantization", None), Mapping) and "bits" in part.quantization:
            return "mlx"
    return next((m for name, m in BESIDE.items() if folder and (Path(folder) / name).is_file()), None)


def _as_dict(found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def is_packed_file(config: PreTrainedConfig) -> bool:
    """True for a checkpoint whose weights stay packed when it is loaded."""
    return method_of(config) in PACKED


def refuse_method(config: PreTrainedConfig, shown: str, quantize: str | None = None, folder: str = "") -> None:
    """Raises RecipeError for a checkpoint whose method luthier cannot train on this machine, from its configuration alone.

    quantize  the recipe's key
    """
    method = method_of(config, folder)
    if method is None:
        return
    name = NAMES.get(method, method)
    if method in PACKED and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("model", f"{shown}: is quantised by bitsandbytes", "pip install 'luthier[quant]'")
    if method in PACKED and quantize is not None:
        raise RecipeError("quantize", f"{shown} is quantised already, by {name}", "remove quantize")
    if method not in PACKED and method not in UNPACKED:
        raise RecipeError(
            "model", f"{shown}: is quantised by {name}, which luthier does not train",
            "take the model that it was made from, with quantize: nf4 if memory is short",
        )  # fmt: skip


def unpacking(config: PreTrainedConfig) -> dict[str, Any]:
    """Keywords of `from_pretrained` that turn FP8 and MXFP4 into plain weights; empty for other checkpoints."""
    method = method_of(config)
    return {} if method not in UNPACKED else {"quantization_config": UNPACKED[str(method)](dequantize=True)}


def four_bit(compute: torch.dtype) -> dict[str, Any]:
    """Keywords of `from_pretrained` for linear layers in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("quantize", "needs the package bitsandbytes", "pip install 'luthier[quant]'")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    }


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights beside packed layers another dtype; transformers leaves them as they are stored."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    model.config.dtype = dtype


def as_plain(model: PreTrainedModel) -> None:
    """Let a model that was unpacked be saved as plain weights; transformers would pack them again, or fail."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        model.__dict__.pop(name, None)
    model.__dict__["_weight_conversions"] = None
    model.config.__dict__.pop("quantization_config", None)


def ready_to_train(model: PreTrainedModel) -> None:
    """Settle how packed layers compute."""
    for module in model.modules():
        # On some CPUs, bitsandbytes repacks a weight at its first call without gradients. A repacked layer passes no gradient
        # on, so layers before it would not be trained.
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if getattr(layer, "compute_dtype", None) == torch.float16:  # many files say so; it overflows in training
            layer.compute_dtype = torch.bfloat16
