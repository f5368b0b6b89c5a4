"""The cache of results: scores and answers under a key of everything that they depend on."""

from __future__ import annotations

import json
from pathlib import Path

from luthier.data.tokens import tokenizer_key
from luthier.evaluation.base import Evaluator, Exam, Results, examine
from luthier.model.fingerprint import configured
from luthier.support.cache import cache_folder, key_of
from luthier.support.files import write_text
from luthier.support.sources import code_key

MODEL = ("luthier.model.loading", "luthier.update.files")  # code that decides which weights are used


def exam_key(exam: Exam, evaluators: list[Evaluator], model: str, rows: str) -> str:
    """The key of an evaluation.

    model  a key of the weights: base model and update
    rows   a key of the rows and how they were rendered
    """
    view, renderer = exam.view, exam.renderer
    asked = [(e.key(), e.content()) for e in evaluators]
    machine = (str(view.dtype), view.device.type, view.layout)
    texts = (
        renderer.system, renderer.plain, tokenizer_key(renderer.tokenizer), renderer.stop_ids, renderer.stop_strings,
        sorted(renderer.options.items()), renderer.day,
        configured(view.module.config),
    )  # fmt: skip
    code = code_key("luthier.evaluation.base", *MODEL, *sorted({type(m).__module__ for m in (exam.task, *evaluators)}))
    task = (exam.task.key(), exam.task.model_dump_json())
    return key_of(model, rows, asked, machine, texts, task, exam.lab.seed, exam.codec.name, code)


def kept(key: str, exam: Exam, evaluators: list[Evaluator]) -> Results:
    """The results under this key. They are measured if the cache does not have them."""
    found = read(key)
    if found is None:
        found = examine(exam, evaluators)
        _file(key).parent.mkdir(parents=True, exist_ok=True)
        write_text(_file(key), json.dumps(found.as_dict(), ensure_ascii=False))
    return found


def read(key: str) -> Results | None:
    """The results in the cache; None if there are none, or if they are damaged."""
    try:
        return Results.from_dict(json.loads(_file(key).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _file(key: str) -> Path:
    return cache_folder() / "scores" / f"{key}.json"
