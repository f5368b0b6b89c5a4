"""Exact match: the share of generated answers that are right."""

from __future__ import annotations

from typing import ClassVar, Literal

from luthier.evaluation.base import Answering, Exam
from luthier.evaluation.measures import Measure, mean
from luthier.evaluation.text import matches
from luthier.method import Source, Traits

NAMES = {"text": "exact_match"}  # name of the measure; others are called FORM_match


class ExactMatch(Answering):
    """The share of generated answers equal to a right answer, in one of six senses.

    Rows with the same prompt are one question; each of their answers is right.
    Cost: one generated answer for each question.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, "arXiv:1606.05250"
    )

    match: Literal["text", "caseless", "normalised", "contains", "number", "json"] = "text"
    """"text": equal after trimming; "caseless": also in lower case; "normalised": without punctuation and articles, number words
    as digits; "contains": contains the right words; "number": the last numbers are equal; "json": equal values."""

    def names(self) -> tuple[str, ...]:
        return (NAMES.get(self.match, f"{self.match}_match"),)

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions, replies = self.replies(exam)
        right = [any(matches(a, w, self.match) for w in q.references) for q, a in zip(questions, replies, strict=True)]
        keys = tuple(q.key for q in questions)
        return [mean(self.names()[0], right, keys, unit="share of answers", judges=True)]
