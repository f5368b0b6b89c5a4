"""Two ways to spend 11,520 numbers in front of a frozen model."""

import time
from functools import cache

from toys import mean_nll, rows_of, shuffled

from luthier.data.rendering import Renderer
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.training.loop import Loop
from luthier.tuners.dept import Dept

STEPS, SEARCH, BUDGET = 150, 75, 20
RATES = [1e-3, 1e-2, 1e-1]  # of the vectors, in both arms; the offsets keep dept's default


@cache
def rendered(split, count):
    renderer = Renderer(load_tokenizer(locate(BUILTIN)), plain=True)
    picked = shuffled(0, len(rows_of("sst2", split)))[:count]
    rows = rows_of("sst2", split)
    return [
        renderer.render({"prompt": f"{rows[i]['text']}\nThis is", "completion": f" {rows[i]['label']}"}, str(i))
        for i in picked
    ]


def trained(arm, seed, rate, steps):
    """The model with its prompt still attached, and the seconds of a step."""
    own = {"length": 12, "max_length": 64} if arm == "dept" else {"length": BUDGET, "rank": 0}
    tuner = Dept(budget_length=BUDGET, seed=seed, prompt_learning_rate=rate, **own)
    view = load_model(locate(BUILTIN))
    settings = TrainSettings(max_steps=steps, batch_size=8, seed=seed)
    loop = Loop(view, rendered("train", 1000), tuner.attach(view, None, steps), Sft(), settings)
    started = time.perf_counter()
    for _ in range(steps):
        loop.step()
    return view, loop.trainable, (time.perf_counter() - started) / steps


def loss(view, trainable, rows):
    with trainable.phase("score"):
        return mean_nll(view, rows)


@cache
def searched(arm):
    """The best of three rates after half of the steps, on training rows that no run sees."""
    found = {}
    for rate in RATES:
        view, trainable, _ = trained(arm, 100, rate, SEARCH)
        found[rate] = loss(view, trainable, rendered("train", 1300)[1000:])
    return min(found, key=found.get)


def measure(arm, seed, say):
    rate = searched(arm)
    view, trainable, seconds = trained(arm, seed, rate, STEPS)
    held = loss(view, trainable, rendered("valid", 300))
    return {"loss": held, "seconds": seconds, "rate": rate}
