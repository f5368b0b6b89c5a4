"""A real language model, SmolLM2-135M, and a narrow Llama of its tokenizer that has read for minutes.

Clients answer real requests, reviews and posts; each mixes four ways of writing the answer in shares of its own, which no
prompt tells. Both models know the ways before: the provider has tuned SmolLM2 on public rows first, in all ways alike, so
that "untouched" is what can be had without any client. What updates must tell is the shares.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from grad_transformer import made_by, worth
from safetensors.torch import load_file, save_file
from toys import rows_of

from luthier.cache import cache_folder, key_of, made
from luthier.collaboration.contract import start_of
from luthier.collaboration.controls import mean_shadow
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.data.rendering import Renderer
from luthier.model.loading import BUILTIN
from luthier.model.local import Schooling, Shape, opened, schooled
from luthier.model.view import ModelView
from luthier.rng import Streams
from luthier.scorer import mean_loss, row_scores
from luthier.training.settings import TrainSettings
from luthier.tuners.lora import Lora

SHADOWS, CLIENTS, ROWS, HELD, STEPS, BATCH, PUBLIC = 40, 10, 240, 64, 40, 8, 150
SMALL_RATE, LARGE_RATE = 1e-2, 3e-3
SHAPE = Shape(hidden=48, layers=2, heads=4, key_value_heads=2, inner=128)
SCHOOLING = Schooling(steps=1200, batch=32)
TUNER = Lora(rank=2, alpha=32, targets=("q_proj", "v_proj"))
WAYS = ("label: {}", "[{}]", "=> {}.", '"{}" !')
WIDTH = 72  # characters of a prompt
STRETCHES = {"school": (0.0, 0.4), "public": (0.4, 0.7), "private": (0.7, 0.9), "held": (0.9, 1.0)}


@cache
def asked() -> list[list[tuple[str, str]]]:
    """(text, what is to be said of it) of each source."""
    return [
        [(r["text"], f"{r['label']} review") for r in rows_of("sst2", "train")],
        [(r["text"], r["intent"]) for r in rows_of("snips", "train")],
        [(r["text"], f"{r['label']} post") for r in rows_of("tweet_offensive", "train")],
    ]


def drawn(stretch: str, shares: np.ndarray, count: int, generator: np.random.Generator) -> list[dict]:
    """Rows of real texts, answered in these shares of the ways; no stretch shares a text with another."""
    low, high = STRETCHES[stretch]
    out = []
    for _ in range(count):
        source = asked()[generator.integers(len(asked()))]
        text, word = source[int(generator.integers(int(low * len(source)), int(high * len(source))))]
        out.append(
            {"prompt": f"{text[:WIDTH]}\n", "completion": WAYS[generator.choice(len(WAYS), p=shares)].format(word)}
        )
    return out


@cache
def models():
    """(small, large)."""
    raw = opened(BUILTIN)
    even, generator = np.full(len(WAYS), 1 / len(WAYS)), Streams(0).at("school")
    rows = drawn("school", even, SCHOOLING.steps * SCHOOLING.batch, generator)
    file = (
        cache_folder()
        / "claims"
        / key_of("smollm2-ways", raw.base.weights, PUBLIC, LARGE_RATE, 1)
        / "update.safetensors"
    )
    if not file.exists():
        y = tuned(raw, rendered(rows, raw), TUNER, settings(0, LARGE_RATE, PUBLIC, 16))[-1]
        with made(file.parent) as temporary:
            save_file({"y": y}, temporary / file.name)
    start_of(raw, TUNER).update(load_file(file)["y"]).merge_into(raw.module)
    large = ModelView(raw.module, raw.tokenizer, name="SmolLM2-135M that has seen public rows")
    return opened(schooled(rows, SHAPE, SCHOOLING, tokenizer=large.tokenizer)), large


def rendered(rows, view):
    renderer = Renderer(view.tokenizer, plain=True)
    return [renderer.render(r, str(i)) for i, r in enumerate(rows)]


def settings(seed, rate, steps=STEPS, batch=BATCH):
    return TrainSettings(
        max_steps=steps, batch_size=batch, learning_rate=rate, warmup_fraction=0.0, seed=seed, tokens_per_forward=2048
    )


def sets(seed):
    """Rows of each shadow set, of each client, and those that clients are judged on."""
    generator = Streams(seed).at("sets")
    shares = generator.dirichlet([0.3] * len(WAYS), size=SHADOWS + CLIENTS)
    large = models()[1]
    rows = [drawn("public" if i < SHADOWS else "private", s, ROWS, generator) for i, s in enumerate(shares)]
    held = [drawn("held", s, HELD, generator) for s in shares[SHADOWS:]]
    return [rendered(r, large) for r in rows], [rendered(r, large) for r in held]


def updates(seed, say):
    """x and y of one seed: shadow sets first, then clients; kept in the cache."""
    key = key_of(
        "smollm2-updates", seed, SHADOWS, CLIENTS, ROWS, STEPS, BATCH, SMALL_RATE, LARGE_RATE, SHAPE, SCHOOLING, 1
    )
    file = cache_folder() / "claims" / key / "updates.safetensors"
    if not file.exists():
        (small, large), xs, ys = models(), [], []
        rows = sets(seed)[0]
        for i, mine in enumerate(rows):
            xs.append(tuned(small, mine, TUNER, settings(2 * i, SMALL_RATE))[-1])
            ys.append(tuned(large, mine, TUNER, settings(2 * i + 1, LARGE_RATE))[-1])
            say(f"seed {seed}: tuned {i + 1} of {len(rows)} sets")
        with made(file.parent) as temporary:
            save_file({"x": torch.stack(xs), "y": torch.stack(ys)}, temporary / file.name)
    return load_file(file)


def measure(arm, seed, say):
    found, (small, large) = updates(seed, say), models()
    held, x, y = sets(seed)[1], found["x"], found["y"]
    starts = start_of(small, TUNER), start_of(large, TUNER)
    pairs = Pairs(x[:SHADOWS], y[:SHADOWS], torch.arange(SHADOWS), *(s.side.kinds() for s in starts))
    clients = x[SHADOWS:]

    def losses(view, start, given):
        out = []
        for update, rows in zip(given, held, strict=True):
            with start.update(update).bind(view):
                out.append(mean_loss(row_scores(view, rows, 2048, "causal-lm")))
        return np.array(out)

    loss, true = losses(large, starts[1], made_by(arm, pairs, clients, seed)), losses(large, starts[1], y[SHADOWS:])
    mean = losses(large, starts[1], mean_shadow(pairs, clients))
    none = np.array([mean_loss(row_scores(large, rows, 2048, "causal-lm")) for rows in held])
    own = losses(small, starts[0], clients)
    return worth(none, loss, true, mean, own)
