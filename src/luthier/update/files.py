"""Updates on disk: peft's folder for a plain low-rank one, update.json with update.safetensors for the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.data.batch import collate
from luthier.model.fingerprint import Fingerprint
from luthier.support.errors import LuthierError
from luthier.update.parts import KINDS, Chart, LowRank, Part, PeftPart, Replace
from luthier.update.update import Update

PREFIX = "base_model.model."
MAX_HEADER = 50_000_000  # bytes; a JSON header larger than this is no header of ours
HEADS = ("score", "classifier")  # what transformers calls a classification head
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}  # of logits, after a reload


def save_update(update: Update, folder: Path, view: Any = None) -> None:
    """Write an update. A plain low-rank one opens with `PeftModel.from_pretrained`; its chart is kept beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    factors, head = _low_rank_and_head(update)
    if factors is not None:
        _save_peft(factors, head, update.base, folder, view)
        _save_house(Update(update.base, (), update.chart), folder)
    elif len(update.parts) == 1 and isinstance(update.parts[0], PeftPart):
        _save_other_peft(update.parts[0], folder, view)
        _save_house(Update(update.base, (), None), folder)
    else:
        _save_house(update, folder)


def _low_rank_and_head(update: Update) -> tuple[LowRank | None, dict[str, Tensor]]:
    """What peft's folder can hold: low-rank factors, alone or with replaced heads of one name in the model."""
    parts = {type(p): p for p in update.parts}
    factors, head = parts.pop(LowRank, None), parts.pop(Replace, None)
    values = dict(head.values) if isinstance(head, Replace) else {}
    fits = isinstance(factors, LowRank) and not parts and all(n.split(".")[0] in HEADS for n in values)
    return (factors if fits else None), values  # type: ignore[return-value]


def load(folder: str | Path) -> Update:
    """The update in a folder. Raises LuthierError, naming the file, for one that cannot be trusted."""
    folder = Path(folder)
    header = _header(folder / "update.json")
    tensors = _tensors(folder / "update.safetensors") if (folder / "update.safetensors").exists() else {}
    try:
        base = Fingerprint(**header["base"])
        parts: list[Part] = []
        for i, entry in enumerate(header["parts"]):
            own = {k.removeprefix(f"{i}."): t for k, t in tensors.items() if k.startswith(f"{i}.")}
            parts.append(KINDS[entry["kind"]].restore(own, entry["header"]))
        chart = None
        if header.get("chart"):
            initial = {k.removeprefix("chart."): t for k, t in tensors.items() if k.startswith("chart.")}
            chart = Chart(header["chart"], initial)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LuthierError(f"{folder / 'update.json'}: is no update of ours ({error!r})") from error
    if (folder / "adapter_model.safetensors").exists():
        parts += _load_peft(folder)
    return Update(base, tuple(parts), chart)


def _save_house(update: Update, folder: Path) -> None:
    header: dict[str, Any] = {"format": 1, "base": update.base.model_dump(), "parts": [], "chart": None}
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(update.parts):
        header["parts"].append({"kind": part.kind, "header": part.header()})
        tensors |= {f"{i}.{k}": t.contiguous() for k, t in part.tensors().items()}
    if update.chart is not None:
        header["chart"] = update.chart.form
        tensors |= {f"chart.{k}": t.contiguous() for k, t in update.chart.initial.items()}
    if tensors:
        save_file(tensors, folder / "update.safetensors")
    (folder / "update.json").write_text(json.dumps(header), encoding="utf-8")


