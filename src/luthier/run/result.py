"""Files beside the update in a finished folder, for tools that do not know luthier's forms: tokenizer and whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.model.view import ModelView
from luthier.model.weights import save
from luthier.support.files import write_text
from luthier.update import Update


def is_whole(update: Update, view: ModelView) -> bool:
    """Whether most weights changed and the update can be merged. Only then is the whole model written."""
    touched = {n for part in update.parts for n in part.whole()}
    return 2 * len(touched) > len(view.anatomy.parameters) and update.refusal(view.module) is None


def leave_model(update: Update, view: ModelView, tokenizer: Any, folder: Path) -> bool:
    """Write the tokenizer, the base model's generation settings, and the whole model if most weights changed.

    Returns whether the model was written.

    The update is merged into the view's own weights, so afterwards the view is no longer the base model.
    """
    tokenizer.save_pretrained(folder)
    if view.module.can_generate() and view.module.generation_config is not None:
        write_text(folder / "generation_config.json", view.module.generation_config.to_json_string())
    whole = is_whole(update, view)
    if whole:
        update.merge_into(view.module)
        save(view.module, folder)
    return whole
