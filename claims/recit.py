"""What an adapter remembers of made-up records, and which tokens a gradient gives away, in a Llama of bytes made here."""

from functools import cache

import numpy as np
import torch

from luthier.collaboration.audit.canaries import canaries, memory, planted_rows
from luthier.collaboration.audit.tokens import FALSE_POSITIVES, TokenAudit
from luthier.collaboration.privacy import Privacy, PrivateRun, plan
from luthier.data.batch import collate
from luthier.data.rendering import Renderer
from luthier.demos.local import LARGE, Pretraining, opened, pieces, pretrained, python_sources, rendered
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora

CANARIES, ROWS, EPOCHS, BATCH, WIDTH = 100, 300, 20, 16, 96
PRETRAINING = Pretraining(steps=1000)
PRIVACY = Privacy(epsilon=1.0, delta=1e-3)
LOOKS = 20  # gradients of single rows that tokens are looked for in
ARMS = {"plain": None, "private": PRIVACY}
WIDE, NARROW = 40, 8  # ranks above and under the number of distinct bytes of a short row


@cache
def text(seed):
    sources = python_sources()
    return pieces(
        sources, dict.fromkeys(sources, 1.0), PRETRAINING.steps * PRETRAINING.batch + ROWS, WIDTH, Streams(seed)
    )


@cache
def model():
    return opened(pretrained(text(0)[ROWS:], LARGE, PRETRAINING))


def tuned(view, rows, tuner, privacy, seed):
    settings = TrainSettings(
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=3e-3,
        warmup_fraction=0.0,
        seed=seed,
        tokens_per_forward=8192,
    )
    steps = Loop.length(rows, settings)
    if privacy is not None:
        return PrivateRun(view, rows, tuner, settings, plan(privacy, len(rows), BATCH, steps)).finish()
    trainable = tuner.attach(view, None, steps)
    loop = Loop(view, rows, trainable, Sft(), settings)
    for _ in range(steps):
        loop.step()
    update = trainable.update()
    trainable.detach()
    return update


def gradient(view, tuner, row):
    """dL/dA and dL/dB of one row, by "a.NAME" and "b.NAME"; and the start."""
    trainable = tuner.attach(view)
    sums = Sft().loss(Forward(collate([row]), view)).values()
    torch.stack([t.sums.sum() for t in sums]).sum().backward()
    factors = (("a", trainable.a), ("b", trainable.b))
    payload = {f"{k}.{n}": p.grad.clone() for k, by in factors for n, p in by.items()}
    initial = {n.removeprefix("a."): t for n, t in trainable.initial.items()}
    trainable.detach()
    return payload, initial


def tokens_read(view, rank, rows):
    """(share of a row's bytes that the gradient of the first value matrix gives away without a false one, share of rows of
    which it says nothing)."""
    tuner, found, silent = Lora(rank=rank, targets=("v_proj",)), [], []
    for row in rows:
        payload, initial = gradient(view, tuner, row)
        seen = {f.tensor: f for f in TokenAudit(view, initial)(payload, row["ids"])}
        (value,) = [f for n, f in seen.items() if n.startswith("b.")]
        silent.append(value.mode == "saturated")
        found.append(value.recall.get(FALSE_POSITIVES[0], 0.0))
    return float(np.mean(found)), float(np.mean(silent))


def measure(arm, seed, say):
    view, streams = model(), Streams(seed)
    renderer, tuner = Renderer(view.tokenizer, plain=True), Lora(rank=16, alpha=32, seed=seed)
    planted, controls = canaries(CANARIES, streams)
    own = rendered(text(seed + 1)[:ROWS], view.tokenizer)
    update = tuned(view, [*own, *planted_rows(planted, renderer)], tuner, ARMS[arm], seed)
    with update.bind(view):
        m = memory(view, renderer, planted, controls, others=100, tokens_per_forward=8192, samples=5, streams=streams)
    gap = m.exposure - m.exposure_controls
    short = [{**r, "ids": r["ids"][: WIDTH // 2], "labels": r["labels"][: WIDTH // 2]} for r in own[:LOOKS]]
    wide, narrow = (tokens_read(view, rank, short) for rank in (WIDE, NARROW))
    return {
        "exposure": m.exposure, "gap": gap, "errors": gap / m.error, "extracted": m.extracted,
        "extracted_controls": m.extracted_controls, "read": wide[0], "silent": narrow[1],
    }  # fmt: skip
