"""Editing: does the model give the new answer, also to a rephrased prompt, and is everything else unchanged?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from luthier.evaluation.base import Evaluator, Exam, number_of
from luthier.evaluation.measures import Measure, mean
from luthier.method import Source, Traits
from luthier.support.errors import LuthierError


class Editing(Evaluator):
    """Efficacy, generalisation and specificity of edits, by teacher-forced token accuracy.

    Each row is an edit (prompt, completion) with the columns `rephrase` (the same prompt in other words), `locality_prompt` and
    `locality_answer` (another prompt, whose answer should stay). A value is the share of the answer's tokens that are the
    model's first choice after the right earlier tokens, as in editing studies; the end token does not count. Specificity is a
    level: compare it before and after.
    Cost: three forward passes over the rows.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source("Locating and Editing Factual Associations in GPT", 2022, "arXiv:2202.05262")

    rephrase: str = "rephrase"
    """Column with the rephrased prompt."""
    locality_prompt: str = "locality_prompt"
    """Column with a prompt that the edit is not about."""
    locality_answer: str = "locality_answer"
    """Column with the answer to that prompt."""

    def names(self) -> tuple[str, ...]:
        return ("efficacy", "generalisation", "specificity")

    def evaluate(self, exam: Exam) -> list[Measure]:
        keys = tuple(number_of(r.key) for r in exam.sources)
        columns = ("prompt", "completion", self.rephrase, self.locality_prompt, self.locality_answer)
        asked: dict[str, list[tuple[str, str]]] = {name: [] for name in self.names()}
        for row in exam.sources:
            values = row.values
            if missing := [c for c in columns if not isinstance(values.get(c), str)]:
                raise LuthierError(
                    f"{row.key}: has no text in column {missing[0]}, which editing asks; map it with data.columns"
                )
            asked["efficacy"].append((values["prompt"], values["completion"]))
            asked["generalisation"].append((values[self.rephrase], values["completion"]))
            asked["specificity"].append((values[self.locality_prompt], values[self.locality_answer]))
        return [mean(n, _accuracy(exam, pairs), keys, unit="share of tokens") for n, pairs in asked.items() if pairs]


def _accuracy(exam: Exam, pairs: list[tuple[str, str]]) -> list[float]:
    """Share of each answer's tokens that are the model's first choice; an empty answer counts as 0."""
    forms = [exam.codec.encode({"prompt": p, "completion": c}) for p, c in pairs]
    rows = [exam.renderer.render(form, str(i)) for i, form in enumerate(forms)]
    stops = set(exam.renderer.stop_ids)
    return [float(np.mean(hits)) if len(hits) else 0.0 for hits in exam.token_hits(rows, stops)]
