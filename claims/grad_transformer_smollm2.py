"""A real language model, SmolLM2-135M, and a narrow Llama of its tokenizer that has read for minutes.

Clients answer real requests, reviews and posts; each mixes four ways of writing the answer in shares of its own, which no
prompt tells. Both models know the ways before: the provider has tuned SmolLM2 on public rows first, in all ways alike, so
that "untouched" is what can be had without any client. What updates must tell is the shares.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import numpy as np
import torch
from grad_transformer import made_by, worth
from safetensors.torch import load_file, save_file
from toys import rows_of

from luthier.collaboration.contract import start_of
from luthier.collaboration.controls import mean_shadow
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.data.rendering import Renderer
from luthier.demos.local import Pretraining, Shape, opened, pretrained
from luthier.inference.scoring import mean_loss, row_scores
from luthier.model.loading import BUILTIN
from luthier.model.view import ModelView
from luthier.step.settings import TrainSettings
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.rng import Streams
from luthier.tuners.lora import Lora

SHADOWS, CLIENTS, ROWS, HELD, STEPS, BATCH, PUBLIC = 40, 30, 480, 96, 80, 8, 150
CEILING = 10  # clients whose true update is made, too: it takes thirty times what their own does
SMALL_RATE, LARGE_RATE = 1e-2, 3e-3
SHAPE = Shape(hidden=48, layers=2, heads=4, key_value_heads=2, inner=128)
PRETRAINING = Pretraining(steps=1200, batch=32)
DESIGN = (SHADOWS, CLIENTS, CEILING, ROWS, STEPS, BATCH, SMALL_RATE, LARGE_RATE, SHAPE, PRETRAINING)
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
    rows = drawn("school", even, PRETRAINING.steps * PRETRAINING.batch, generator)
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
    return opened(pretrained(rows, SHAPE, PRETRAINING, tokenizer=large.tokenizer)), large


def rendered(rows, view):
    renderer = Renderer(view.tokenizer, plain=True)
    return [renderer.render(r, str(i)) for i, r in enumerate(rows)]


def settings(seed, rate, steps=STEPS, batch=BATCH):
    return TrainSettings(
        max_steps=steps, batch_size=batch, learning_rate=rate, warmup_fraction=0.0, seed=seed, tokens_per_forward=2048
    )


@cache
def sets(seed):
    """Rows of each shadow set and client, and those that clients are judged on."""
    generator = Streams(seed).at("sets", ROWS)
    shares = generator.dirichlet([0.3] * len(WAYS), size=SHADOWS + CLIENTS)
    large = models()[1]
    rows = [drawn("public" if i < SHADOWS else "private", s, ROWS, generator) for i, s in enumerate(shares)]
    held = [drawn("held", s, HELD, generator) for s in shares[SHADOWS:]]
    return [rendered(r, large) for r in rows], [rendered(r, large) for r in held]


def update(seed, i):
    """x, and y but of the last clients, of one set of one seed; kept in the cache."""
    key = key_of("smollm2-update", seed, i, *DESIGN)
    file = cache_folder() / "claims" / key / "update.safetensors"
    if not file.exists():
        (small, large), rows = models(), sets(seed)[0][i]
        found = {"x": tuned(small, rows, TUNER, settings(2 * i, SMALL_RATE))[-1]}
        if i < SHADOWS + CEILING:
            found["y"] = tuned(large, rows, TUNER, settings(2 * i + 1, LARGE_RATE))[-1]
        with made(file.parent) as temporary:
            save_file(found, temporary / file.name)
    return load_file(file)


def losses(view, start, given, held):
    """Mean loss of each client's rows under the update given for it; None: under none."""
    out = []
    for one, rows in zip(given, held, strict=False):
        with start.update(one).bind(view) if one is not None else nullcontext():
            out.append(mean_loss(row_scores(view, rows, 2048)))
    return np.array(out)


@cache
def known(seed, say):
    """(pairs, clients' updates, losses that no arm changes: none, true of the first, mean, own)."""
    found = []
    for i in range(SHADOWS + CLIENTS):
        found.append(update(seed, i))
        say(f"seed {seed}: tuned {i + 1} of {SHADOWS + CLIENTS} sets")
    (small, large), held = models(), sets(seed)[1]
    starts = start_of(small, TUNER), start_of(large, TUNER)
    x, y = torch.stack([f["x"] for f in found]), torch.stack([f["y"] for f in found if "y" in f])
    pairs = Pairs(x[:SHADOWS], y[:SHADOWS], torch.arange(SHADOWS), *(s.side.kinds() for s in starts))
    clients = x[SHADOWS:]
    return pairs, clients, {
        "untouched": losses(large, starts[1], [None] * CLIENTS, held),
        "true": losses(large, starts[1], y[SHADOWS:], held),
        "mean": losses(large, starts[1], mean_shadow(pairs, clients), held),
        "own": losses(small, starts[0], clients, held),
    }  # fmt: skip


def measure(arm, seed, say):
    pairs, clients, fixed = known(seed, say)
    large = models()[1]
    if arm == "mean shadow":
        loss = fixed["mean"]
    else:
        loss = losses(large, start_of(large, TUNER), made_by(arm, pairs, clients, seed), sets(seed)[1])
    first = worth(*(a[:CEILING] for a in (fixed["untouched"], loss, fixed["true"], fixed["mean"], fixed["own"])))
    return first | {"ahead": float((loss < fixed["mean"]).mean())}
