"""LoRA adapters of others: folders of peft's. Which model they belong to, and which kinds are taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from luthier.model.tail import brief
from luthier.support.errors import RecipeError

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# Options of peft's LoRA that compute something else than a difference of weights, by the names people know.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which is no change of the weights",
    "layer_replication": "a LoRA over repeated layers (layer_replication)",
    "use_qalora": "a QALoRA", "use_bdlora": "a block-diagonal LoRA (BD-LoRA)", "arrow_config": "an Arrow router",
    "kasa_config": "a KaSA adapter", "monteclora_config": "a MonteCLoRA", "velora_config": "a VeLoRA",
    "megatron_config": "a LoRA of Megatron's layers",
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """True for a folder that holds an adapter of peft's and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def config_in(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that luthier takes. No tensor is read.

    Raises RecipeError, with the kind's name, for another kind, and for a folder without the adapter's weights.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError("model", f"{file}: cannot be read ({brief(error)})", "correct it") from error
    if not isinstance(config, dict):
        raise RecipeError("model", f"{file}: holds no object", "take the adapter's own file")
    why = _refused(config)
    if why is not None:
        raise RecipeError("model", f"{folder}: is {why}", "merge it with peft (merge_and_unload), and give that folder")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise RecipeError("model", f"{folder}: holds no {' or '.join(WEIGHTS)}", "download the missing file")
    return config


def _refused(config: Mapping[str, Any]) -> str | None:
    """What kind of adapter this is, if it is none that can be merged or trained on."""
    if config.get("peft_type") != "LORA":
        return f"a {config.get('peft_type')} adapter, and only LoRA can be taken up"
    if config.get("bias", "none") != "none":
        return f"a LoRA with trained biases (bias: {config['bias']})"
    return next((what for option, what in REFUSED.items() if config.get(option)), None)


def place_of_base(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the adapter's model is: a path on this machine, also beside the adapter, or a Hub id. Raises RecipeError."""
    file, name = folder / CONFIG, config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise RecipeError("model", f"{file}: names no base model", "write base_model_name_or_path into it")
    for place in (Path(name), folder / name, folder.parent / name, folder.parent / Path(name).name):
        holds = (place / "config.json").is_file() or is_adapter(place) or (place.suffix == ".gguf" and place.is_file())
        if holds and place.resolve() != folder.resolve():
            return str(place)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise RecipeError(
        "model", f"{file}: base_model_name_or_path names {name}, which is not on this machine",
        "write there where the model lies, or its id on the Hub",
    )  # fmt: skip


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter in its weights, added in float32 before rounding to their dtype.

    Raises RecipeError if the adapter does not fit the model, or only a part of it does.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    dtype, place = model.dtype, str(folder)
    try:
        found = get_peft_model(model.float(), PeftConfig.from_pretrained(place))
        told: Any = set_peft_model_state_dict(found, load_peft_weights(place, device="cpu"))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        what = f"{folder}: this adapter does not fit its base model ({brief(error)})"
        raise RecipeError("model", what, "correct base_model_name_or_path in its adapter_config.json") from error
    missing = [n for n in told.missing_keys if ".lora_" in n]
    if odd := [*told.unexpected_keys, *missing]:
        what = f"{folder}: this adapter does not fit its base model (the first name without a counterpart is {odd[0]})"
        raise RecipeError("model", what, "correct base_model_name_or_path in its adapter_config.json")
    whole: PreTrainedModel = found.merge_and_unload().to(dtype)
    if not all(bool(torch.isfinite(p).all()) for p in whole.parameters()):
        raise RecipeError("model", f"{folder}: with this adapter, a weight is not finite", "download the adapter again")
    whole.config._name_or_path = place
    return whole.requires_grad_(True)
