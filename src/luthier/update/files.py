"""Updates on disk: peft's folder for a plain low-rank one, update.json with update.safetensors for the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.data.batch import collate
from luthier.model.adapter_folder import CONFIG, tensors_in
from luthier.model.fingerprint import Fingerprint
from luthier.model.view import evaluating
from luthier.support.errors import LuthierError
from luthier.update.base import Part, PeftFolder, in_json
from luthier.update.binding import below
from luthier.update.forms import FORMS, restore
from luthier.update.packing import Chart
from luthier.update.update import Update

FORMAT = 1  # of update.json
MAX_HEADER = 50_000_000  # bytes; luthier never writes a larger JSON header
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}  # of logits, after a reload


def save_update(update: Update, folder: Path, view: Any = None) -> None:
    """Write an update. One that peft's folder can hold opens with `PeftModel.from_pretrained`; its chart is kept beside it.

    view  what it was trained on; it tells whether peft would read the folder as it was meant
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = _peft_folder(update)
    if shared is not None and view is not None and peft_misreads(view.module, shared):
        shared = None
    if shared is not None:
        _save_peft(shared, update.base.name, folder, view)
    _save_ours(update if shared is None else Update(update.base, (), update.chart), folder)


def _peft_folder(update: Update) -> PeftFolder | None:
    """The folder of peft's that one of the parts makes of all of them."""
    for i, part in enumerate(update.parts):
        found = part.peft([*update.parts[:i], *update.parts[i + 1 :]])
        if found is not None:
            return found
    return None


def peft_misreads(model: Any, shared: PeftFolder) -> bool:
    """True where peft would put this adapter on other layers than its own, or leave it out without a word.

    For models whose experts are stacked, peft takes names of other layers (gate_proj of a dense or a shared MLP) for those of the
    experts of an older version of transformers.
    """
    if any(_endings(model, name) != 1 for name in shared.config.get("modules_to_save") or ()):
        return True  # peft takes every module of a name that ends so
    if shared.config.get("peft_type") != "LORA":
        return False
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    targets = set(shared.config["target_modules"])
    read = LoraConfig(r=shared.config["r"], target_modules=list(targets))
    try:
        conversion.convert_peft_config_for_transformers(read, model, None)
        if set(read.target_modules or ()) != targets:
            return True
        tensors = conversion.convert_peft_adapter_state_dict_for_transformers(model, read, dict(shared.tensors))
    except ValueError:
        return True
    return set(tensors) != set(shared.tensors)


def _endings(model: Any, name: str) -> int:
    return sum(n == name or n.endswith("." + name) for n, _ in model.named_modules())


def load(folder: str | Path) -> Update:
    """The update in a folder. Raises LuthierError with the file name if a file cannot be trusted."""
    folder = Path(folder)
    header = _header(folder / "update.json")
    if header.get("format") != FORMAT:
        raise LuthierError(
            f"{folder / 'update.json'}: format is {header.get('format')!r}, this luthier reads {FORMAT}; open it with the "
            "luthier that wrote it"
        )
    tensors = _tensors(folder / "update.safetensors") if (folder / "update.safetensors").exists() else {}
    try:
        base = Fingerprint(**header["base"])
        parts: list[Part] = []
        for i, entry in enumerate(header["parts"]):
            parts.append(restore(entry["kind"], below(f"{i}.", tensors), entry["header"]))
        chart = Chart(below("chart.", tensors)) if header.get("chart") else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LuthierError(f"{folder / 'update.json'}: is not an update that luthier wrote ({error!r})") from error
    if (folder / "adapter_model.safetensors").exists():
        parts += _load_peft(folder)
    return Update(base, tuple(parts), chart)


