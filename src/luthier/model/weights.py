"""The files of a checkpoint: tested before they are read, and compared with what the model needs."""

from __future__ import annotations

import json
import logging
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from luthier.support.errors import RecipeError

log = logging.getLogger(__name__)

# In the order in which transformers looks for them.
SAFE, PICKLED = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
AGAIN = "download it again"
FOUND = "luthier_use_cache"  # the key of what the configuration said, in a loaded model's __dict__
MAX_HEADER = 100_000_000  # bytes; the limit of the library safetensors


class WeightFiles(NamedTuple):
    """The files with a model's weights. safe: they are safetensors; else pickles."""

    files: tuple[Path, ...]
    safe: bool


def weight_files(folder: Path) -> WeightFiles:
    """The files that transformers would read. Raises RecipeError if there are none, or if one of them is missing."""
    for names, safe in ((SAFE, True), (PICKLED, False)):
        single, index = (folder / name for name in names)
        if single.is_file():
            return WeightFiles((single,), safe)
        if index.is_file():
            return WeightFiles(_shards(index), safe)
    raise RecipeError(
        "model", f"{folder}: holds no weights ({', '.join((*SAFE, *PICKLED))})", "give a folder saved by transformers"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = tuple(index.parent / name for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError("model", f"{index}: cannot be read as a list of shards ({error!r})", AGAIN) from error
    missing = [f for f in files if not f.is_file()]
    if missing or not files:
        count = f"{len(missing)} of {len(files)} shards are missing"
        raise RecipeError(
            "model", f"{missing[0] if missing else index}: {count}", "download the missing files, or the model again"
        )
    return files


def refuse_damaged(folder: Path) -> WeightFiles:
    """Test the weight files in a folder by their headers; no tensor is read. Returns them.

    Raises RecipeError, naming the file, for one that is missing, cut short, damaged, or that would run code.
    """
    found = weight_files(folder)
    for file in found.files:
        with file.open("rb") as opened:
            head = opened.read(24)
        if head.startswith(b"version https://git-lfs"):
            raise RecipeError("model", f"{file}: is a pointer of git-lfs, not the weights", "run git lfs pull")
        (_refuse_cut if found.safe else _refuse_code)(file)
    return found


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape and place. Raises RecipeError if it cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise RecipeError("model", f"{file}: is cut short or damaged (its header does not fit in the file)", AGAIN)
        try:
            found: dict[str, Any] = json.loads(opened.read(length))
            return {name: entry for name, entry in found.items() if name != "__metadata__"}
        except (ValueError, AttributeError, RecursionError) as error:
            raise RecipeError("model", f"{file}: its header is damaged", AGAIN) from error


def _refuse_cut(file: Path) -> None:
    header = header_of(file)
    with file.open("rb") as opened:
        start = 8 + int(struct.unpack("<Q", opened.read(8))[0])
    try:
        end = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RecipeError("model", f"{file}: its header is damaged", AGAIN) from error
    size = file.stat().st_size
    if end != size:
        raise RecipeError("model", f"{file}: has {size} bytes, and its header says {end}", AGAIN)


def _refuse_code(file: Path) -> None:
    """Raises RecipeError for a pickle that is damaged, or that names functions to call besides those that make tensors."""
    if not zipfile.is_zipfile(file):
        if file.read_bytes()[:1] != b"\x80":  # files of torch before 1.6 are bare pickles
            raise RecipeError("model", f"{file}: is cut short or damaged", AGAIN)
        return
    try:
        calls = get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RecipeError("model", f"{file}: is cut short or damaged", AGAIN) from error
    if calls:
        raise RecipeError(
            "model", f"{file}: is a pickle that would run code when it is read ({calls[0]})",
            "take a checkpoint in safetensors",
        )  # fmt: skip


def dtypes_in(found: WeightFiles) -> set[str]:
    """The dtypes of the real numbers in safetensors files, as safetensors calls them: F16, BF16, F32."""
    if not found.safe:
        return set()
    return {
        e["dtype"] for f in found.files for e in header_of(f).values() if e["dtype"] in ("F16", "BF16", "F32", "F64")
    }


def refuse_incomplete(model: PreTrainedModel, report: Mapping[str, Any], drawn: Collection[str], shown: str) -> None:
    """Compare what was loaded with what the model needs.

    report  what transformers says of loading: missing_keys, unexpected_keys, mismatched_keys
    drawn   parameters of a new head, which need not be in the file
    Raises RecipeError for weights that are missing or have another shape. Logs weights that have no place.
    """
    name = type(model).__name__
    for key, stored, wanted in sorted(report["mismatched_keys"], key=lambda x: str(x[0])):
        if key not in drawn:
            raise RecipeError(
                "model", f"{shown}: {key} is {tuple(stored)} in its files, and {tuple(wanted)} by its config.json",
                "correct config.json (vocab_size for an embedding), or take a complete checkpoint",
            )  # fmt: skip
    if missing := sorted(set(report["missing_keys"]) - set(drawn)):
        made = ", ".join(model.config.architectures or ()) or "an unnamed class"
        raise RecipeError(
            "model", f"{shown}: its files lack {len(missing)} weights that {name} needs, the first is {missing[0]}",
            f"take a complete checkpoint; its config.json says it is of {made}",
        )  # fmt: skip
    trunk = f"{model.base_model_prefix}."
    surplus = sorted(k for k in report["unexpected_keys"] if not drawn or k.startswith(trunk))
    if surplus:
        log.warning("%s: %d weights in its files have no place in %s and are left out, the first is %s", shown, len(surplus),
                    name, surplus[0])  # fmt: skip


def without_cache(model: PreTrainedModel) -> None:
    """Let the model keep no keys and values. `save` writes what its configuration said before."""
    model.__dict__.setdefault(FOUND, getattr(model.config, "use_cache", None))
    model.config.use_cache = False


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a whole model, with the setting use_cache and the generation settings that it came with."""
    found, settings = model.__dict__.get(FOUND), model.generation_config if model.can_generate() else None
    if found is not None:
        model.config.use_cache = found
    if settings is not None:
        # transformers refuses to save settings that contradict each other (a temperature without sampling), before 5.23
        # also those that a published checkpoint came with. They are written below, as they are.
        model.generation_config = type(settings)()
    try:
        model.save_pretrained(folder)
    finally:
        if found is not None:
            model.config.use_cache = False
        if settings is not None:
            model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def training_dtype(stated: Any, stored: Collection[str], packed: bool) -> torch.dtype | None:
    """The dtype in which a checkpoint is loaded if the recipe leaves it open; None: as transformers finds it.

    float16 overflows and underflows in training. float32 holds its values exactly; beside packed weights, bfloat16 is used.
    stated  by config.json: a dtype, or None
    stored  dtypes in its files; used if config.json states none
    """
    if stated is None and len(set(stored)) > 1:
        return torch.float32
    half = stated == torch.float16 or (stated is None and set(stored) == {"F16"})
    if not half:
        return None
    return torch.bfloat16 if packed else torch.float32
