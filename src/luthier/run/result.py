"""What stands beside an update in a finished folder, for tools that know nothing of luthier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.model.view import ModelView
from luthier.update import Update


def is_whole(update: Update, view: ModelView) -> bool:
    """True where most weights changed and the update can be merged, so that the whole model is worth leaving."""
    touched = {n for part in update.parts for n in part.whole()}
    return 2 * len(touched) > len(view.anatomy.parameters) and update.refusal(view.module) is None


def leave_model(update: Update, view: ModelView, tokenizer: Any, folder: Path) -> bool:
    """Write the tokenizer, and the whole model where most weights changed; returns whether it was written.

    A whole model is made in place: afterwards the view is no longer the base.
    """
    tokenizer.save_pretrained(folder)
    whole = is_whole(update, view)
    if whole:
        update.merge_into(view.module)
        view.module.save_pretrained(folder)
    return whole
