"""Causal language modelling: the next token, of answers or of whole texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedConfig

from luthier.data.prepare import ANSWERS, RowMaker
from luthier.data.reading import ANSWERED, shape_in
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.data.turns import last_answer
from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError
from luthier.tasks.base import Task, refuse_later_tokens


class CausalLm(Task):
    """Predict the next token: of a completion, of every assistant turn, or of a whole text.

    Rows hold prompt and completion, messages, or text. This is the default task.
    Cost: that of the model.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "A Neural Probabilistic Language Model", 2003, "https://www.jmlr.org/papers/v3/bengio03a.html"
    )

    always: ClassVar[tuple[str, ...]] = ("loss", "forgetting")
    spells: ClassVar[bool] = True
    export_forms: ClassVar[tuple[str, ...]] = ("hf", "peft", "gguf")
    pipeline_tag: ClassVar[str] = "text-generation"
    starter: ClassVar[Mapping[str, str]] = {
        "model": "builtin:smollm2-135m",
        "task": "causal-lm",
        "data": "{train: builtin:requests, eval: builtin:requests}",
    }

    @property
    def shapes(self) -> tuple[str, ...]:
        return ANSWERED

    def auto(self, config: PreTrainedConfig) -> Any:
        return AutoModelForCausalLM

    def check_view(self, view: ModelView) -> None:
        refuse_later_tokens(view)

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        return ANSWERS

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        if shape_in(row.values, self.shapes) == "text":
            return "", row.values["text"]
        turns = renderer.messages(row.values)
        last = last_answer(turns)
        if not last:
            raise RecipeError(row.key, "does not end in an answer to a question", "let an assistant's turn be its last")
        return turns[last - 1].get("content", ""), renderer.answer(row.values)

    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        ids = [lab.renderer.prompt_ids({"prompt": p}) for p in prompts]
        return [
            {"answer": a.text, "stopped": a.stopped, **({"thought": a.thought} if a.thought else {})}
            for a in lab.generator(view, ids, max_new_tokens)
        ]
