"""Adapters of others: folders of peft's. Which model they belong to, which kinds are taken, and what they make of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from luthier.model.tail import FAILURES, brief
from luthier.support.errors import RecipeError

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
OURS = ("update.json", "update.safetensors")  # beside peft's files, in a run's folder
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
PEFT_PREFIX = "base_model.model."  # before peft's names of the base's modules
# Types of peft's whose result is other weights. The result of others (prompts, routers) is not.
MERGED = (
    "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "HRA", "BOFT", "FOURIERFT", "RANDLORA", "DELORA", "MISS",
    "LN_TUNING", "TRAINABLE_TOKENS",
)  # fmt: skip
# Options of peft's LoRA whose result is no change of the weights, or needs more than the adapter's files.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which is no change of the weights",
    "layer_replication": "a LoRA over repeated layers (layer_replication)",
    "use_qalora": "a QALoRA, which belongs to packed weights", "arrow_config": "an Arrow router",
    "megatron_config": "a LoRA of Megatron's layers",
}  # fmt: skip
# Options of peft's LoRA that change weights, but not by scale * B A alone.
NOT_PLAIN = (
    "use_dora", "kasa_config", "use_bdlora", "monteclora_config", "lora_bias", "trainable_token_indices", "target_parameters",
)  # fmt: skip
# Starts that leave the base as it is; others rewrite it when the adapter is put on it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
REFUSED_STARTS = {  # by the first part of their name
    "corda": "peft needs the rows that it was started with", "loftq": "its base is a packed one that peft makes again",
    "pissa_niter": "peft draws its start at random, and so opens it differently each time",
}  # fmt: skip

SAME = 1e-3  # times the largest logit: rounding in float32 stays far below


def is_adapter(folder: Path) -> bool:
    """True for a folder that holds an adapter of peft's and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def fetched(name: str, revision: str | None) -> Path:
    """The folder, in the cache of the Hub, of an adapter with this id. Only its own files are downloaded.

    Raises OSError or ValueError where the Hub or its cache does not have it.
    """
    files = [CONFIG, *WEIGHTS, *OURS, *TOKENIZER]
    return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def config_in(folder: Path, key: str = "model") -> dict[str, Any]:
    """The configuration of an adapter that luthier takes. No tensor is read.

    key  of the recipe, for messages
    Raises RecipeError, with the kind's name, for another kind, and for a folder without the adapter's weights.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(key, f"{file}: cannot be read ({brief(error)})", "correct it") from error
    if not isinstance(config, dict):
        raise RecipeError(key, f"{file}: holds no object", "take the adapter's own file")
    why = _refused(config)
    if why is not None:
        raise RecipeError(key, f"{folder}: is {why}", "give its base model, or a model that it was merged into")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise RecipeError(key, f"{folder}: holds no {' or '.join(WEIGHTS)}", "download the missing file")
    return config


def _refused(config: Mapping[str, Any]) -> str | None:
    """What kind of adapter this is, if it is none that can be merged or trained on."""
    if config.get("peft_type") not in MERGED:
        return f"a {config.get('peft_type')} adapter, which is not taken up: {', '.join(MERGED)} are"
    start = str(config.get("init_lora_weights"))
    if why := next((w for name, w in REFUSED_STARTS.items() if start.startswith(name)), None):
        return f"a LoRA with init_lora_weights: {start}, and {why}"
    return next((what for option, what in REFUSED.items() if config.get(option)), None)


def is_plain(config: Mapping[str, Any]) -> bool:
    """True for a LoRA whose difference to the base is scale * B A, as far as its configuration says."""
    odd = any(config.get(option) for option in (*NOT_PLAIN, *REFUSED)) or config.get("bias", "none") != "none"
    return config.get("peft_type") == "LORA" and not odd and config.get("init_lora_weights") in PLAIN_STARTS


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, under peft's names.

    Raises OSError, ValueError, RuntimeError, SafetensorError or UnpicklingError for damaged files, and for pickles that hold
    anything but tensors: with weights_only no code of a pickle runs.
    """
    safe, pickled = (folder / name for name in WEIGHTS)
    if safe.is_file():
        return load_file(safe)
    try:
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    except EOFError as error:
        raise ValueError(f"{pickled.name} is empty or cut short") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{pickled.name} does not hold tensors by name")
    return found


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


