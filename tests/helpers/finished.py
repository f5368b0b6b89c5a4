"""Finished runs of a tiny model, and their numbers read from the files alone."""

import json

from safetensors.torch import load_file

from helpers.commands import write
from luthier import recipe
from luthier.model.adapter_folder import PEFT_PREFIX
from luthier.run.execute import run


def finished(folder, model, **keys):
    """A short run; returns its folder."""
    path = write(folder, model, **{"max_steps": 3, "evaluate": [], **keys})
    run(recipe.load_file(path), folder / "out", folder, forecast=False)
    return folder / "out"


def lora_deltas(folder):
    """Parameter -> alpha / r * B A, as peft's two files say."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    out = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix(PEFT_PREFIX).split(".lora_A.")[0]
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            out[f"{module}.weight"] = alpha / rank * tensors[name.replace("lora_A", "lora_B")] @ a
    return out
