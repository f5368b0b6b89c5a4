"""The task of a plain model, if no recipe names one."""

from __future__ import annotations

from luthier.model.loading import reads_both_ways
from luthier.model.view import ModelView
from luthier.tasks.base import Task
from luthier.tasks.causal_lm import CausalLm
from luthier.tasks.classification import Classification
from luthier.tasks.masked_lm import MaskedLm
from luthier.tasks.token_classification import TokenClassification


def usual_task(view: ModelView) -> Task:
    """What the model's head is for: tags of tokens, classes of texts, masked tokens of an encoder, else the next token."""
    if view.anatomy.tags_tokens:
        return TokenClassification()
    if view.anatomy.head is None:
        return Classification()
    return MaskedLm() if reads_both_ways(view.module.config) else CausalLm()
