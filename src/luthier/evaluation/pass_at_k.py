"""pass@k: does generated code pass its tests? Programs run only in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any, ClassVar

from pydantic import Field

from luthier.evaluation.base import Answering, Exam, Question
from luthier.evaluation.measures import Measure, mean
from luthier.inference.generation import sampled
from luthier.method import Facts, Problem, Source, Traits
from luthier.step.lab import Completion
from luthier.support.errors import LuthierError
from luthier.support.sandbox import Limits, execute_all

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers passes, from `passed` of `samples`."""
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def code_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it."""
    found = _FENCE.search(answer)
    return found.group(1) if found else answer


def program(row: Mapping[str, Any], answer: str) -> str:
    """The program to run: set-up, the answer's code, the row's tests.

    A row has `tests` (a list of statements, or text) and maybe `setup`, as MBPP; or `test` and `entry_point`, as
    HumanEval, whose answers may continue the code of `prompt`. Raises LuthierError for a row with neither.
    """
    code, tests = code_of(answer), row.get("tests")
    if isinstance(tests, list) and all(isinstance(t, str) for t in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        return "\n\n".join(part for part in (row.get("setup") or "", code, tests) if part)
    if all(isinstance(row.get(name), str) for name in ("prompt", "test", "entry_point")):
        whole = code if f"def {row['entry_point']}(" in code else row["prompt"] + code
        return f"{whole}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
    raise LuthierError("has neither tests nor test and entry_point, which pass-at-k runs; add the column")


class PassAtK(Answering):
    """The probability that one of k generated programs passes its tests, estimated from `samples` programs for each question.

    With one sample, the greedy answer is used. Several samples are drawn at `temperature`, keyed by row and number, so
    that batches and order do not change them. Programs run in the sandbox (no network, no files, limits on time and
    memory). If no sandbox works, nothing runs and the evaluation is refused.
    Cost: `samples` generated answers for each question, and running them.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "Evaluating Large Language Models Trained on Code", 2021, "arXiv:2107.03374", "eq. 1"
    )

    max_new_tokens: int = Field(256, ge=1)
    """Largest number of tokens in an answer."""
    samples: int = Field(1, ge=1)
    """Programs generated for each question (n)."""
    k: tuple[int, ...] = (1,)
    """Values of k to estimate pass@k for."""
    temperature: float = Field(0.8, gt=0)
    """Temperature of the drawn programs; a single program is greedy."""
    seconds: float = Field(5.0, gt=0)
    """Time limit of one program."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            problems.append(
                Problem("k", f"{list(self.k)} does not lie in 1 to samples = {self.samples}", "raise samples")
            )
        return problems

    def names(self) -> tuple[str, ...]:
        return tuple(f"pass@{k}" for k in self.k)

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions = exam.questions(self.rows)
        if self.samples == 1:
            answers = [[a.text] for a in exam.answers(questions, self.max_new_tokens, self.stop)]
        else:
            answers = self._drawn(exam, questions)
        programs = []
        for q, replies in zip(questions, answers, strict=True):
            try:
                programs += [program(q.row.values, a) for a in replies]
            except LuthierError as error:
                raise LuthierError(f"{q.row.key}: {error}") from error
        limits = Limits(seconds=self.seconds, cpu_seconds=max(1, int(self.seconds + 1)))
        ok = [v.status == "ok" for v in execute_all(programs, limits)]
        passed = [sum(ok[i : i + self.samples]) for i in range(0, len(ok), self.samples)]
        keys, single = tuple(q.key for q in questions), self.samples == 1
        shares = {k: [pass_at_k(self.samples, c, k) for c in passed] for k in self.k}
        return [mean(f"pass@{k}", values, keys, unit="chance", judges=single) for k, values in shares.items()]

    def _drawn(self, exam: Exam, questions: Sequence[Question]) -> list[list[str]]:
        """`samples` drawn answers to each question."""
        prompts, keys = [exam.prompt_ids(q.row.values) for q in questions], [q.key for q in questions]
        drawn = sampled(
            exam.view, prompts, exam.renderer, self.max_new_tokens, self.samples, self.temperature, exam.streams, keys
        )
        whole = [[exam.codec.decode(q.row.values, a) for a in some] for q, some in zip(questions, drawn, strict=True)]
        return [[Completion(a, True, 0).up_to(self.stop).text for a in some] for some in whole]