def _save_peft(part: LowRank, head: Mapping[str, Tensor], base: Fingerprint, folder: Path, view: Any) -> None:
    from peft import LoraConfig

    modules = [n.removesuffix(".weight") for n in part.a]
    ranks = {m: part.a[f"{m}.weight"].shape[0] for m in modules}
    scales = {m: part.scale[f"{m}.weight"] for m in modules}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = scales[next(m for m in modules if ranks[m] == common)] * common
    config = LoraConfig(
        r=common, target_modules=sorted(modules), task_type=_peft_task(head, view),
        modules_to_save=sorted({n.split(".")[0] for n in head}) or None,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it as a float
        bias="none", inference_mode=True,
        base_model_name_or_path=base.name, fan_in_fan_out=bool(part.transposed),
        rank_pattern={m: r for m, r in ranks.items() if r != common},
        alpha_pattern={m: scales[m] * ranks[m] for m in modules if scales[m] * ranks[m] != alpha},
    )  # fmt: skip
    if view is not None and view.module.config._name_or_path:
        config.base_model_name_or_path = view.module.config._name_or_path
    tensors = {f"{PREFIX}{n.removesuffix('.weight')}.lora_A.weight": t.contiguous() for n, t in part.a.items()}
    tensors |= {f"{PREFIX}{n.removesuffix('.weight')}.lora_B.weight": t.contiguous() for n, t in part.b.items()}
    tensors |= {PREFIX + n: t.contiguous() for n, t in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _peft_task(head: Mapping[str, Tensor], view: Any) -> str | None:
    """What peft calls the task; it knows none for encoders that fill gaps, and opens them without one."""
    from peft import TaskType

    if head:
        return TaskType.SEQ_CLS
    return TaskType.CAUSAL_LM if view is None or view.module.can_generate() else None


def _save_other_peft(part: PeftPart, folder: Path, view: Any) -> None:
    config = part.header()["config"]
    if view is not None and view.module.config._name_or_path:
        config = {**config, "base_model_name_or_path": view.module.config._name_or_path}
    tensors = {n: t.contiguous() for n, t in part.state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}), encoding="utf-8")


def _load_peft(folder: Path) -> list[Part]:
    config, tensors = _header(folder / "adapter_config.json"), _tensors(folder / "adapter_model.safetensors")
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        return [PeftPart(config, tensors)]
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    scale: dict[str, float] = {}
    try:
        for key, t in tensors.items():
            module, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
            if not module:
                head[key.removeprefix(PREFIX)] = t
                continue
            (a if which == "A" else b)[f"{module}.weight"] = t
        for name in a:
            module = name.removesuffix(".weight")
            r, alpha = (
                config["rank_pattern"].get(module, config["r"]),
                config["alpha_pattern"].get(module, config["lora_alpha"]),
            )
            scale[name] = alpha / r
        low_rank = LowRank(a, b, scale, frozenset(a) if config.get("fan_in_fan_out") else frozenset())
        return [low_rank, Replace(head)] if head else [low_rank]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise LuthierError(f"{folder / 'adapter_config.json'}: is no adapter configuration ({error!r})") from error


def _header(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_HEADER:
            raise LuthierError(f"{file}: is larger than {MAX_HEADER} bytes, so it is no header of ours")
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
    """Largest difference between the live model's last-row states and those of the reloaded update on the base.

    detach  takes what was trained off the model. Raises LuthierError where the difference is too large, or where tuning changed
    nothing at all.
    """
    batch = collate([row]).to(view.device)
    training = view.module.training
    view.module.eval()
    live = view.trace(batch).hidden[-1].float()
    detach()
    base = view.trace(batch).hidden[-1].float()
    with load(folder).bind(view):
        reloaded = view.trace(batch).hidden[-1].float()
    view.module.train(training)
    worst, moved = float((live - reloaded).abs().max()), float((live - base).abs().max())
    scale = float(live.abs().max().clamp_min(1.0))
    if worst > TOLERANCE[view.dtype] * scale:
        raise LuthierError(
            f"{folder}: what was saved is not what was trained (states differ by {worst:.3g}); keep the checkpoints"
        )
    if moved == 0.0:
        raise LuthierError(f"{folder}: the tuned model equals the base on {row['key']}; nothing was learnt")
    return worst
