"""What the study is made of: two small models, and update vectors of both after the same rows.

Two Llamas made on the spot stand for TinyLM and LLM; their rows come from conventions.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import conventions
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.collaboration.contract import Start, start_of
from luthier.collaboration.shadows import tuned
from luthier.demos.local import LARGE, SMALL, Pretraining, opened, pretrained, rendered
from luthier.inference.scoring import mean_loss, row_scores
from luthier.model.view import ModelView
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.tuners.lora import Lora

RUNS = Path("runs/studies/translation")
TOKENS = 16384  # in a forward that scores
PRETRAINING = Pretraining(steps=2000)
C2_LENGTHS = (1, 4, 16)  # runs' lengths that the model tuned on all public rows gets; the best counts


class Setting(NamedTuple):
    """One experiment."""

    name: str
    sets: int = 60  # shadow sets
    clients: int = 20
    asked: int = 8  # clients of the further tests
    further: bool = True  # left-out kind, pooling, noise
    rows: int = 384  # of a set, and of a client
    held: int = 192  # rows a client is judged on
    concentration: float = 0.1  # of the Dirichlet that clients come from
    steps: int = 40
    small_rate: float = 1e-2
    large_rate: float = 1e-2
    rank: int = 2


def named(name: str, values: list[str]) -> Setting:
    """A setting from "key=value" words."""
    s = Setting(name=name)
    for word in values:
        key, _, value = word.partition("=")
        kind = type(getattr(s, key))
        s = s._replace(**{key: value == "true" if kind is bool else kind(value)})
    return s


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
    """Made once, kept in the cache."""
    tuner = Lora(rank=rank, alpha=16.0 * rank, targets=("q_proj", "v_proj"))
    rows = conventions.school(PRETRAINING.steps * PRETRAINING.batch, Streams(0))
    small, large = (opened(pretrained(rows, shape, PRETRAINING)) for shape in (SMALL, LARGE))
    return Both(small, large, start_of(small, tuner), start_of(large, tuner), tuner)


def settings(steps: int, rate: float, seed: int) -> TrainSettings:
    return TrainSettings(
        max_steps=steps, batch_size=32, learning_rate=rate, warmup_fraction=0.0, tokens_per_forward=8192, seed=seed
    )


class Tuned(NamedTuple):
    """Update vectors of both models after the same rows, [N, L, d], and whose rows those were."""

    x: Tensor
    y: Tensor
    who: list[Any]

    def first(self, count: int) -> Tuned:
        return Tuned(self.x[:count], self.y[:count], self.who[:count])


def tune_all(s: Setting, role: str, count: int, seed: int) -> Tuned:
    """Both models on `count` sets of rows: "shadow", "client" or "left-out". Finished ones are read.

    The order of rows differs between the models: their updates share the rows' content, not a path through them.
    """
    both, folder = models(s.rank), RUNS / s.name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    xs, ys, who = [], [], []
    for i in range(count):
        streams = Streams(number_of(role, seed, i))
        mine = conventions.client(streams, s.concentration, role == "left-out")
        file = folder / f"{role}-{i}.safetensors"
        if not file.exists():
            drawn = conventions.drawn("public" if role == "shadow" else "private", mine, s.rows, streams)
            rows = rendered(drawn, both.small.tokenizer)
            x = tuned(both.small, rows, both.tuner, settings(s.steps, s.small_rate, 2 * i))
            y = tuned(both.large, rows, both.tuner, settings(s.steps, s.large_rate, 2 * i + 1))
            assert x is not None and y is not None
            save_file({"x": x, "y": y}, f"{file}.part")
            Path(f"{file}.part").rename(file)
        found = load_file(file)
        xs.append(found["x"][-1])
        ys.append(found["y"][-1])
        who.append(mine)
    return Tuned(torch.stack(xs), torch.stack(ys), who)


def number_of(*key: object) -> int:
    """A seed for a purpose."""
    return int(Streams(0).at("key", *map(str, key)).integers(2**31))


def loss(view: ModelView, start: Start, update: Tensor | None, rows: list[dict]) -> float:
    """Nats a token, with an update or without."""
    if update is None:
        return mean_loss(row_scores(view, rows, TOKENS))
    with start.update(update).bind(view):
        return mean_loss(row_scores(view, rows, TOKENS))


def client_loss(s: Setting, seed: int, i: int, clients: Tuned, update: Tensor | None, small: bool = False) -> float:
    """The loss of a client on rows of its own sort that nobody trained on."""
    both = models(s.rank)
    drawn = conventions.drawn("held", clients.who[i], s.held, Streams(number_of("held", seed, i)))
    view, start = (both.small, both.small_start) if small else (both.large, both.large_start)
    return loss(view, start, update, rendered(drawn, view.tokenizer))


def tuned_on_public(s: Setting, seed: int) -> Tensor:
    """C2: the large model on public rows of everybody, in several lengths; the best on other public rows."""
    both, file = models(s.rank), RUNS / s.name / f"seed-{seed}" / "public.safetensors"
    if not file.exists():
        rows = rendered(
            conventions.everybody("public", s.rows * s.sets, Streams(number_of("public", seed))), both.large.tokenizer
        )
        valid = rendered(
            conventions.everybody("public", 4 * s.held, Streams(number_of("valid", seed))), both.large.tokenizer
        )
        made = [tuned(both.large, rows, both.tuner, settings(k * s.steps, s.large_rate, seed)) for k in C2_LENGTHS]
        best = min((m[-1] for m in made if m is not None), key=lambda y: loss(both.large, both.large_start, y, valid))
        save_file({"y": best.contiguous()}, file)
    return load_file(file)["y"]
