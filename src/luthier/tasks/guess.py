"""The task of a plain model, if no recipe names one."""

from __future__ import annotations

from luthier.model.loading import reads_both_ways
from luthier.model.view import ModelView
from luthier.tasks.base import Task
from luthier.tasks.causal_lm import CausalLm
from luthier.tasks.classification import Classification
from luthier.tasks.masked_lm import MaskedLm


def usual_task(view: ModelView) -> Task:
    """Classification for a model without a language-model head, masked tokens for an encoder, else the next token."""
    if view.anatomy.head is None:
        return Classification()
    return MaskedLm() if reads_both_ways(view.module.config) else CausalLm()
