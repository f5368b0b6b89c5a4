"""ROUGE: how many words, pairs of words and longest common sequences of a reference are in an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from luthier.evaluation.base import Answering, Exam
from luthier.evaluation.measures import Measure, mean
from luthier.method import Source, Traits

KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(Answering):
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 of generated answers, by Google's rouge-score; the best of several references.

    Needs the extra `eval`. Cost: one generated answer for each question.
    """

    packages: ClassVar[Mapping[str, str]] = {"rouge_score": "eval"}
    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, "https://aclanthology.org/W04-1013"
    )

    stem: bool = False
    """Compare English words by their stems (Porter)."""

    def names(self) -> tuple[str, ...]:
        return KINDS

    def evaluate(self, exam: Exam) -> list[Measure]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(KINDS), use_stemmer=self.stem)
        questions, replies = self.replies(exam)
        best = [scorer.score_multi(q.references, a) for q, a in zip(questions, replies, strict=True)]
        keys = tuple(q.key for q in questions)
        return [mean(kind, [s[kind].fmeasure for s in best], keys, unit="F1") for kind in KINDS]
