"""A step of each arm and one of prompt tuning, in turns: only such steps can be compared on a machine that others use."""

import time

import numpy as np
from dept import BUDGET, rendered

from luthier.model.loading import BUILTIN, load_model, locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.training.loop import Loop
from luthier.tuners.dept import Dept

PAIRS, WARM = 24, 2


def loop(arm, seed):
    own = {"length": 12, "max_length": 64} if arm == "dept" else {"length": BUDGET, "rank": 0}
    view, steps = load_model(locate(BUILTIN)), PAIRS + WARM
    tuner = Dept(budget_length=BUDGET, seed=seed, **own)
    settings = TrainSettings(max_steps=steps, batch_size=8, seed=seed)
    return Loop(view, rendered("train", 1000), tuner.attach(view, None, steps), Sft(), settings)


def timed(one):
    started = time.perf_counter()
    one.step()
    return time.perf_counter() - started


def measure(arm, seed, say):
    both, ratios = (loop(arm, seed), loop("prompt tuning", seed)), []
    for i in range(PAIRS + WARM):
        first = i % 2  # each goes first every other time
        seconds = {first: timed(both[first])} | {1 - first: timed(both[1 - first])}
        if i >= WARM:
            ratios.append(seconds[0] / seconds[1])
    return {"ratio": float(np.median(ratios))}
