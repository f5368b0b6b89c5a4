"""Tiny models for tests of evaluators and tasks: one has learnt its rows by heart, and one always prefers something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedModel,
)

from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation.base import Exam
from luthier.inference.services import lab_with
from luthier.method import registry as manifest
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.tasks.base import Task
from luthier.testing.contract.examples import Example
from luthier.testing.models import byte_tokenizer, tiny, tiny_classifier, word_tokenizer
from luthier.training.loop import Loop
from luthier.tuners.full import Full

Values = Sequence[Mapping[str, Any]]
Made = tuple[PreTrainedModel, Any]
LEARNT = 0.05  # nats; below this loss, rows are known by heart
STEPS = TrainSettings(
    max_steps=150, batch_size=256, learning_rate=1e-2, warmup_fraction=0.0, lr_scheduler_type="constant", max_grad_norm=1.0
)  # fmt: skip


def decoder() -> Made:
    """A language model of bytes."""
    return tiny(vocab_size=260, layers=2, max_position_embeddings=512), byte_tokenizer()


def classifier() -> Made:
    """A classifier of bytes with the classes good and bad."""
    return tiny_classifier(), byte_tokenizer()


def encoder() -> Made:
    """An encoder of words, which fills gaps."""
    tokenizer = word_tokenizer()
    ends = {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
    return tiny("bert", layers=2, vocab_size=len(tokenizer), **ends), tokenizer


def tagger() -> Made:
    """An encoder of words with the tags O, B-PER and I-PER."""
    tokenizer, tags = word_tokenizer(), ("B-PER", "I-PER", "O")
    names: dict[str, Any] = {"id2label": dict(enumerate(tags)), "label2id": {n: i for i, n in enumerate(tags)}}
    return tiny("bert-tagger", layers=2, vocab_size=len(tokenizer), max_position_embeddings=64, **names), tokenizer


USUAL: dict[Any, Callable[[], Made]] = {  # by the Auto class with which a task loads a model
    AutoModelForCausalLM: decoder,
    AutoModelForSequenceClassification: classifier,
    AutoModelForMaskedLM: encoder,
    AutoModelForTokenClassification: tagger,
}
PAIRS = (
    ("good day", "was the day not good"), ("a film", "it was long and very poor"),
    ("a book", "read and liked on that day"), ("the film is", "short"),
)  # fmt: skip
SHAPED: dict[str, Values] = {  # rows of every shape, of words that both tokenizers know
    "prompt and completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
    "messages": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS
    ],
    "text and label": [
        {"text": "a very good film", "label": "good"}, {"text": "the book was bad", "label": "bad"},
        {"text": "liked on a fine day", "label": "good"}, {"text": "poor and long", "label": "bad"},
    ],
    "two texts and label": [
        {"text": "a very good film", "text_pair": "the film was bad", "label": "bad"},
        {"text": "the film was bad", "text_pair": "a very good film", "label": "good"},
        {"text": "a fine day", "text_pair": "good", "label": "good"},
        {"text": "good", "text_pair": "a fine day", "label": "bad"},
    ],
    "words and tags": [
        {"tokens": ["a", "very", "good", "film"], "tags": ["O", "B-PER", "I-PER", "O"]},
        {"tokens": ["the", "book", "was", "bad"], "tags": ["O", "O", "O", "B-PER"]},
        {"tokens": ["liked", "on", "a", "fine", "day"], "tags": ["O", "O", "B-PER", "I-PER", "I-PER"]},
        {"tokens": ["poor", "not", "long"], "tags": ["B-PER", "O", "B-PER"]},
    ],
    "text": [
        {"text": "the film was good ."}, {"text": "a bad book"}, {"text": "it was a fine day"}, {"text": "not very long ."},
    ],
}  # fmt: skip


class Subject(NamedTuple):
    """The weights of a model that knows its rows, and of one whose head is negated."""

    make: Callable[[], Made]
    layout: str
    knowing: dict[str, Tensor]
    wrong: dict[str, Tensor]

    def view(self, weights: str = "knowing") -> ModelView:
        """A fresh model with these weights."""
        model, tokenizer = self.make()
        model.load_state_dict(getattr(self, weights))
        return ModelView(model.eval(), tokenizer, self.layout)


def task_named(name: str) -> Task:
    """The task with this name, with the defaults of its fields."""
    found: Task = manifest.find("task", name)()
    return found


def maker_of(example: Example, task: Task) -> Callable[[], Made]:
    """The function that makes the model for an example."""
    made = example.model or USUAL.get(task.auto(LlamaConfig()))
    assert made is not None, f"there is no usual model for {task.key()}: write Example(method, model=...)"
    return made


def exam_of(view: ModelView, task: Task, values: Values, *, tokens_per_forward: int = 2048, order: int = 1) -> Exam:
    """An exam of a model on these rows; order -1 reverses them."""
    sources = [Row(f"rows:{i}", json.loads(json.dumps(v))) for i, v in enumerate(values, start=1)][::order]
    renderer = Renderer(view.tokenizer)
    lab = lab_with(renderer, {"base": lambda: view}, task=task, tokens_per_forward=tokens_per_forward)
    maker = task.maker(renderer, view.module.config, labels_of(view, task, sources))
    rendered = prepare(sources, renderer, max_length=512, maker=maker).rows if sources else ()
    return Exam(view, lab, task, rendered, sources)


def labels_of(view: ModelView, task: Task, sources: Sequence[Row]) -> Mapping[str | int, int]:
    """The numbers of classes, if the rows have classes."""
    if not any({"label", "tags"} & r.values.keys() for r in sources):
        return {}
    return task.labels(sources, None, {name: i for i, name in enumerate(view.classes)})


def subject(make: Callable[[], Made], task: Task, values: Values) -> Subject:
    """A model that has learnt these rows by heart, and its opposite; trained once for all tests."""
    return _subject(make, type(task), task.model_dump_json(), json.dumps(list(values)))


@cache
def _subject(make: Callable[[], Made], kind: type[Task], fields: str, values: str) -> Subject:
    model, tokenizer = make()
    task, view = kind.model_validate_json(fields), ModelView.probed(model.eval(), tokenizer)
    exam = exam_of(view, task, json.loads(values))
    draw = task.draw(view.tokenizer, 0)
    rows = [r if draw is None else draw(r, None) for r in exam.rows]
    loop = Loop(view, rows, Full().attach(view), Sft(), STEPS)
    while loop.progress.step < loop.total_steps and loop.step()["loss"] > LEARNT:
        pass
    knowing = {n: t.detach().clone() for n, t in view.module.state_dict().items()}
    with torch.no_grad():
        heads: list[Tensor] = [view.weight(n) for n in view.anatomy.task_head] or [view.head_weight]
        for p in heads:
            p.neg_()
    wrong = {n: t.detach().clone() for n, t in view.module.state_dict().items()}
    return Subject(make, view.layout, knowing, wrong)
