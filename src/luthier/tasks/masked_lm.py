"""Masked language modelling: some tokens of a text are hidden, and the model predicts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from luthier.data.batch import IGNORE, collate
from luthier.data.prepare import RowMaker, without
from luthier.data.rendering import Renderer, special_ids
from luthier.data.store import Row
from luthier.data.tokens import not_embedded
from luthier.method import Facts, Problem, Source, Traits
from luthier.model.loading import reads_both_ways
from luthier.model.view import ModelView, evaluating
from luthier.step.forward import Forward
from luthier.step.lab import Lab, RowScore
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.tasks.base import Draw, Rendered, Shown, Task, refuse_unknown_head, token_guesses

HIDDEN, RANDOM = 0.8, 0.1  # shares of the chosen tokens; the others stay, so that any token may be one to predict


def hidden(
    ids: Sequence[int], places: Sequence[int], count: int, mask: int, words: np.ndarray, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """(ids with some tokens replaced, targets): `count` of the places are chosen to be predicted.

    Of the chosen tokens, 80% become the mask, 10% a random one of `words`, 10% stay; each is decided independently.
    places   where tokens may be chosen
    targets  [i] is the token to predict at i, or IGNORE
    """
    out, targets = list(ids), [IGNORE] * len(ids)
    chosen = generator.choice(np.asarray(places), count, replace=False)
    fates, others = generator.random(count), generator.choice(words, count)
    for at, fate, other in zip(chosen.tolist(), fates.tolist(), others.tolist(), strict=True):
        targets[at] = ids[at]
        if fate < HIDDEN:
            out[at] = mask
        elif fate < HIDDEN + RANDOM:
            out[at] = other
    return out, targets


def num_hidden(num_places: int, fraction: float) -> int:
    """The number of tokens of a row to predict: the share, rounded, and at least one if there is any token."""
    return min(num_places, max(1, round(fraction * num_places)))


class MaskedLm(Task):
    """Hide some tokens of a text and predict them from both sides. So encoders learn from texts without labels.

    Rows hold text. In every epoch, other tokens are hidden. The choice depends only on seed, epoch and row: 15% of the
    tokens, at least one. Of these, 80% become the mask, 10% a random token, and 10% stay. Special tokens are never chosen.
    Held-out rows have the same tokens hidden in every run.
    Departs from the source: masks are drawn again in every epoch, as for RoBERTa, not ten times for the whole data set; the next
    sentence is not predicted.
    Cost: that of the model; the head sees only the hidden tokens.
    Refuses: models that read from left to right, tokenizers without a mask token.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"masked-lm"}))
    source: ClassVar[Source] = Source(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, "arXiv:1810.04805",
        "section 3.1, task 1",
    )  # fmt: skip

    mask_fraction: float = Field(0.15, gt=0, le=1)
    """Share of a row's tokens to predict."""

    always: ClassVar[tuple[str, ...]] = ("loss", "masked-accuracy")
    unit: ClassVar[str] = "nats a masked token"
    redraws: ClassVar[bool] = True
    shows_rows: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "fill-mask"
    starter: ClassVar[Mapping[str, str]] = {
        "model": "google-bert/bert-base-uncased",
        "task": "masked-lm",
        "data": "{train: train.jsonl, eval: test.jsonl}  # rows of text",
    }

    @property
    def shapes(self) -> tuple[str, ...]:
        return ("text",)

    def auto(self, config: PreTrainedConfig) -> Any:
        return AutoModelForMaskedLM

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        config = facts.model_config
        if config is not None and not reads_both_ways(config):
            what = f"{config.model_type} models read from left to right, so they cannot fill gaps"
            problems.append(Problem("model", what, "choose an encoder (BERT, RoBERTa), or task: causal-lm"))
        return problems

    def check_view(self, view: ModelView) -> None:
        refuse_unknown_head(view)

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        drawn = max(_mask_of(renderer.tokenizer), *ordinary(renderer.tokenizer).tolist())
        size = getattr(config.get_text_config(), "vocab_size", None)
        if size is not None and drawn >= size:  # a token that no row holds may be drawn too
            raise RecipeError("task.masked-lm", *not_embedded(renderer.tokenizer, drawn, size))
        return TextRows(self.mask_fraction)

    def draw(self, tokenizer: Any, seed: int) -> Draw | None:
        mask, words = _mask_of(tokenizer), ordinary(tokenizer)

        def drawn(row: Rendered, epoch: int | None) -> Rendered:
            # Keyed by the row's number: equal files are masked equally wherever they are.
            number = str(row["key"]).rpartition(":")[2]
            key = Streams(0).at("held-out mask", number) if epoch is None else Streams(seed).at("mask", epoch, number)
            places = [i for i, y in enumerate(row["labels"]) if y != IGNORE]
            count = num_hidden(len(places), self.mask_fraction)
            ids, targets = hidden(row["ids"], places, count, mask, words, key)
            return {**row, "ids": ids, "targets": targets}

        return drawn

    def scores(self, fwd: Forward) -> list[RowScore]:
        return token_guesses(fwd)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        return "", row.values["text"]

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        tokenizer = renderer.tokenizer
        wanted, answer = (", ".join(tokenizer.decode([i]).strip() for i in part) for part in (score.wanted, score.best))
        return Shown(tokenizer.decode(seen["ids"]), wanted, answer)

    @torch.no_grad()
    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        """The texts with their masks filled, and the model's probability of each word."""
        tokenizer, mask = lab.renderer.tokenizer, _mask_of(lab.renderer.tokenizer)
        out = []
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            places = [i for i, t in enumerate(ids) if t == mask]
            if not places:
                raise LuthierError(
                    f"{prompt!r}: has no gap to fill; write {tokenizer.mask_token} where a word is missing"
                )
            batch = collate([{"ids": ids, "labels": [IGNORE] * len(ids)}]).to(view.device)
            with evaluating(view.module):
                shares = Forward(batch, view).logits(torch.tensor(places, device=view.device)).softmax(-1)  # [n, V]
            top, best = shares.max(-1)
            for at, word in zip(places, best.tolist(), strict=True):
                ids[at] = word
            answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
            out.append({"answer": answer, "words": [tokenizer.decode([i]).strip() for i in best.tolist()],
                        "shares": top.tolist()})  # fmt: skip
        return out


