"""The task of a bare model, where no recipe names one."""

from __future__ import annotations

from luthier.model.view import ModelView
from luthier.tasks.base import Task
from luthier.tasks.causal_lm import CausalLm
from luthier.tasks.classification import Classification


def usual_task(view: ModelView) -> Task:
    """Classification for a model without a language-model head, else the next token."""
    return Classification() if view.anatomy.head is None else CausalLm()
