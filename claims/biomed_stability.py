"""Sentiment in one word, with all blocks trained and with the upper half of them."""

import time

import numpy as np
from dept import rendered
from toys import mean_nll

from luthier.inference.scoring import Scoring
from luthier.model.loading import BUILTIN, load_model, locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.layerwise import Layerwise

STEPS = 100


def measure(arm, seed, say):
    view = load_model(locate(BUILTIN))
    tuner = Full(seed=seed) if arm == "full" else Layerwise(freeze_blocks=15, decay=1.0, seed=seed)
    settings = TrainSettings(max_steps=STEPS, batch_size=8, learning_rate=5e-5, seed=seed)
    loop = Loop(view, rendered("train", 1000), tuner.attach(view, None, STEPS), Sft(), settings)
    started = time.perf_counter()
    for _ in range(STEPS):
        loop.step()
    seconds = (time.perf_counter() - started) / STEPS
    held = rendered("test", 1214)
    right = [bool(found.all()) for _, found, _ in Scoring().choices(view, held)]
    return {"accuracy": float(np.mean(right)), "seconds": seconds, "loss": mean_nll(view, held[:300])}
