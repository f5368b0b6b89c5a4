"""Checkpoints that are whole or absent: temporary name, fsync, rename, marker last. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.support.errors import LuthierError
from luthier.support.files import sync

MARKER = "COMPLETE"


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], scheduler: dict[str, Any],
    rng: dict[str, Any], state: dict[str, Any],
) -> Path:  # fmt: skip
    """Write checkpoint-STEP. `state` is JSON; the rest goes by the names other tools read."""
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        temporary / "trainable.safetensors",
    )
    torch.save(optimizer, temporary / "optimizer.pt")
    torch.save(scheduler, temporary / "scheduler.pt")
    torch.save(rng, temporary / "rng_state.pth")
    (temporary / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in temporary.iterdir():
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(folder)
    (final / MARKER).write_text(str(step), encoding="utf-8")
    sync(final)
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones are passed over."""
    found = [
        p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / MARKER).exists()
    ]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def load(folder: Path) -> dict[str, Any]:
    """tensors, optimizer, scheduler, rng, state. Raises LuthierError, naming the file, for one that cannot be trusted."""
    out: dict[str, Any] = {}
    parts = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "rng": "rng_state.pth"}
    file = folder / "trainable.safetensors"
    try:
        out["tensors"] = load_file(file)
        for key, name in parts.items():
            file = folder / name
            out[key] = torch.load(file, weights_only=True, map_location="cpu")
        file = folder / "trainer_state.json"
        out["state"] = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:
        # Whatever a damaged or hostile file raises, the answer is the same sentence; nothing was executed.
        raise LuthierError(
            f"{file}: cannot be read as a checkpoint ({type(error).__name__}); delete {folder.name} to go on from the one before"
        ) from error
    return out


def prune(folder: Path, keep: int, protect: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints; `protect` names one that stays."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in found[:-keep]:
        if path.name != protect:
            shutil.rmtree(path)
