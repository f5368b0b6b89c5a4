"""Forgetting: what a model still knows of everything that it was not tuned on."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from luthier.data.batch import IGNORE
from luthier.data.reading import objects_of
from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, mean, ratio
from luthier.method import Facts, Problem, Source, Traits
from luthier.step.lab import RowScore
from luthier.support.cache import content_of
from luthier.support.errors import RecipeError

BUILTIN, NONE = "builtin", "none"


class Forgetting(Evaluator):
    """Loss on general text, and the share of plain questions whose right answer is the most likely of four.

    Measured before and after every run, unless `general: none` and `canaries: false` are set. The built-in text was written for
    luthier: 24 short passages of history, science, law, dialogue, code, letters, tables, German, French and Spanish. No model was
    trained on them before they were published here. The 60 canaries are simple general questions ("What is the capital of
    France?"), asked in the run's own template. Each of four answers is scored by its loss a token; nothing is generated. Both are
    levels, not differences: compare them before and after.
    Cost: one forward pass over about 4,000 tokens, and one over about 9,000 for the canaries.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "Catastrophic Interference in Connectionist Networks", 1989, "https://doi.org/10.1016/S0079-7421(08)60536-8"
    )

    own_rows: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("general",)

    general: str = BUILTIN
    """"builtin", "none", or a .jsonl file of {"text": ...} rows, relative to the recipe's folder."""
    canaries: bool = True
    """Ask the built-in questions."""
    max_tokens: int = Field(256, ge=2)
    """Longer passages are cut to this many tokens."""

    def names(self) -> tuple[str, ...]:
        text = ("general_loss",) if self.general != NONE else ()
        return (*text, "canaries", "canary_loss") if self.canaries else text

    def content(self) -> str:
        own = self.general not in (BUILTIN, NONE)
        return super().content() + (content_of(Path(self.general)) if own else "")

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if self.general not in (BUILTIN, NONE) and not Path(self.general).is_file():
            problems.append(Problem("general", f"there is no file {self.general}", "write builtin, none or a file"))
        return problems

    def evaluate(self, exam: Exam) -> list[Measure]:
        return (self._text(exam) if self.general != NONE else []) + (self._canaries(exam) if self.canaries else [])

    def _text(self, exam: Exam) -> list[Measure]:
        found = built_in("general") if self.general == BUILTIN else texts_of(Path(self.general))
        texts = [r["text"] for r in found]
        tokens = exam.renderer.tokens
        cut = [[*tokens.first, *i][: self.max_tokens] for i in tokens.bare(texts)]
        rows: list[dict[str, Any]] = [
            {"ids": i, "labels": [IGNORE, *i[1:]], "key": f"general:{n}", "token": {"prompt": [0] * len(i)}}
            for n, i in enumerate(cut, 1)
            if len(i) > 1
        ]
        scored, keys = exam.losses(rows), tuple(r["key"] for r in rows)
        nats, over = [s.total for s in scored], [s.over for s in scored]
        return [ratio("general_loss", nats, over, keys, higher=False, unit="nats a token")]

    def _canaries(self, exam: Exam) -> list[Measure]:
        asked = built_in("canaries")
        answers = [[c["right"], *c["wrong"]] for c in asked]
        rows = [
            exam.renderer.render({"prompt": c["question"], "completion": a}, f"canary:{n}.{i}")
            for n, c in enumerate(asked, 1)
            for i, a in enumerate(answers[n - 1])
        ]
        scored = iter(exam.losses(rows))
        losses = [[_a_token(next(scored)) for _ in options] for options in answers]
        keys = tuple(f"canary:{n}" for n in range(1, len(asked) + 1))
        right = [float(np.argmin(x) == 0) for x in losses]
        return [
            mean("canaries", right, keys, unit="share of questions"),
            mean("canary_loss", [x[0] for x in losses], keys, higher=False, unit="nats a token"),
        ]


def _a_token(score: RowScore) -> float:
    return score.total / score.over if score.over else math.inf


def built_in(name: str) -> list[dict[str, Any]]:
    """The rows of a set that comes with luthier: "general" or "canaries"."""
    lines = files("luthier.evaluation").joinpath(f"sets/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file. Raises RecipeError with the line of a row without text."""
    rows = []
    for number, row in objects_of(path):
        if not isinstance(row.get("text"), str):
            raise RecipeError(f"{path}:{number}", "has no text", 'write {"text": ...}')
        rows.append(row)
    return rows
