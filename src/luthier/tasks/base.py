"""The task seam: which rows are read, which class loads the model, how rows are rendered, scored, shown and answered.

No code outside of this room asks which task it is: it asks the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedConfig

from luthier.data.batch import IGNORE, collate
from luthier.data.prepare import RowMaker
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.kernels.head import CHUNK
from luthier.method import Method
from luthier.model.view import ModelView, evaluating
from luthier.step.forward import Forward, sequence_sum
from luthier.step.lab import Choices, Lab, RowScore
from luthier.support.errors import RecipeError

Rendered = Mapping[str, Any]  # a training row, as `collate` takes it
# (training row, epoch) -> the row as this epoch sees it; epoch None: as it is always scored
Draw = Callable[[Rendered, int | None], Rendered]


# Largest accepted difference between our logits and the model's own, relative to the largest of these.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class Shown(NamedTuple):
    """A row for a reader: what the model was asked, what is right, what it said."""

    prompt: str
    wanted: str
    answer: str


class Task(Method):
    """What a row is, and how a model is asked about it.

    shapes         of rows, as luthier.data.reading.SHAPES calls them
    pool_shapes    of rows without labels (data.pool); empty where no pipeline makes labels of this task
    always         names of the evaluators that measure without being asked for
    unit           of the loss
    spells         the loss is that of spelling out a text, so that bits a byte can be counted
    token_losses   single tokens have a loss to show
    redraws        rows are other ones in every epoch, see `draw`
    shows_rows     every held-out row is a sample to show; else the answers that were generated
    export_forms   in which a tuned model can be written
    starter        the recipe's first lines on pages of methods: model, task, data; "pool_task"
                   and "pool_data" for pipelines that label data.pool
    """

    shapes: ClassVar[tuple[str, ...]]
    pool_shapes: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[tuple[str, ...]] = ("loss",)
    unit: ClassVar[str] = "nats a token"
    spells: ClassVar[bool] = False
    token_losses: ClassVar[bool] = True
    redraws: ClassVar[bool] = False
    shows_rows: ClassVar[bool] = False
    export_forms: ClassVar[tuple[str, ...]] = ("hf", "peft")
    starter: ClassVar[Mapping[str, str]]

    @property
    def untuned_answers(self) -> bool:
        """Can the untouched model answer? Not where its head is drawn at random."""
        return True

    def auto(self, config: PreTrainedConfig) -> Any:
        """The Auto class of transformers that loads such a model."""
        raise NotImplementedError  # the seam: every task has its own

    def check_view(self, view: ModelView) -> None:
        """Raises RecipeError where this loaded model cannot be asked."""

    def labels(self, rows: Sequence[Row], held: Sequence[Row] | None, known: Mapping[str, int]) -> dict[str | int, int]:
        """Class index by label, in that order; empty for tasks without classes.

        known  what the model's configuration calls its classes
        """
        return {}

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        """What makes training rows for a model of this configuration.

        labelled  False: of rows of data.pool
        Raises RecipeError where this tokenizer cannot.
        """
        raise NotImplementedError  # the seam: every task has its own

    def draw(self, tokenizer: Any, seed: int) -> Draw | None:
        """What is drawn anew in every epoch (masks); None where a row is the same in all of them.

        Must depend on seed, epoch and row alone, never on which rows share a forward or a rank.
        """
        return None

    def scores(self, fwd: Forward) -> list[RowScore]:
        """The loss of each row of a forward."""
        return token_losses(fwd)

    def choices(self, fwd: Forward) -> list[Choices]:
        """For each row of a forward, the likeliest tokens (or class)."""
        return token_choices(fwd)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        """(what the model is asked, the answer that is right) as texts."""
        raise NotImplementedError  # the seam: every task has its own

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        """A held-out row and what the model makes of it; asked for where `shows_rows`.

        seen  the rendered row as it was scored
        """
        raise NotImplementedError  # the seam: every task that shows rows has its own

    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        """What the model says to each prompt: its answer, and what is known of it beside. Raises LuthierError."""
        raise NotImplementedError  # the seam: every task has its own


@torch.no_grad()
def refuse_unknown_head(view: ModelView) -> None:
    """Raises RecipeError where our way through the head does not give the model's own logits."""
    ids = torch.arange(5, 12, device=view.device) % view.embedding.num_embeddings
    with evaluating(view.module):
        batch = collate([{"ids": ids.tolist(), "labels": [IGNORE] * len(ids)}]).to(view.device)
        ours = Forward(batch, view).logits(torch.arange(len(ids), device=view.device))  # [T, V]
        theirs = view.module(input_ids=ids.unsqueeze(0)).logits[0].float()
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))
    if not off <= HEAD_TOLERANCE[view.dtype]:  # also where it is no number
        raise RecipeError(
            "model", f"{type(view.module).__name__} has a head that luthier does not know (logits differ by {off:.2g})",
            "choose another encoder: BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT",
        )  # fmt: skip


def token_losses(fwd: Forward) -> list[RowScore]:
    """Summed loss of each row's supervised tokens."""
    sums, counts = sequence_sum(fwd.nll(), fwd.batch), supervised_counts(fwd)
    return [RowScore(x, float(n)) for x, n in zip(sums.tolist(), counts, strict=True)]


def supervised_counts(fwd: Forward) -> list[int]:
    """S numbers of supervised tokens."""
    batch = fwd.batch
    counts: list[int] = torch.bincount(batch.seq[batch.supervised], minlength=batch.num_sequences).tolist()
    return counts


def token_choices(fwd: Forward) -> list[Choices]:
    """The likeliest token at each supervised position."""
    rows = fwd.batch.supervised
    pieces = [fwd.logits(part).softmax(-1).max(-1) for part in rows.split(CHUNK)]  # [n, V] at a time
    top, best = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
    return choices_of(top, best, fwd.batch.labels[rows], supervised_counts(fwd))


def choices_of(top: torch.Tensor, best: torch.Tensor, wanted: torch.Tensor, counts: Sequence[int]) -> list[Choices]:
    """[N] probabilities, choices and right choices, cut by row."""
    columns = (top.double(), (best == wanted).double(), wanted)
    cut = ([p.cpu().numpy() for p in c.split(list(counts))] for c in columns)
    return list(starmap(Choices, zip(*cut, strict=True)))
