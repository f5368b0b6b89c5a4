"""An exam whose answers are known beforehand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation import lm_eval as ours
from luthier.evaluation.base import Exam
from luthier.inference.services import lab_with
from luthier.model.view import ModelView
from luthier.step.lab import Completion
from luthier.tasks.causal_lm import CausalLm
from luthier.testing.models import byte_tokenizer, tiny


def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own tasks out of its index, and the machine out of its results: both take seconds at each call."""
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **how: manager(**{**how, "include_defaults": False}))
    monkeypatch.setattr(ours, "names_of_lm_eval", list)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


class Scripted(Exam):
    """Answers from a list of rows' own texts; the model is never asked to generate."""

    said: dict[str, str]

    def generated(self, prompts, max_new_tokens):
        texts = [self.renderer.tokenizer.decode(p) for p in prompts]
        replies = [next(a for q, a in self.said.items() if f"user\n{q}<|im_end|>" in t) for t in texts]
        return [Completion(a, True, len(a)) for a in replies]


@pytest.fixture(scope="session")
def tiny_view() -> ModelView:
    model = tiny("llama", vocab_size=260, layers=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0)
    return ModelView(model.eval(), byte_tokenizer())


@pytest.fixture
def exam_of(tiny_view):
    """rows (prompt, completion, more columns), answers by prompt -> an exam."""

    def make(rows: list[dict[str, Any]], said: dict[str, str] | None = None) -> Exam:
        renderer = Renderer(tiny_view.tokenizer)
        sources = [Row(f"f.jsonl:{i}", json.loads(json.dumps(r))) for i, r in enumerate(rows, 1)]
        rendered = [renderer.render(r.values, r.key) for r in sources]
        lab = lab_with(renderer, {"base": lambda: tiny_view})
        if said is None:
            return Exam(tiny_view, lab, CausalLm(), rendered, sources)
        exam = Scripted(tiny_view, lab, CausalLm(), rendered, sources)
        exam.said = said
        return exam

    return make