def _mask_of(tokenizer: Any) -> int:
    """The mask's id. Raises RecipeError for a tokenizer without one."""
    if tokenizer.mask_token_id is None:
        raise RecipeError(
            "task", "masked-lm needs a mask token, and this model's tokenizer has none", "choose an encoder"
        )
    return int(tokenizer.mask_token_id)


def ordinary(tokenizer: Any) -> np.ndarray:
    """Ids of all tokens that are not special, sorted."""
    return np.setdiff1d(list(tokenizer.get_vocab().values()), list(special_ids(tokenizer)))


class TextRows:
    """Training rows of texts: every token that may be hidden is labelled with itself, special tokens are not."""

    answers = False

    def __init__(self, mask_fraction: float) -> None:
        self.mask_fraction = mask_fraction

    @property
    def key(self) -> str:
        return f"texts {self.mask_fraction}"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        ids = renderer.tokenizer([r.values["text"] for r in rows])["input_ids"] if rows else []
        special = special_ids(renderer.tokenizer)
        return [
            {"ids": i, "labels": [IGNORE if t in special else t for t in i], "key": r.key}
            for r, i in zip(rows, ids, strict=True)
        ]

    def supervised(self, item: Mapping[str, Any]) -> int:
        """The number of supervised tokens in an epoch: a share of all tokens."""
        places = sum(y != IGNORE for y in item["labels"])
        return num_hidden(places, self.mask_fraction)

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        """Cut the end of the text. Special tokens around it stay."""
        labels = item["labels"]
        stop = next((i for i in reversed(range(len(labels))) if labels[i] != IGNORE), -1) + 1
        return without(item, max(0, stop - (len(labels) - limit)), stop)
