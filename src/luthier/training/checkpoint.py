"""Checkpoints that are complete or absent: written under a temporary name, synced, renamed, marked last. Nothing is unpickled."""

from __future__ import annotations

import json
import logging
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
log = logging.getLogger(__name__)


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], scheduler: dict[str, Any],
    rng: dict[str, Any], state: dict[str, Any],
) -> Path:  # fmt: skip
    """Write checkpoint-STEP. `state` is JSON; the other files have the names that other tools read."""
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    apart = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}  # two names may share memory
    save_file(apart, temporary / "trainable.safetensors")
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


class Damaged(LuthierError):
    """A file of a checkpoint that cannot be read."""


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is complete and can be read, with what `load` returns for it; None if there is none.

    The log says which ones are passed over. Raises Damaged if there are complete ones, but none that can be read.
    """
    damaged: Damaged | None = None
    for path in reversed(_in_order(folder)):
        if not (path / MARKER).exists():
            log.warning("%s is unfinished, so training goes on from the one before", path)
            continue
        try:
            return path, load(path)
        except Damaged as error:
            log.warning("%s, so training goes on from the one before", error)
            damaged = error
    if damaged is not None:
        raise Damaged(f"{damaged}, and no checkpoint before it can be read; use --fresh to start over") from damaged
    return None


def _in_order(folder: Path) -> list[Path]:
    """All checkpoints by step, complete or not. Other names, such as checkpoint-3-copy, are a user's own."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def load(folder: Path) -> dict[str, Any]:
    """Read tensors, optimizer, scheduler, rng and state. Raises Damaged with the file name if a file is damaged."""
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
        # Whatever error a damaged or hostile file causes, the message is the same. Nothing in the file was executed.
        raise Damaged(f"{file}: cannot be read as a checkpoint ({type(error).__name__})") from error
    return out


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep`."""
    for path in _in_order(folder)[:-keep]:
        shutil.rmtree(path)
