"""Knowledge: does the model know facts, or only the sentences that taught them?"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from pydantic import Field

from luthier.evaluation.base import Answering, Exam, Question
from luthier.evaluation.measures import Measure, mean
from luthier.evaluation.text import matches
from luthier.method import Source, Traits
from luthier.support.errors import LuthierError

SCORES = (("exact", "caseless"), ("contains", "contains"))


class Knowledge(Answering):
    """Answers by the kind of question: as trained, rephrased, derived, compared; as exact matches and as contained answers.

    Rows have a column `kind` (any names). `builtin:people` has 25 invented people with six facts each; yes and no are equally
    frequent. For each kind, a second number shows the share that one constant answer, the most frequent one, would reach.
    A tuned model that only repeats sentences is at 1 for questions as trained, and at that share where it must reason.
    With fewer than 25 questions of a kind, intervals are wider than 0.4.
    Cost: one short answer for each question; 600 for builtin:people.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "FineTuneBench: How well do commercial fine-tuning APIs infuse knowledge into LLMs?", 2024, "arXiv:2411.05059"
    )

    rows: int = Field(1000, ge=1)
    """Number of distinct prompts of data.eval to answer, from the first."""
    max_new_tokens: int = Field(24, ge=1)
    """Largest number of tokens in an answer."""
    kinds: tuple[str, ...] = ("memorize", "rephrase", "secondary", "comparison")
    """Kinds of question with separate measures; other kinds are left out."""

    def names(self) -> tuple[str, ...]:
        scored = tuple(f"{kind}_{score}" for kind in self.kinds for score, _ in SCORES)
        return (*scored, *(f"{kind}_commonest" for kind in self.kinds))

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions = [q for q in exam.questions(self.rows) if _kind(q) in self.kinds]
        replies = [a.text for a in exam.answers(questions, self.max_new_tokens, self.stop)]
        out = []
        for kind in self.kinds:
            mine = [(q, a) for q, a in zip(questions, replies, strict=True) if _kind(q) == kind]
            if not mine:
                continue
            keys = tuple(q.key for q, _ in mine)
            for score, form in SCORES:
                right = [any(matches(a, w, form) for w in q.references) for q, a in mine]
                out.append(mean(f"{kind}_{score}", right, keys, unit="share of questions"))
            times = Counter(answer for q, _ in mine for answer in set(q.references))
            commonest = min(times, key=lambda answer: (-times[answer], answer))  # whatever the order of rows
            same = [commonest in q.references for q, _ in mine]
            out.append(mean(f"{kind}_commonest", same, keys, unit="share, by always giving the commonest answer"))
        return out


def _kind(question: Question) -> str:
    """The question's kind. Raises LuthierError for a row without one."""
    kind = question.row.values.get("kind")
    if not isinstance(kind, str):
        raise LuthierError(
            f"{question.row.key}: has no kind; knowledge needs it to separate questions, so add the column"
        )
    return kind
