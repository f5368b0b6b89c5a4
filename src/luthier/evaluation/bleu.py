"""BLEU and chrF: n-grams of words and of characters shared with references, over the whole set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from luthier.evaluation.base import Answering, Exam
from luthier.evaluation.measures import Measure, corpus_statistics
from luthier.method import Source, Traits


class Bleu(Answering):
    """Corpus BLEU and chrF of generated answers, by sacrebleu with its defaults (13a tokens, exponential smoothing).

    Both are functions of counts summed over rows, not means of rows. The counts of each row are kept, so intervals are exact
    too. Needs the extra `eval`. Cost: one generated answer for each question.
    """

    packages: ClassVar[Mapping[str, str]] = {"sacrebleu": "eval"}
    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source("A Call for Clarity in Reporting BLEU Scores", 2018, "arXiv:1804.08771")

    def names(self) -> tuple[str, ...]:
        return ("bleu", "chrf")

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions, replies = self.replies(exam)
        references, keys = [q.references for q in questions], tuple(q.key for q in questions)
        return [
            Measure(name, corpus_statistics(name, replies, references), keys, aggregate=name, unit="of 100")
            for name in ("bleu", "chrf")
        ]
