"""The base class of evaluators: a model answers or scores rows that it was not trained on. Every row's value is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel

from luthier.data.codec import Chain
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.data.turns import until_answer
from luthier.evaluation.measures import Measure, mean
from luthier.inference.services import lab_around, lab_with
from luthier.method import Method
from luthier.model.anatomy import max_positions
from luthier.model.view import ModelView
from luthier.step.lab import Completion, Lab, RowScore
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.support.statistics import Estimate
from luthier.tasks.base import Task
from luthier.tasks.guess import usual_task


class Question(NamedTuple):
    """A prompt that is asked once, with all its right answers. `row` is the first row with this prompt."""

    key: str
    row: Row
    prompt: str
    references: tuple[str, ...]


class Sample(NamedTuple):
    """An answer to show. `right` is None if no measure judges it."""

    key: str
    prompt: str
    wanted: str
    answer: str
    right: bool | None = None


@dataclass
class Exam:
    """A model and the held-out rows. What several evaluators need is computed once.

    rows     rendered rows; sources: the original rows; both empty if there are none
    codec    puts questions into the form that the model was trained on, and its answers back
    """

    view: ModelView
    lab: Lab
    task: Task
    rows: Sequence[Any] = ()
    sources: Sequence[Row] = ()
    codec: Chain = field(default_factory=Chain)
    _answers: dict[tuple[str, int], Completion] = field(default_factory=dict)
    asked: dict[str, tuple[Question, Completion]] = field(default_factory=dict)

    @property
    def renderer(self) -> Renderer:
        """The renderer of the run."""
        return self.lab.renderer

    @property
    def streams(self) -> Streams:
        """Keyed randomness of the run."""
        return self.lab.streams

    @cached_property
    def scored(self) -> list[RowScore]:
        """The loss of every row, in order."""
        return list(self.lab.scorer.losses(self.view, self.rows))

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        """A unique key for each rendered row."""
        return tuple(unique([number_of(r["key"]) for r in self.rows]))

    def losses(self, rows: Sequence[Any]) -> list[RowScore]:
        """Losses of an evaluator's own rows."""
        return list(self.lab.scorer.losses(self.view, rows))

    def confidences(self, rows: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each row: probabilities of its most likely tokens (or class), and whether these are right."""
        found = self.lab.scorer.choices(self.view, rows)
        return ((confidence, right) for confidence, right, _ in found)

    def token_hits(self, rows: Sequence[Any], without: Collection[int]) -> Iterator[np.ndarray]:
        """For each row: whether its supervised tokens are the most likely ones. Token ids in `without` do not count."""
        found = self.lab.scorer.choices(self.view, rows)
        return (right[~np.isin(wanted, list(without))] for _, right, wanted in found)

    def questions(self, count: int) -> list[Question]:
        """The first `count` prompts; rows that ask the same are one question with several right answers.

        Raises LuthierError if there are no rows.
        """
        if not self.sources:
            raise LuthierError("there are no rows to ask about, so nothing is measured; give some, or set data.eval")
        found: dict[str, Question] = {}
        for row in self.sources:
            prompt, answer = self.task.asked(row, self.renderer)
            before = conversation(row, self.renderer)
            known = found.get(before)
            if known is None and len(found) == count:
                break
            references = (answer,) if known is None else (*known.references, answer)
            known = known or Question(number_of(row.key), row, prompt, ())
            found[before] = known._replace(references=references)
        return list(found.values())

    def answers(self, questions: Sequence[Question], max_new_tokens: int, stop: Sequence[str] = ()) -> list[Completion]:
        """Greedy answers, up to the first of the texts in `stop`. A question is never answered twice with the same length."""
        missing = [q for q in questions if (q.key, max_new_tokens) not in self._answers]
        if missing:
            replies = self.replies([q.row.values for q in missing], max_new_tokens)
            for q, done in zip(missing, replies, strict=True):
                self._answers[q.key, max_new_tokens] = done
        out = [self._answers[q.key, max_new_tokens].up_to(stop) for q in questions]
        for q, done in zip(questions, out, strict=True):
            self.asked.setdefault(q.key, (q, done))
        return out

    def prompt_ids(self, values: Mapping[str, Any]) -> list[int]:
        """The token ids of a row's prompt."""
        return self.renderer.prompt_ids(until_answer(self.codec.encode(values)))

    def replies(self, asked: Sequence[Mapping[str, Any]], max_new_tokens: int) -> list[Completion]:
        """Greedy answers to rows, in the form of the original rows."""
        done = self.generated([self.prompt_ids(values) for values in asked], max_new_tokens)
        return [c._replace(text=self.codec.decode(v, c.text)) for v, c in zip(asked, done, strict=True)]

    def generated(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        """Greedy completions of an evaluator's own prompts, as the model writes them."""
        return self.lab.generator(self.view, prompts, max_new_tokens)


class Gate(NamedTuple):
    """A condition of the release gate: how much a measure changed from the base model, and the outcome.

    outcome  "pass", "fail" or "inconclusive"; needed: number of rows that would be enough to decide
    """

    measure: str
    change: Estimate
    delta: float
    outcome: str
    needed: int


class Evaluator(Method):
    """Measures a model, with a value for each row."""

    own_rows: ClassVar[bool] = False  # True: asks rows of its own, not those of data.eval

    def names(self) -> tuple[str, ...]:
        """Names of the measures that it can give."""
        raise NotImplementedError  # the seam: every evaluator has its own

    def content(self) -> str:
        """A text that changes with everything that its measures depend on, besides the model and the rows."""
        return self.model_dump_json()

    def destinations(self) -> list[str]:
        """Places outside this machine that it contacts."""
        return []

    @property
    def brings_code(self) -> bool:
        """Whether it runs Python code that is not luthier's. Such recipes need --allow-code."""
        return False

    def evaluate(self, exam: Exam) -> list[Measure]:
        """Measures of the model in its current state."""
        raise NotImplementedError  # the seam: every evaluator has its own

    def check_rows(self, train: Sequence[Row], held: Sequence[Row]) -> None:
        """Raises RecipeError if these rows cannot be trained on and evaluated in one run."""

    def gates(self, before: Results, after: Sequence[Results]) -> list[Gate]:
        """Conditions of the release gate, from results of the base model and of tuned models, one for each seed."""
        return []

    def score(self, model: PreTrainedModel, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Values by measure, of a transformers model over plain dictionaries; for use without a recipe.

        rows  with prompt and completion, or messages, or text; for a classifier text (perhaps text_pair) and label, one of its
              own names; for a model that tags words, tokens and tags
        """
        around = lab_around(model, tokenizer)
        view, renderer = around.view(), around.renderer
        sources = [Row(f"rows:{i}", values) for i, values in enumerate(rows, start=1)]
        task = usual_task(view)
        maker = task.maker(renderer, model.config, {name: i for i, name in enumerate(view.classes)})
        rendered = (
            prepare(sources, renderer, max_length=max_positions(model.config), maker=maker).rows if sources else ()
        )
        exam = Exam(view, lab_with(renderer, {"base": lambda: view}, task=task), task, rendered, sources)
        return {m.name: m.value for m in self.evaluate(exam)}


class Answering(Evaluator):
    """An evaluator of generated answers."""

    rows: int = Field(100, ge=1)
    """Number of distinct prompts of data.eval to answer, from the first."""
    max_new_tokens: int = Field(64, ge=1)
    """Largest number of tokens in an answer."""
    stop: tuple[str, ...] = Field((), examples=[["\n\n"]])
    """Texts that end an answer: it is cut before the first of them. The model's end tokens and stop strings always end it."""

    def replies(self, exam: Exam) -> tuple[list[Question], list[str]]:
        """(questions, what the model answered)."""
        questions = exam.questions(self.rows)
        return questions, [a.text for a in exam.answers(questions, self.max_new_tokens, self.stop)]


class Results(NamedTuple):
    """Measures by name, answers to show, and the cost of measuring."""

    measures: dict[str, Measure]
    samples: list[Sample]
    seconds: float = 0.0

    def brief(self) -> dict[str, Any]:
        """Values without rows."""
        return {name: m.brief() for name, m in self.measures.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with rows."""
        return {
            "measures": [m.as_dict() for m in self.measures.values()],
            "samples": [s._asdict() for s in self.samples],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        """What `as_dict` gave."""
        measures = [Measure.from_dict(m) for m in values["measures"]]
        return cls({m.name: m for m in measures}, [Sample(**s) for s in values["samples"]], values["seconds"])


def examine(exam: Exam, evaluators: Sequence[Evaluator]) -> Results:
    """Every evaluator's measures of the model in its current state."""
    started = time.perf_counter()
    found = {measure.name: measure for evaluator in evaluators for measure in evaluator.evaluate(exam)}
    if exam.asked:
        keys, done = tuple(exam.asked), [c for _, c in exam.asked.values()]
        found["stopped"] = mean(
            "stopped", [c.stopped for c in done], keys, unit="share of answers that ended by themselves"
        )
        found["answer_tokens"] = mean("answer_tokens", [c.tokens for c in done], keys, unit="tokens")
    return Results(found, _samples(exam, found), time.perf_counter() - started)


def _samples(exam: Exam, found: dict[str, Measure]) -> list[Sample]:
    judged = next((m for m in found.values() if m.judges), None)
    right = {} if judged is None else dict(zip(judged.keys, judged.stats[:, 0] > 0.5, strict=True))
    if exam.task.shows_rows:
        sources = {number_of(r.key): r for r in exam.sources}
        draw = exam.task.draw(exam.renderer.tokenizer, exam.lab.seed)
        seen = (row if draw is None else draw(row, None) for row in exam.rows)
        told = (
            exam.task.shown(sources[number_of(row["key"])], row, score, exam.view, exam.renderer)
            for row, score in zip(seen, exam.scored, strict=True)
        )
        return [
            Sample(key, *shown, bool(right[key]) if key in right else None)
            for key, shown in zip(exam.row_keys, told, strict=True)
        ]
    return [
        Sample(k, q.prompt, q.references[0], c.text, bool(right[k]) if k in right else None)
        for k, (q, c) in exam.asked.items()
    ]


def conversation(row: Row, renderer: Renderer) -> str:
    """Everything before the answer. Equal last turns after different earlier turns are different questions.

    Raises LuthierError for a row without a prompt.
    """
    if not {"prompt", "messages"} & set(row.values):
        raise LuthierError(
            f"{row.key}: has no prompt to answer; leave such evaluators out, or give prompt and completion"
        )
    values = until_answer(row.values)
    return json.dumps([renderer.messages(values)[:-1], values.get("tools")])


def number_of(key: str) -> str:
    """A row's number within its file, so that results of equal rows are equal wherever the file is."""
    return key.rpartition(":")[2]


def unique(keys: Sequence[str]) -> list[str]:
    """The keys, with a number added to keys that occur again."""
    seen: dict[str, int] = {}
    out = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        out.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return out
