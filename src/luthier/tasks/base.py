"""The base class of tasks: which rows are read, which class loads the model, how rows are rendered, scored and shown.

No code outside of this room asks which task it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import starmap
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from luthier.data.batch import IGNORE, collate, predicted
from luthier.data.prepare import RowMaker
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.kernels.head import CHUNK
from luthier.method import Method
from luthier.model.loading import are_numbers, class_names, has_class_head, heads_change
from luthier.model.view import HEAD_TOLERANCE, ModelView, evaluating
from luthier.step.forward import Forward, sequence_sum
from luthier.step.lab import Choices, Lab, RowScore
from luthier.support.errors import RecipeError

Rendered = Mapping[str, Any]  # a training row, as `collate` takes it
# (training row, epoch) -> this epoch's version of the row; epoch None: the version that is always scored
Draw = Callable[[Rendered, int | None], Rendered]


# Largest accepted difference of states, relative to the largest, with and without later tokens.
LATER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class Shown(NamedTuple):
    """A row for a reader: the prompt, the right answer, and the model's answer."""

    prompt: str
    wanted: str
    answer: str


class Task(Method):
    """What a row is, and how a model is used on it.

    pool_shapes    of rows without labels (data.pool); empty if no pipeline makes labels for this task
    always         names of the evaluators that always measure
    unit           of the loss
    spells         the loss is that of a whole text, so bits a byte can be counted
    token_losses   single tokens have a loss to show
    redraws        rows differ in every epoch, see `draw`
    shows_rows     every held-out row is a sample to show; else the generated answers are
    export_forms   forms that a tuned model can be exported to
    pipeline_tag   transformers' and the Hub's name for what such a model does
    starter        the recipe's first lines on pages of methods: model, task, data; "pool_task"
                   and "pool_data" for pipelines that label data.pool
    """

    pool_shapes: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[tuple[str, ...]] = ("loss",)
    unit: ClassVar[str] = "nats a token"
    spells: ClassVar[bool] = False
    token_losses: ClassVar[bool] = True
    redraws: ClassVar[bool] = False
    shows_rows: ClassVar[bool] = False
    export_forms: ClassVar[tuple[str, ...]] = ("hf", "peft")
    pipeline_tag: ClassVar[str]
    starter: ClassVar[Mapping[str, str]]

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes of rows that it reads, as luthier.data.reading.SHAPES calls them."""
        raise NotImplementedError  # the seam: every task has its own

    @property
    def untuned_answers(self) -> bool:
        """Whether the base model can answer. It cannot if its head is drawn at random."""
        return True

    def auto(self, config: PreTrainedConfig) -> Any:
        """The Auto class of transformers that loads such a model."""
        raise NotImplementedError  # the seam: every task has its own

    def check_view(self, view: ModelView) -> None:
        """Raises RecipeError if this loaded model cannot be used for the task."""

    def labels(self, rows: Sequence[Row], held: Sequence[Row] | None, known: Mapping[str, int]) -> dict[str | int, int]:
        """Class index by label, in that order; empty for tasks without classes.

        known  the names of classes in the model's configuration
        """
        return {}

    def head(self, rows: Sequence[Row], names: Sequence[str], config: PreTrainedConfig) -> str:
        """What becomes of the head in the model's files, for the user; empty if there is nothing to say.

        rows    the training rows
        names   of the classes, in order
        config  as it is in the model's files
        """
        return ""

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        """What makes training rows for a model of this configuration.

        labelled  False: for rows of data.pool
        Raises RecipeError if this tokenizer cannot make them.
        """
        raise NotImplementedError  # the seam: every task has its own

    def draw(self, tokenizer: Any, seed: int) -> Draw | None:
        """What is drawn again in every epoch (masks); None if a row is the same in all epochs.

        It must depend only on seed, epoch and row, never on the other rows of a forward pass or on the rank.
        """
        return None

    def scores(self, fwd: Forward) -> list[RowScore]:
        """The loss of each row of a forward pass."""
        return token_losses(fwd)

    def choices(self, fwd: Forward) -> list[Choices]:
        """For each row of a forward pass, the most likely tokens (or class)."""
        return token_choices(fwd)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        """(prompt, right answer) as texts."""
        raise NotImplementedError  # the seam: every task has its own

    def spelt(self, tokenizer: Any, row: Rendered, names: Sequence[str]) -> list[str]:
        """The texts of a training row's tokens, for a reader. A hidden token is shown as the token to predict.

        names  of the classes, in order
        """
        targets = row.get("targets", row["ids"])
        return [
            tokenizer.decode([right if on else i])
            for i, right, on in zip(row["ids"], targets, predicted(row), strict=True)
        ]

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        """A held-out row and the model's answer; used if `shows_rows`.

        seen  the rendered row as it was scored
        """
        raise NotImplementedError  # the seam: every task that shows rows has its own

    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        """The model's reply to each prompt: its answer, and more facts about it. Raises LuthierError."""
        raise NotImplementedError  # the seam: every task has its own