def merged(model: PreTrainedModel, folder: Path, key: str = "model") -> PreTrainedModel:
    """The model with an adapter in its weights, added in float32 before rounding to their dtype.

    key  of the recipe, for messages
    Raises RecipeError if the adapter does not fit the model, if only a part of it does, or if the merged model computes something
    else than peft does with the adapter beside the weights.
    """
    dtype, tied = model.dtype, is_tied(model)
    found = _put_on(model, folder, key)
    try:
        beside = _logits(found)
        whole: Any = found.merge_and_unload()
    except FAILURES as error:
        what = f"{folder}: peft cannot compute with this adapter, or not merge it ({brief(error)})"
        raise RecipeError(key, what, "take another adapter, or its base model") from error
    if not all(bool(torch.isfinite(p).all()) for p in whole.parameters()):
        raise RecipeError(key, f"{folder}: with this adapter, a weight is not finite", "download the adapter again")
    apart = float((_logits(whole) - beside).abs().max())
    if not apart <= SAME * max(1.0, float(beside.abs().max())):
        why = "; its head and its embedding are one weight, and the adapter changes only one of them" if tied else ""
        what = (
            f"{folder}: in the model's weights this adapter gives other logits than beside them (by {apart:.2g}){why}"
        )
        raise RecipeError(key, what, "take another adapter, or its base model")
    if tied and not is_tied(whole):  # the adapter brings one of them whole
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
    whole.config._name_or_path = str(folder)
    done: PreTrainedModel = whole.to(dtype).requires_grad_(True)
    return done


def _put_on(model: PreTrainedModel, folder: Path, key: str) -> Any:
    """peft's model around this one, in float32, with the adapter's tensors. Raises RecipeError where they do not fit it."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    correct = "correct base_model_name_or_path in its adapter_config.json"
    remedy = correct if key == "model" else "name the model that it was trained on"
    try:
        tensors = tensors_in(folder)
        _refuse_other_vocabulary(model, tensors, folder, key)
        found = get_peft_model(model.float(), PeftConfig.from_pretrained(str(folder)))
        told: Any = set_peft_model_state_dict(found, tensors)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, UnpicklingError, SafetensorError) as error:
        what = f"{folder}: this adapter does not fit its base model ({brief(error)})"
        raise RecipeError(key, what, remedy) from error
    missing = [n for n in told.missing_keys if f".{found.base_model.prefix}" in n]
    if odd := [*told.unexpected_keys, *missing]:
        what = f"{folder}: this adapter does not fit its base model (the first name without a counterpart is {odd[0]})"
        raise RecipeError(key, what, remedy)
    return found


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """The logits of a short text, which ends as classifiers with a decoder want it."""
    config = model.config.get_text_config()
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    ids = [n % config.vocab_size for n in (5, 7, 11, 13, 17, 19, 23)] + [min(end or 3, config.vocab_size - 1)]
    training = model.training
    logits: Tensor = model.eval()(input_ids=torch.tensor([ids], device=model.device)).logits.float()
    model.train(training)
    return logits


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head and the embedding are one weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _refuse_other_vocabulary(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, key: str) -> None:
    """Raises RecipeError for an adapter that was trained on a model with other tokens."""
    tables: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    rows, of_tokens = len(tables[0].weight), {n for n, m in model.named_modules() if m in tables}
    for stored, tensor in tensors.items():
        module = stored.removeprefix(PEFT_PREFIX).removesuffix(".weight")
        if module in of_tokens and len(tensor) != rows:
            place = "model" if key == "start" else "base_model_name_or_path in its adapter_config.json"
            raise RecipeError(
                key, f"{folder}: was trained with {len(tensor)} tokens, and the model has {rows}",
                f"enlarge the model with resize_token_embeddings({len(tensor)}), save it with the adapter's tokenizer, and name "
                f"that folder in {place}",
            )  # fmt: skip
