"""Classification: one of several classes for a whole text, by a new head or by a word that fills a gap."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from luthier.data.batch import collate
from luthier.data.prepare import RowMaker
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Facts, Problem, Source, Traits
from luthier.model.loading import reads_both_ways
from luthier.model.view import ModelView, evaluating
from luthier.step.forward import Forward
from luthier.step.lab import Choices, Lab, RowScore
from luthier.support.errors import RecipeError
from luthier.tasks.base import (
    Rendered,
    Shown,
    Task,
    choices_of,
    in_models_order,
    refuse_one_class,
    refuse_unknown_head,
    told_head,
)
from luthier.tasks.class_rows import PAIR, ClassRows
from luthier.tasks.cloze import Cloze, ClozeRows, word_id


class Classification(Task):
    """Choose a class for a text, or for two: with a new head, which any tuner trains as well, or with words of the vocabulary.

    Rows hold text and label, or two texts (a premise and a hypothesis) and label; labels are text or whole numbers. Two texts
    become the ids and the token types that the tokenizer makes of a pair; if they are too long, the longer one is cut at its
    end first, as by the tokenizer's longest_first. The names of classes are stored where transformers stores them
    (id2label), in the model's order if it has these names already, else alphabetically.
    With `prompt` and `words`, a row becomes a sentence with a gap, "{text} It was {label}.". The scores of the classes are
    the model's own scores of their words in the gap. Nothing is drawn at random, so a few labels are enough. An encoder
    fills a mask in the gap (Schick and Schuetze 2020, arXiv:2001.07676). A decoder reads up to the gap and predicts the
    next token; it never sees the text after the gap.
    Cost: that of the model; the head is a matrix with a row for each class, or the rows of these words in the vocabulary matrix.
    Refuses: words that are not one token for the model, a label without a word, a word without a row, two texts beside `prompt`.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"classification"}))
    source: ClassVar[Source] = Source(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, "arXiv:1810.04805"
    )

    prompt: str | None = Field(None, examples=["{text} It was {label}."])
    """A sentence with {text} and {label}, each once; null: a new head."""
    words: dict[str, str] | None = Field(None, examples=[{"good": "great", "bad": "terrible"}])
    """The word for each label in the gap; each must be one token."""

    pool_shapes: ClassVar[tuple[str, ...]] = ("text",)
    always: ClassVar[tuple[str, ...]] = ("loss", "classification")
    unit: ClassVar[str] = "nats a row"
    token_losses: ClassVar[bool] = False
    shows_rows: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-classification"
    starter: ClassVar[Mapping[str, str]] = {
        "model": "builtin:smollm2-135m",
        "task": "classification",
        "data": "{train: train.jsonl, eval: test.jsonl}  # rows of text and label",
        "pool_task": '{classification: {prompt: "{text} It was {label}.", words: {good: great, bad: terrible}}}',
        "pool_data": "{train: train.jsonl, eval: test.jsonl, pool: pool.jsonl}  # rows of text and label; the pool: of text",
    }

    @field_validator("prompt")
    @classmethod
    def _one_gap(cls, prompt: str | None) -> str | None:
        if prompt is not None and (
            prompt.count("{text}") != 1 or prompt.count("{label}") != 1 or len(re.findall(r"[{}]", prompt)) != 4
        ):
            raise ValueError('write {text} and {label} once each and no other braces: "{text} It was {label}."')
        return prompt

    @field_validator("words")
    @classmethod
    def _two_words(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        if words is not None and (len(words) < 2 or len(set(words.values())) < len(words)):
            raise ValueError("give at least two labels, and a different word to each")
        return words

    @model_validator(mode="after")
    def _both(self) -> Classification:
        if (self.prompt is None) != (self.words is None):
            raise ValueError("prompt and words are read together; write both, or neither for a new head")
        return self

    @property
    def shapes(self) -> tuple[str, ...]:
        return ("two texts and label", "text and label") if self.prompt is None else ("text and label",)

    @property
    def untuned_answers(self) -> bool:
        return self.prompt is not None

    def auto(self, config: PreTrainedConfig) -> Any:
        if self.prompt is None:
            return AutoModelForSequenceClassification
        return AutoModelForMaskedLM if reads_both_ways(config) else AutoModelForCausalLM

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        config, (front, _, _) = facts.model_config, (self.prompt or "").partition("{label}")
        if self.prompt is not None and config is not None and not reads_both_ways(config) and "{text}" not in front:
            what = (
                f"{self.prompt!r} has its gap before the text, but a {config.model_type} model reads only up to the gap"
            )
            problems.append(Problem("prompt", what, "put {text} first, or choose an encoder"))
        return problems

    def check_view(self, view: ModelView) -> None:
        if self.prompt is not None:
            refuse_unknown_head(view)

    def labels(self, rows: Sequence[Row], held: Sequence[Row] | None, known: Mapping[str, int]) -> dict[str | int, int]:
        """In the model's order if it knows these names, with its other classes; else in alphabetical order."""
        names = sorted({r.values["label"] for r in rows}, key=str)
        if twice := [str(a) for a, b in pairwise(names) if str(a) == str(b)]:
            raise RecipeError("data.train", f"has the label {twice[0]!r} as text and as a number", "write one of them")
        if self.words is None or len(names) == len(known):
            names = in_models_order(names, known)
        for r in held or ():
            if r.values["label"] not in names:
                label = r.values["label"]
                if other := next((n for n in names if str(n) == str(label)), None):
                    what = f"label {label!r} is {_written(label)}, and {_written(other)} in the training rows"
                    raise RecipeError(r.key, what, "write labels in one way")
                raise RecipeError(
                    r.key, f"label {label!r} occurs in no training row", "correct the label or drop the row"
                )
        if self.words is not None:
            self._check_words(self.words, rows, {str(n) for n in names})
        refuse_one_class(names)
        return {n: i for i, n in enumerate(names)}

    def head(self, rows: Sequence[Row], names: Sequence[str], config: PreTrainedConfig) -> str:
        if self.prompt is not None:
            return ""
        return told_head(self.auto(config), config, names, {str(r.values["label"]) for r in rows})

    def _check_words(self, words: Mapping[str, str], rows: Sequence[Row], names: set[str]) -> None:
        """Raises RecipeError if labels and words do not match."""
        for r in rows if not names <= set(words) else ():
            if str(r.values["label"]) not in words:
                raise RecipeError(
                    r.key,
                    f"label {r.values['label']!r} has no word in task.classification.words",
                    "add one, or drop the row",
                )
        if idle := sorted(set(words) - names):
            raise RecipeError(
                f"task.classification.words.{idle[0]}", "no training row has this label", "add rows, or remove the word"
            )

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        if self.prompt is None or self.words is None:
            return ClassRows(labels if labelled else {}, getattr(config, "type_vocab_size", None))
        tokenizer, encoder = renderer.tokenizer, reads_both_ways(config)
        if encoder and tokenizer.mask_token is None:
            raise RecipeError(
                "task.classification.prompt",
                "needs a mask token, and this tokenizer has none",
                "remove prompt and words",
            )
        cloze = Cloze(self.prompt, tokenizer.mask_token if encoder else None)
        ids = {str(n): word_id(tokenizer, cloze.stem, self.words[str(n)], str(n)) for n in labels}
        if same := next((n for n in ids if list(ids.values()).count(ids[n]) > 1), None):
            what = f"{self.words[same]!r} is the same token as another label's word"
            raise RecipeError(f"task.classification.words.{same}", what, "choose another word")
        return ClozeRows(cloze, tuple(ids.values()), labels, labelled)

    def scores(self, fwd: Forward) -> list[RowScore]:
        logits = fwd.logits()  # [S, C]
        losses = F.cross_entropy(logits, fwd.batch.row["label"], reduction="none")
        return [RowScore(x, 1.0, (c,)) for x, c in zip(losses.tolist(), logits.argmax(-1).tolist(), strict=True)]

    def choices(self, fwd: Forward) -> list[Choices]:
        top, best = fwd.logits().softmax(-1).max(-1)
        return choices_of(top, best, fwd.batch.row["label"], [1] * fwd.batch.num_sequences)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        text, label = row.values["text"], str(row.values["label"])
        if PAIR not in row.values:
            return text, label
        return json.dumps({"text": text, PAIR: row.values[PAIR]}, ensure_ascii=False), label

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        return Shown(*self.asked(row, renderer), view.classes[score.best[0]])

    def _of_prompt(self, prompt: str) -> dict[str, str]:
        """The row of a prompt: its text, or two texts if it is JSON of these two, as `asked` writes them."""
        if self.prompt is None and prompt.lstrip().startswith("{"):
            with suppress(ValueError, RecursionError):
                found = json.loads(prompt)
                if found.keys() == {"text", PAIR} and all(isinstance(t, str) for t in found.values()):
                    return dict(found)
        return {"text": prompt}

    @torch.no_grad()
    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        classes: dict[str | int, int] = {name: i for i, name in enumerate(view.classes)}
        asked = [Row(f"prompt:{i}", self._of_prompt(p)) for i, p in enumerate(prompts, start=1)]
        out = []
        for item in self.maker(lab.renderer, view.module.config, classes, labelled=False).made(asked, lab.renderer):
            with evaluating(view.module):
                shares = Forward(collate([item]).to(view.device), view).logits()[0].softmax(-1)  # [C]
            best = int(shares.argmax())
            out.append({"answer": view.classes[best], "share": float(shares[best])})
        return out


def _written(label: str | int) -> str:
    return "a text" if isinstance(label, str) else "a number"