@torch.no_grad()
def refuse_unknown_head(view: ModelView) -> None:
    """Raises RecipeError if luthier's computation of the head does not give the model's own logits."""
    ids = torch.arange(5, 12, device=view.device) % view.embedding.weight.shape[0]
    with evaluating(view.module):
        batch = collate([{"ids": ids.tolist(), "labels": [IGNORE] * len(ids)}]).to(view.device)
        ours = Forward(batch, view).logits(torch.arange(len(ids), device=view.device))  # [T, V]
        theirs = view.module(input_ids=ids.unsqueeze(0)).logits[0].float()
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))
    if not off <= HEAD_TOLERANCE[view.dtype]:  # also if it is NaN
        raise RecipeError(
            "model", f"{type(view.module).__name__} has a head that luthier does not know (logits differ by {off:.2g})",
            "choose another model, such as BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT",
        )  # fmt: skip


@torch.no_grad()
def refuse_later_tokens(view: ModelView) -> None:
    """Raises RecipeError for a model that sees the tokens after the one it is at: it would learn to copy them."""
    rows = [{"ids": ids, "labels": [IGNORE] * len(ids)} for ids in ([5, 6, 7, 8, 9], [5, 6, 7])]
    with evaluating(view.module):
        whole, part = (view.trace(collate([r]).to(view.device)).hidden[-1].float() for r in rows)
    off = float((whole[:3] - part).abs().max() / part.abs().max().clamp_min(1e-9))
    if off > LATER_TOLERANCE[view.dtype]:
        raise RecipeError(
            "model", f"{type(view.module).__name__} sees the tokens that it should predict (is it an encoder?)",
            "choose a decoder, or task: masked-lm; a BERT that was trained as a decoder has is_decoder: true in config.json",
        )  # fmt: skip


def token_losses(fwd: Forward) -> list[RowScore]:
    """Summed loss of each row's supervised tokens."""
    sums, counts = sequence_sum(fwd.nll(), fwd.batch).tolist(), fwd.batch.supervised_counts.tolist()
    return [RowScore(x, float(n)) for x, n in zip(sums, counts, strict=True)]


def token_choices(fwd: Forward) -> list[Choices]:
    """The most likely token at each supervised position."""
    rows = fwd.batch.supervised
    pieces = [fwd.logits(part).softmax(-1).max(-1) for part in rows.split(CHUNK)]  # [n, V] at a time
    top, best = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
    return choices_of(top, best, fwd.batch.labels[rows], fwd.batch.supervised_counts.tolist())


def token_guesses(fwd: Forward) -> list[RowScore]:
    """Summed loss of each row's supervised tokens, with the most likely choice and the right one at each."""
    rows, losses, best = fwd.batch.supervised, [], []
    for part in rows.split(CHUNK):  # [n, V] at a time
        logits = fwd.logits(part)
        losses.append(F.cross_entropy(logits, fwd.batch.labels[part], reduction="none"))
        best.append(logits.argmax(-1))
    counts = fwd.batch.supervised_counts.tolist()
    columns = [torch.cat(c).cpu().split(counts) for c in (losses, best, [fwd.batch.labels[rows]])]
    return [
        RowScore(float(x.double().sum()), float(len(x)), tuple(b.tolist()), tuple(w.tolist()))
        for x, b, w in zip(*columns, strict=True)
    ]


def refuse_one_class(names: Sequence[Any]) -> None:
    """Raises RecipeError where every row has the same class, so that there is nothing to learn."""
    if len(names) == 1:
        raise RecipeError("data.train", f"has one class only, {names[0]!r}", "add rows of another class")


def in_models_order(names: Sequence[str | int], known: Mapping[str, int]) -> list[str | int]:
    """The model's own classes in its order, if all of these names are among them; else the names as they are."""
    by_name = {str(n): n for n in names}
    if not by_name.keys() <= known.keys():
        return list(names)
    return [by_name.get(n, n) for n in sorted(known, key=known.__getitem__)]


def told_head(auto: Any, config: PreTrainedConfig, names: Sequence[str], seen: Collection[str]) -> str:
    """What becomes of the classification head in the model's files, for the user; empty if they hold none.

    auto   the Auto class of transformers that loads the model
    names  of the classes, in order; seen: those that some training row has
    """
    theirs = class_names(config)
    if not has_class_head(config, auto):
        return "a new one, because the model's is of another kind" if heads_change(config, auto, names) else ""
    if list(names) == theirs:
        idle = [n for n in theirs if n not in seen]
        return f"the model's own, with all its classes; no row has {', '.join(idle)}" if idle else "the model's own"
    if are_numbers(theirs) and len(names) == len(theirs):
        return f"the model's own; its classes have no names, so they get those of the rows: {', '.join(names)}"
    return f"a new one, because the model's has other classes: {', '.join(theirs)}"


def choices_of(top: torch.Tensor, best: torch.Tensor, wanted: torch.Tensor, counts: Sequence[int]) -> list[Choices]:
    """[N] probabilities, choices and right choices, cut by row."""
    columns = (top.double(), (best == wanted).double(), wanted)
    cut = ([p.cpu().numpy() for p in c.split(list(counts))] for c in columns)
    return list(starmap(Choices, zip(*cut, strict=True)))
