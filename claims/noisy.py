"""Pieces of biomedical abstracts, and requests with their calls, with noise in their answers, for SmolLM2-135M."""

from __future__ import annotations

from functools import cache

from toys import mean_nll, rows_of

from luthier.curation import QTuningOffline
from luthier.data.batch import IGNORE
from luthier.data.store import Row
from luthier.inference.scoring import Scoring
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.rng import Streams

PROMPT, ANSWER, STEPS = 16, 40, 16
LENGTH = PROMPT + ANSWER


def smollm() -> ModelView:
    return load_model(locate(BUILTIN))


@cache
def tokens(split: str) -> list[int]:
    """All abstracts of a split, end to end."""
    tokenizer = load_tokenizer(locate(BUILTIN))
    texts = [
        " ".join(r["context"]) if isinstance(r["context"], list) else str(r["context"])
        for r in rows_of("pubmedqa", split)
    ]
    return [i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids]


def pieces(count: int, split: str, seed: int) -> list[dict]:
    """Rows of 16 prompt and 40 answer tokens from random places."""
    text = tokens(split)
    starts = Streams(seed).at("pieces", split).integers(0, len(text) - LENGTH, size=count)
    return [row(text[s : s + LENGTH], [0] * LENGTH, f"{split}:{i}") for i, s in enumerate(starts.tolist())]


def row(ids: list[int], wrong: list[int], key: str, prompt: int = PROMPT) -> dict:
    labels, asked = [IGNORE] * prompt + ids[prompt:], [1] * prompt + [0] * (len(ids) - prompt)
    return {"ids": ids, "labels": labels, "key": key, "token": {"prompt": asked, "wrong": wrong}}


def held_out() -> list[dict]:
    return pieces(64, "test", 99)


def calls(count: int, split: str, seed: int) -> list[dict]:
    """Rows of snips drawn without repetition: a request, and the function call that answers it."""
    tokenizer, rows = load_tokenizer(locate(BUILTIN)), rows_of("snips", split)
    out = []
    for i in Streams(seed).at("calls", split).permutation(len(rows))[:count].tolist():
        asked, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{rows[i]['text']}\n", rows[i]["call"] + tokenizer.eos_token)
        )
        out.append(row(asked + answer, [0] * len(asked + answer), f"{split}:{i}", len(asked)))
    return out


def with_random_tokens(rows: list[dict], seed: int, view: ModelView, share: float = 0.3) -> list[dict]:
    """That share of every answer's tokens is any token of the vocabulary."""
    generator, out = Streams(seed).at("random-tokens"), []
    for r in rows:
        ids, wrong = list(r["ids"]), [0] * LENGTH
        for at in (PROMPT + generator.permutation(ANSWER)[: round(share * ANSWER)]).tolist():
            ids[at], wrong[at] = int(generator.integers(view.embedding.num_embeddings)), 1
        out.append(row(ids, wrong, r["key"]))
    return out


def with_swapped_answers(rows: list[dict], seed: int, share: float = 0.4) -> list[dict]:
    """That share of the rows has the answer of another one of them."""
    drawn = Streams(seed).at("swap").permutation(len(rows))[: round(share * len(rows))].tolist()
    out = list(rows)
    for here, other in zip(drawn, [*drawn[1:], *drawn[:1]], strict=True):
        asked, theirs = (sum(rows[i]["token"]["prompt"]) for i in (here, other))
        answer = rows[other]["ids"][theirs:]
        ids, wrong = rows[here]["ids"][:asked] + answer, [0] * asked + [1] * len(answer)
        out[here] = row(ids, wrong, rows[here]["key"], asked)
    return out


__all__ = ["STEPS", "calls", "held_out", "mean_nll", "pieces", "smollm", "with_random_tokens", "with_swapped_answers"]


class AsTheyAre:
    """Renders rows that are token ids already: nothing is left to do."""

    def render(self, values, key):
        return values


def chosen_once(rows, view, share, seed, tokens_per_forward=2048):
    """Positions of the share of rows that the untouched model chooses, once, before training."""
    lab = Lab(seed=seed, models={"base": lambda: view}, text=AsTheyAre(), asking=Scoring(tokens_per_forward))
    return QTuningOffline(keep_fraction=share).select([Row(r["key"], r) for r in rows], lab).keep
