"""Settings, rows and methods for tests of what must be equal; other processes import them as well."""

import pytest
import torch

from helpers.cloze import cloze, with_soft
from luthier.data.batch import IGNORE
from luthier.objectives.caft import Caft
from luthier.objectives.distill import Distill
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.adapter import Adapter
from luthier.tuners.dept import Dept
from luthier.tuners.frozen import Frozen
from luthier.tuners.full import Full
from luthier.tuners.green_trainer import GreenTrainer
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

# eps above the rounding of gradients: else Adam blows a gradient of 1e-9 up to a whole step.
SETTINGS = TrainSettings(max_steps=4, batch_size=8, learning_rate=1e-2, tokens_per_forward=30, adam_eps=1e-5)
CASES = {
    "lora-sft": (Lora(rank=4), Sft()),
    "full-q-tuning": (Full(), QTuning(keep_rows=0.5)),
    "lora-caft": (Lora(rank=4), Caft(allow_untrained_heads=True, weight=0.3)),
    "dept-sft": (Dept(budget_length=12, length=4, max_length=16), Sft()),
}
# Equal on two ranks where both cut their steps alike: what is chosen depends on the first forward of a window.
RANKS = {
    **CASES,
    "spiel-sft": (Spiel(density=0.05, reselect_every=3, window=1), Sft()),
    "green-sft": (GreenTrainer(flops_share=0.7, reselect_every=2), Sft()),
}
UNEVEN = {
    # A rank's rows may have no target for a head; a rank may have no row; a whole step may have nothing to learn.
    "caft-heads-short": (Frozen(), Caft(stage="heads", ahead=3)),
    "distill-idle": (Lora(rank=4), Distill(warmup_share=0.2)),
    "sft-silent": (Lora(rank=4), Sft()),
}
RANKS |= UNEVEN
RESUMED = {
    "lora": Lora(rank=4),
    "full": Full(),
    "spiel": Spiel(density=0.05, reselect_every=4, window=2),
    "spiel-ma": Spiel(density=0.05, reselect_every=4, window=2, variant="ma"),
    "green-trainer": GreenTrainer(reselect_every=4),
    "adapter": Adapter(rank=4),
    "dept": Dept(budget_length=12, length=4, max_length=16),
}

STEPS = 60  # of `to_the_end`


def rows():
    return rows_of((14, 6, 13, 15, 11, 8, 12, 9, 7, 10), answer=5)


def rows_for(name):
    """(rows, other rows by name): the last of every two steps has a single row."""
    some = rows_of((14, 6, 13, 15, 11, 8, 12, 9, 7), answer=5)
    if name == "caft-heads-short":  # half of them have one target, the second token
        return [{**r, "labels": [IGNORE, r["ids"][1], *[IGNORE] * (len(r["ids"]) - 2)]} if i % 2 else r
                for i, r in enumerate(some)], {}  # fmt: skip
    if name == "sft-silent":
        return [{**r, "labels": [IGNORE] * len(r["ids"])} if i == 8 else r for i, r in enumerate(some)], {}
    if name == "distill-idle":
        return with_soft(cloze(9, 0)), {"labelled": cloze(6, 5)}
    return rows(), {}


def trained(name, accelerator=None, **changes):
    tuner, objective = RANKS[name]
    view, (given, beside) = view_of(), rows_for(name)
    settings = SETTINGS.model_copy(update={"shuffle": name not in UNEVEN, **changes})
    trainable = tuner.attach(view, total_steps=settings.max_steps)
    loop = Loop(view, given, trainable, objective, settings, lab=Lab(beside), accelerator=accelerator)
    losses = [loop.step().get("loss") for _ in range(settings.max_steps)]
    moved = [*trainable.parameters(), *([] if loop.extra is None else loop.extra.parameters())]
    weights = {str(i): p.detach().reshape(-1).tolist() for i, p in enumerate(moved)}
    return {"losses": losses, "weights": weights, "skipped": loop.progress.skipped}


def to_the_end(name, folder):
    """Train a case in this folder, with a checkpoint after every step, from its newest checkpoint on."""
    view = view_of()
    settings = SETTINGS.model_copy(update={"max_steps": STEPS, "save_steps": 1})
    trainable = RESUMED[name].attach(view, total_steps=STEPS)
    loop = Loop(view, rows(), trainable, Sft(), settings, folder=folder)
    loop.run()
    return loop


def assert_equal(a, b):
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-5) and a["skipped"] == b["skipped"]
    for name in a["weights"]:
        torch.testing.assert_close(
            torch.tensor(a["weights"][name]), torch.tensor(b["weights"][name]), atol=1e-5, rtol=0
        )
