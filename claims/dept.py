"""Two ways to spend 11,520 numbers in front of a frozen model."""

import time
from functools import cache

from toys import mean_nll, rows_of, shuffled

from luthier.data.rendering import Renderer
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.sft import Sft
from luthier.training.loop import Loop
from luthier.training.settings import TrainSettings
from luthier.tuners.dept import Dept

STEPS, BUDGET = 60, 20


@cache
def rendered(split, count):
    renderer = Renderer(load_tokenizer(locate(BUILTIN)), plain=True)
    picked = shuffled(0, len(rows_of("sst2", split)))[:count]
    rows = rows_of("sst2", split)
    return [
        renderer.render({"prompt": f"{rows[i]['text']}\nThis is", "completion": f" {rows[i]['label']}"}, str(i))
        for i in picked
    ]


def measure(arm, seed, say):
    own = {"length": 12, "max_length": 64} if arm == "dept" else {"length": BUDGET, "rank": 0}
    tuner = Dept(budget_length=BUDGET, seed=seed, **own)
    view = load_model(locate(BUILTIN))
    settings = TrainSettings(max_steps=STEPS, batch_size=8, seed=seed)
    loop = Loop(view, rendered("train", 1000), tuner.attach(view, None, STEPS), Sft(), settings)
    started = time.perf_counter()
    for _ in range(STEPS):
        loop.step()
    seconds = (time.perf_counter() - started) / STEPS
    with loop.trainable.phase("score"):
        return {"loss": mean_nll(view, rendered("valid", 100)), "seconds": seconds}