def base_of(folder: Path) -> Fingerprint:
    """The base of the update in a folder; no tensor is read. Raises LuthierError as `load` does."""
    file = folder / "update.json"
    try:
        return Fingerprint(**_header(file)["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise LuthierError(f"{file}: is not an update that luthier wrote ({error!r})") from error


def load_adapter(folder: Path, base: Fingerprint) -> Update:
    """The update in a folder that peft wrote, which does not say whose weights it belongs to: `base` does.

    Raises LuthierError, naming the file, for one that cannot be read.
    """
    return Update(base, tuple(_load_peft(folder)))


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """(name of the model that a peft folder says it belongs to, its revision). Raises LuthierError where it says none."""
    file = folder / "adapter_config.json"
    config = _header(file)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise LuthierError(f"{file}: names no base model; write base_model_name_or_path into it")
    return name, revision if isinstance(revision, str) else None


def _save_ours(update: Update, folder: Path) -> None:
    header: dict[str, Any] = {"format": FORMAT, "base": update.base.model_dump(), "parts": [], "chart": False}
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(update.parts):
        header["parts"].append({"kind": part.kind, "header": part.header()})
        tensors |= {f"{i}.{k}": t.contiguous() for k, t in part.tensors().items()}
    if update.chart is not None:
        header["chart"] = True
        tensors |= {f"chart.{k}": t.contiguous() for k, t in update.chart.initial.items()}
    if tensors:
        save_file(tensors, folder / "update.safetensors")
    (folder / "update.json").write_text(json.dumps(header), encoding="utf-8")


def _save_peft(shared: PeftFolder, name: str, folder: Path, view: Any) -> None:
    """peft's two files. The base is named as peft can open it: by the place it was loaded from, where that is known."""
    place = "" if view is None else view.module.config._name_or_path
    config = {**shared.config, "base_model_name_or_path": place or shared.config.get("base_model_name_or_path") or name}
    if view is not None and config.get("task_type") == "CAUSAL_LM" and not view.module.can_generate():
        config["task_type"] = None  # peft knows no task for encoders that fill gaps, and opens them without one
    if view is not None and view.anatomy.tags_tokens:
        config["task_type"] = "TOKEN_CLS"
    tensors = {n: t.contiguous() for n, t in shared.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(in_json(config), indent=2, sort_keys=True), encoding="utf-8")


def _load_peft(folder: Path) -> list[Part]:
    """Each form takes its own out of peft's folder."""
    file = folder / CONFIG
    try:
        shared = PeftFolder(_header(file), tensors_in(folder))
    except (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError) as error:
        raise LuthierError(f"{folder}: the adapter's tensors cannot be read ({error})") from error
    try:
        found = [form.from_peft(shared) for form in FORMS.values()]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise LuthierError(f"{file}: is no adapter configuration ({error!r})") from error
    return [part for part in found if part is not None]


def _header(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_HEADER:
            raise LuthierError(f"{file}: is larger than {MAX_HEADER} bytes, so it is not a header that luthier wrote")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LuthierError(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise LuthierError(f"{file}: holds no object")
    return value


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LuthierError(f"{file}: is no safetensors file ({error})") from error


@torch.no_grad()
def verify_update(folder: Path, detach: Callable[[], None], view: Any, row: Mapping[str, Any]) -> float:
    """Largest difference between the live model and the reloaded update on the base: states and logits of a row, task head.

    detach  removes the trained change from the model. Raises LuthierError if the difference is too large, or if tuning changed
    nothing at all.
    """
    batch = collate([row]).to(view.device)

    def seen() -> Tensor:
        hidden = view.trace(batch).hidden[-1]  # [T, D]
        head = [view.weight(n) for n in view.anatomy.task_head]
        if view.anatomy.head is not None:
            head.append(view.head_logits(hidden[-1:]))  # [1, V]; an update may change the head alone
        return torch.cat([t.float().flatten() for t in (hidden, *head)])

    with evaluating(view.module):
        live = seen()
        detach()
        base = seen()
        with load(folder).bind(view):
            reloaded = seen()
    worst, moved = float((live - reloaded).abs().max()), float((live - base).abs().max())
    scale = float(live.abs().max().clamp_min(1.0))
    if worst > TOLERANCE[view.dtype] * scale:
        raise LuthierError(
            f"{folder}: what was saved is not what was trained (states differ by {worst:.3g}); keep the checkpoints"
        )
    if moved == 0.0:
        raise LuthierError(f"{folder}: the tuned model equals the base model on {row['key']}; nothing was learnt")
    return worst
