"""Merge several finished runs or adapters of one base into one folder, which is used like that of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.merging.base import Merger
from luthier.merging.linear import Linear
from luthier.method.registry import written
from luthier.model.view import ModelView
from luthier.run.result import leave_model
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.support.files import whole, write_text
from luthier.tuned import probe
from luthier.tuned.members import Members, members_of, refuse_unsuited
from luthier.tuned.merged import FILE, Merged, Source, merged_in
from luthier.update import Update
from luthier.update.files import load, save_update

ROUNDING = 1e-6  # of the largest logit: rounding that is left if updates cancel out


def merge(
    folders: Sequence[Path], output: Path, method: Merger | None = None, allow_code: bool = False
) -> dict[str, Any]:
    """Merge the updates in these folders. The new folder has what a run writes: update, tokenizer, model card, and the whole
    model if most weights changed. Returns folder, method, members, and the difference of logits after reading it back.

    folders     finished runs, merges, results of a collaboration, or adapters; the model is asked as the first one is
    method      by default Linear, which takes the mean
    allow_code  import the classes that the members' recipes name
    Raises LuthierError before any tensor is read: for fewer than two members, members of different bases or tasks, a folder
    that is no member, or an output that exists. Raises it afterwards if the updates cannot be merged, or cancel out.
    """
    method = method or Linear()
    _refuse_taken(output)
    if len(folders) < 2:
        raise LuthierError(f"merge: {len(folders)} members; name two finished runs or adapters at least")
    method.check_count(len(folders))
    members = members_of(folders, allow_code)
    refuse_unsuited(method, members.use, members.use.recipe.quantize is not None)
    lab = members.lab()
    updates = members.updates(lab.view().base)
    result = method.merge(list(updates.values()), lab)
    record = _record(method, members, updates, result)
    with whole(output) as half:
        off = _write(result, lab, half, output)
        model = leave_model(result, lab.view(), lab.renderer.tokenizer, half)
        write_text(half / FILE, record.model_dump_json(indent=1))
        peft = (half / "adapter_model.safetensors").exists()
        write_text(half / "README.md", record.card(output.name, "merge" if model else "adapter", peft))
    return {"folder": str(output), "method": record.method, "members": list(updates), "difference": off}


def _refuse_taken(output: Path) -> None:
    """Raises LuthierError for a folder with something in it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    before = merged_in(output)
    if before is not None:
        names = ", ".join(m.name for m in before.members)
        raise LuthierError(f"{output}: holds a merge of {names} already; choose another folder")
    raise LuthierError(f"{output}: exists and is not empty; choose another folder")


def _record(method: Merger, members: Members, updates: Mapping[str, Update], result: Update) -> Merged:
    sources = tuple(
        Source(name=name, folder=str(members.folders[name].resolve()), update=update.digest())
        for name, update in updates.items()
    )
    recipe, base, classes = members.use
    return Merged(
        method=written(method), members=sources, base=result.base, asked_as=members.asked_as, recipe=recipe.as_dict(),
        recipe_folder=str(base.resolve()), classes=classes,
    )  # fmt: skip


def _write(update: Update, lab: Lab, folder: Path, shown: Path) -> float:
    """Save an update, read it back, and compare the logits of both. Returns the difference.

    Raises LuthierError if it is too large, or if the update changes nothing.
    """
    view, ids = lab.view(), probe.probe_of(lab.renderer.tokenizer)
    merged = _said(update, view, ids)
    if probe.difference(merged, probe.logits(view.module, ids)) <= ROUNDING:
        raise LuthierError(f"{shown}: the merged model equals the base, so its members cancel out; nothing was written")
    save_update(update, folder, view)
    off = probe.difference(_said(load(folder), view, ids), merged)
    if off > probe.TOLERANCE[view.dtype]:
        raise LuthierError(
            f"{shown}: what was written differs from what was merged by {off:.3g} of the largest logit; it was removed"
        )
    return off


def _said(update: Update, view: ModelView, ids: Any) -> Any:
    with update.bind(view):
        return probe.logits(view.module, ids)
