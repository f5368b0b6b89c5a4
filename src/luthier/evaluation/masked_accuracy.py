"""Masked accuracy: the share of hidden tokens that the model predicts correctly."""

from __future__ import annotations

from typing import ClassVar

from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, ratio
from luthier.method import Source, Traits


class MaskedAccuracy(Evaluator):
    """Share of hidden tokens whose most likely prediction is right, over all hidden tokens.

    Always measured if the task is masked-lm. The same tokens of a held-out row are hidden in every run.
    Cost: none beyond the loss.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"masked-lm"}))
    source: ClassVar[Source] = Source(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, "arXiv:1810.04805"
    )

    def names(self) -> tuple[str, ...]:
        return ("masked_accuracy",)

    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        hits = [sum(b == w for b, w in zip(s.best, s.wanted, strict=True)) for s in exam.scored]
        asked = [s.over for s in exam.scored]
        return [ratio("masked_accuracy", hits, asked, exam.row_keys, unit="share, over masked tokens")]
