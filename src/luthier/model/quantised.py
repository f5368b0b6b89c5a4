"""Checkpoints that others quantised: which are loaded, how, and which are refused by name."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import Mxfp4Config

from luthier.model.packed_files import PACKED_BY, plain_tensors, problem
from luthier.model.tail import brief
from luthier.support.errors import LuthierError, RecipeError

# Turned into plain weights while transformers loads them, so every tuner works.
UNPACKED: Mapping[str, Any] = {
    "fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig,
}  # fmt: skip
AFTER_LOADING = ("torchao",)  # turned into plain weights afterwards
PACKED = ("bitsandbytes",)  # kept as they are; tuners that leave the weights alone train beside them
PACKAGES = {  # method -> (package that unpacks it, how to get it)
    "bitsandbytes": ("bitsandbytes", "pip install 'luthier[quant]'"), "torchao": ("torchao", "pip install torchao"),
    "compressed-tensors": ("compressed_tensors", "pip install compressed-tensors"),
}  # fmt: skip
# Of the methods that transformers knows: those that it opens for inference only, and those that it does not open any more.
INFERENCE_ONLY = (
    "auto-round", "fbgemm_fp8", "higgs", "metal", "nvfp4", "quark", "spqr", "vptq",
)  # fmt: skip
NOT_OPENED = ("hqq",)
NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "exl2": "EXL2", "exl3": "EXL3", "eetq": "EETQ", "vptq": "VPTQ",
    "spqr": "SpQR", "quip": "QuIP#", "bitnet": "BitNet", "mlx": "MLX", "modelopt": "ModelOpt", "fbgemm_fp8": "FBGEMM FP8",
    "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "quark": "Quark",
}  # fmt: skip
# Files beside config.json in which older tools name the method.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def method_of(config: PreTrainedConfig, folder: str = "") -> str | None:
    """The method that a checkpoint is quantised by, as its files name it; None for plain weights.

    folder  where it lies, if it is a folder
    """
    found = settings_of(config, folder)
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "a method that config.json does not name") if found else None


def settings_of(config: PreTrainedConfig, folder: str = "") -> dict[str, Any]:
    """What a checkpoint says of its quantisation; empty for plain weights."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if found := _as_dict(getattr(part, key, None)):
                return found
        if isinstance(getattr(part, "quantization", None), Mapping) and "bits" in part.quantization:
            return {**part.quantization, "quant_method": "mlx"}
    for name, method in BESIDE.items():
        if folder and (file := Path(folder) / name).is_file():
            try:
                return {"quant_method": method, **json.loads(file.read_text(encoding="utf-8"))}
            except (ValueError, OSError, TypeError) as error:
                raise RecipeError("model", f"{file}: cannot be read ({error})", "correct it, or remove it") from error
    return {}


def _as_dict(found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def is_packed_file(config: PreTrainedConfig) -> bool:
    """True for a checkpoint whose weights stay packed when it is loaded."""
    return method_of(config) in PACKED


def becomes_plain(config: PreTrainedConfig, folder: str = "") -> bool:
    """True for a checkpoint that is quantised, and whose weights are plain once it is loaded."""
    return method_of(config, folder) in (*UNPACKED, *AFTER_LOADING, *PACKED_BY)


def refuse_method(config: PreTrainedConfig, shown: str, quantize: str | None = None, folder: str = "") -> None:
    """Raises RecipeError for a checkpoint whose method luthier cannot train on this machine, from its configuration alone.

    quantize  the recipe's key
    """
    method = method_of(config, folder)
    if method is None:
        return
    name, (package, remedy) = NAMES.get(method, method), PACKAGES.get(method, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        what = f"{shown}: is quantised by {name}, and the package {package} is not installed"
        raise RecipeError("model", what, remedy)
    if method in PACKED and quantize is not None:
        raise RecipeError("quantize", f"{shown} is quantised already, by {name}", "remove quantize")
    why = problem(method, settings_of(config, folder)) if method in PACKED_BY else _untrained(method, name)
    if why is not None:
        raise RecipeError(
            "model", f"{shown}: is quantised {why}",
            "take the model that it was made from, with quantize: nf4 if memory is short",
        )  # fmt: skip


def _untrained(method: str, name: str) -> str | None:
    """By what a checkpoint is quantised, and why luthier does not train it; None if it does."""
    if method in (*UNPACKED, *AFTER_LOADING, *PACKED):
        return None
    if method in INFERENCE_ONLY:
        return f"by {name}, which transformers opens for inference only"
    if method in NOT_OPENED or method not in AUTO_QUANTIZER_MAPPING:
        return f"by {name}, which this version of transformers cannot open"
    return f"by {name}, and luthier cannot train beside its layers"


def unpacking(config: PreTrainedConfig) -> dict[str, Any]:
    """Keywords of `from_pretrained` that turn packed weights into plain ones; empty for other checkpoints."""
    method = method_of(config)
    return {} if method not in UNPACKED else {"quantization_config": UNPACKED[str(method)](dequantize=True)}


def read_packed(
    model_class: Any, folder: Path, files: tuple[Path, ...], config: PreTrainedConfig, dtype: Any
) -> tuple[Any, Any]:
    """(model of plain weights, what transformers says of loading it), from a checkpoint that GPTQ or AWQ packed.

    Raises ValueError where its tensors do not fit each other.
    """
    said = settings_of(config, str(folder))
    tensors = plain_tensors(files, str(method_of(config, str(folder))), said)
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    model, report = model_class.from_pretrained(None, config=plain, state_dict=tensors, **how)
    model.config._name_or_path = str(folder)
    return model, report


@torch.no_grad()
def make_plain(model: PreTrainedModel) -> None:
    """Put plain weights in the place of those that are subclasses of tensors, as torchao's are.

    Raises LuthierError for one that cannot be turned into plain numbers here.
    """
    for name, p in list(model.named_parameters()):
        if type(p) is nn.Parameter or type(p.data) is Tensor:
            continue
        holder, _, leaf = name.rpartition(".")
        try:
            whole = p.dequantize().to(p.dtype)
        except (RuntimeError, AttributeError) as error:  # no kernel for this processor, or no dequantize at all
            what = f"{name} is a {type(p.data).__name__}, which cannot be turned into plain numbers here"
            raise LuthierError(f"{what} ({brief(error)})") from error
        setattr(model.get_submodule(holder), leaf, nn.Parameter(whole.contiguous()))


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
