"""Classification: one of several classes for a whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from luthier.data.batch import IGNORE, collate
from luthier.data.prepare import RowMaker, shortened
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Source, Traits
from luthier.model.view import ModelView
from luthier.step.forward import Forward
from luthier.step.lab import Choices, Lab, RowScore
from luthier.support.errors import RecipeError
from luthier.tasks.base import Rendered, Shown, Task, choices_of


class Classification(Task):
    """Choose a class for a text, through a head that is learnt beside whatever the tuner trains.

    Rows hold text and label; labels are text or whole numbers. Names of classes are kept where transformers keeps them
    (id2label), in the order that the model already has them, else alphabetically.
    Cost: that of the model; the head is a matrix with a row a class.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"classification"}))
    source: ClassVar[Source] = Source(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, "arXiv:1810.04805"
    )

    shapes: ClassVar[tuple[str, ...]] = ("text and label",)
    pool_shapes: ClassVar[tuple[str, ...]] = ("text",)
    always: ClassVar[tuple[str, ...]] = ("loss", "classification")
    unit: ClassVar[str] = "nats a row"
    token_losses: ClassVar[bool] = False
    shows_rows: ClassVar[bool] = True
    starter: ClassVar[Mapping[str, str]] = {
        "model": "builtin:smollm2-135m",
        "task": "classification",
        "data": "{train: train.jsonl, eval: test.jsonl}  # rows of text and label",
    }

    @property
    def untuned_answers(self) -> bool:
        return False

    def auto(self, config: PreTrainedConfig) -> Any:
        return AutoModelForSequenceClassification

    def labels(self, rows: Sequence[Row], held: Sequence[Row] | None, known: Mapping[str, int]) -> dict[str | int, int]:
        """As the model has them where it knows these very names, else in alphabetical order."""
        names = sorted({r.values["label"] for r in rows}, key=str)
        if {str(n) for n in names} == set(known):
            names.sort(key=lambda n: known[str(n)])
        for r in held or ():
            if r.values["label"] not in names:
                what = f"label {r.values['label']!r} occurs in no training row"
                raise RecipeError(r.key, what, "mend the label or drop the row")
        return {n: i for i, n in enumerate(names)}

    def maker(self, renderer: Renderer, labels: Mapping[str | int, int], labelled: bool = True) -> RowMaker:
        return ClassRows(labels if labelled else {})

    def scores(self, fwd: Forward) -> list[RowScore]:
        logits = fwd.logits()  # [S, C]
        losses = F.cross_entropy(logits, fwd.batch.row["label"], reduction="none")
        return [RowScore(x, 1.0, (c,)) for x, c in zip(losses.tolist(), logits.argmax(-1).tolist(), strict=True)]

    def choices(self, fwd: Forward) -> list[Choices]:
        top, best = fwd.logits().softmax(-1).max(-1)
        return choices_of(top, best, fwd.batch.row["label"], [1] * fwd.batch.num_sequences)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        return row.values["text"], str(row.values["label"])

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        return Shown(*self.asked(row, renderer), view.classes[score.best[0]])

    @torch.no_grad()
    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        view.module.eval()
        classes: dict[str | int, int] = {name: i for i, name in enumerate(view.classes)}
        asked = [Row(f"prompt:{i}", {"text": p}) for i, p in enumerate(prompts, start=1)]
        out = []
        for item in self.maker(lab.renderer, classes, labelled=False).made(asked, lab.renderer):
            shares = Forward(collate([item]).to(view.device), view).logits()[0].softmax(-1)  # [C]
            best = int(shares.argmax())
            out.append({"answer": view.classes[best], "share": float(shares[best])})
        return out


@dataclass(frozen=True)
class ClassRows:
    """Training rows of texts with their class; labels is empty for rows without one."""

    labels: Mapping[str | int, int]
    answers: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return f"classes {sorted(self.labels.items(), key=str)}"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        ids = renderer.tokenizer([r.values["text"] for r in rows])["input_ids"] if rows else []
        return [
            {"ids": i, "labels": [IGNORE] * len(i), "key": r.key, "row": self._columns(r)}
            for r, i in zip(rows, ids, strict=True)
        ]

    def _columns(self, row: Row) -> dict[str, int]:
        return {"label": self.labels[row.values["label"]]} if self.labels else {}

    def supervised(self, item: Mapping[str, Any]) -> int:
        return 1

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        return shortened(item, limit, how)
