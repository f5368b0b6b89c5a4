"""What the study is made of: texts and their mixtures, two small models, and update vectors of both after the same rows.

Two Llamas made from six kinds of text stand for TinyLM and LLM. A client's rows are a mixture of the six kinds of its own;
so are a shadow set's, from other stretches of the texts.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.collaboration.contract import Start, start_of
from luthier.collaboration.shadows import tuned
from luthier.model.local import LARGE, SMALL, opened, pieces, rendered, schooled
from luthier.model.view import ModelView
from luthier.rng import Streams
from luthier.scorer import mean_loss, row_scores
from luthier.training.settings import TrainSettings
from luthier.tuners.lora import Lora

DATA = Path(os.environ.get("LUTHIER_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
RUNS = Path("runs/studies/translation")
WIDTH = 128
TOPIC = "restaurants"  # of the clients that one test is about
PARTS = {"school": (0.0, 0.4), "public": (0.4, 0.7), "private": (0.7, 0.9), "held": (0.9, 1.0)}


class Setting(NamedTuple):
    """One experiment."""

    name: str = "mixtures"
    sets: int = 60  # shadow sets
    clients: int = 20
    rows: int = 384  # of a set, and of a client
    held: int = 192  # rows a client is judged on
    concentration: float = 0.5  # of the Dirichlet that mixtures come from
    topic_clients: int = 8  # of the further tests
    further: bool = True  # left-out topic, pooling, noise
    steps: int = 40
    small_rate: float = 1e-2
    large_rate: float = 1e-2
    rank: int = 2


# --- text ---


@cache
def sources() -> dict[str, str]:
    """Six kinds of text, half a million to four million characters each."""

    def rows(name: str) -> list[dict]:
        with gzip.open(DATA / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    library = Path(sysconfig.get_paths()["stdlib"])
    return {
        "code": "\n".join(f.read_text(encoding="utf-8") for f in sorted(library.glob("*.py"))[:150]),
        "maths": "\n\n".join(f"{r['question']}\n{r['solution']}" for r in rows("gsm8k")),
        "restaurants": "\n".join(r["text"] for r in rows("e2e_nlg")),
        "articles": "\n\n".join(r["text"] for r in rows("wikitext2")),
        "plays": "\n\n".join(r["text"] for r in rows("tiny_shakespeare")),
        "medicine": "\n\n".join("\n".join(r["context"]) for r in rows("pubmedqa")),
    }


def part(which: str) -> dict[str, str]:
    """A stretch of every text: what the models learnt from, public, private and held-out stretches do not overlap."""
    low, high = PARTS[which]
    return {n: t[int(low * len(t)) : int(high * len(t))] for n, t in sources().items()}


def mixture(concentration: float, streams: Streams) -> dict[str, float]:
    """Shares of the six kinds."""
    names = sorted(sources())
    return dict(zip(names, streams.at("mixture").dirichlet([concentration] * len(names)).tolist(), strict=True))


# --- models and their updates ---


class Both(NamedTuple):
    """The two models, and where their tuning starts."""

    small: ModelView
    large: ModelView
    small_start: Start
    large_start: Start
    tuner: Lora


@cache
def models(rank: int) -> Both:
    tuner = Lora(rank=rank, alpha=16.0 * rank, targets=("q_proj", "v_proj"))
    small, large = opened(schooled(part("school"), SMALL)), opened(schooled(part("school"), LARGE))
    return Both(small, large, start_of(small, tuner), start_of(large, tuner), tuner)


def settings(steps: int, rate: float, seed: int) -> TrainSettings:
    return TrainSettings(
        max_steps=steps, batch_size=32, learning_rate=rate, warmup_fraction=0.0, tokens_per_forward=8192, seed=seed
    )


def own_rows(which: str, shares: dict[str, float], count: int, streams: Streams, view: ModelView) -> list[dict]:
    return rendered(pieces(part(which), shares, count, WIDTH, streams), view.tokenizer)


class Tuned(NamedTuple):
    """Update vectors of both models after the same rows, [N, L, d], and the mixtures of those rows."""

    x: Tensor
    y: Tensor
    shares: list[dict[str, float]]

    def first(self, count: int) -> Tuned:
        return Tuned(self.x[:count], self.y[:count], self.shares[:count])


def named(name: str, values: list[str]) -> Setting:
    """A setting from "key=value" words."""
    s = Setting(name=name)
    for word in values:
        key, _, value = word.partition("=")
        s = s._replace(**{key: type(getattr(s, key))(value)})
    return s


def tune_all(s: Setting, who: str, count: int, seed: int) -> Tuned:
    """Both models on `count` sets of rows: "shadow", "client" or "topic client". Finished ones are read.

    The order of rows differs between the models: their updates share the rows' content, not a path through them.
    """
    both, folder = models(s.rank), RUNS / s.name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    xs, ys, shares = [], [], []
    for i in range(count):
        streams = Streams(hash_of(who, seed, i))
        mine = mixture(s.concentration, streams)
        if who == "topic client":
            mine = {n: 0.3 * p + 0.7 * (n == TOPIC) for n, p in mine.items()}
        file = folder / f"{who.replace(' ', '-')}-{i}.safetensors"
        if not file.exists():
            rows = own_rows("public" if who == "shadow" else "private", mine, s.rows, streams, both.small)
            x = tuned(both.small, rows, both.tuner, settings(s.steps, s.small_rate, 2 * i))
            y = tuned(both.large, rows, both.tuner, settings(s.steps, s.large_rate, 2 * i + 1))
            save_file({"x": x, "y": y}, str(file) + ".part")
            Path(str(file) + ".part").rename(file)
        found = load_file(file)
        xs.append(found["x"][-1])
        ys.append(found["y"][-1])
        shares.append(mine)
    return Tuned(torch.stack(xs), torch.stack(ys), shares)


def hash_of(*key: object) -> int:
    return int(Streams(0).at("key", *map(str, key)).integers(2**31))


def loss(view: ModelView, start: Start, update: Tensor | None, rows: list[dict]) -> float:
    """Nats a byte, with an update or without."""
    if update is None:
        return mean_loss(row_scores(view, rows, 16384, "causal-lm"))
    with start.update(update).bind(view):
        return mean_loss(row_scores(view, rows, 16384, "causal-lm"))


def client_loss(s: Setting, seed: int, i: int, clients: Tuned, update: Tensor | None, small: bool = False) -> float:
    """Of a client, on rows of its own mixture that nobody trained on."""
    both = models(s.rank)
    rows = own_rows("held", clients.shares[i], s.held, Streams(hash_of("held", seed, i)), both.small)
    return loss(*((both.small, both.small_start) if small else (both.large, both.large_start)), update, rows)


def tuned_on_public(s: Setting, seed: int) -> Tensor:
    """C2: the large model on all public text, as long as one run, as four and as sixteen; the best on public rows."""
    both, file = models(s.rank), RUNS / s.name / f"seed-{seed}" / "public.safetensors"
    if not file.exists():
        streams, even = Streams(hash_of("public", seed)), dict.fromkeys(sources(), 1.0)
        rows = own_rows("public", even, s.rows * min(s.sets, 60), streams, both.large)
        valid = own_rows("public", even, 4 * s.held, Streams(hash_of("valid", seed)), both.large)
        made = [tuned(both.large, rows, both.tuner, settings(k * s.steps, s.large_rate, seed))[-1] for k in (1, 4, 16)]
        best = min(made, key=lambda y: loss(both.large, both.large_start, y, valid))
        save_file({"y": best}, file)
    return load_file(file)["y"]
