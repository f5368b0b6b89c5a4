"""A reader of Python source gets four heads that look further ahead, and is tuned with and without them."""

from functools import cache
from itertools import pairwise

import torch
from toys import pieces, python_reader, python_text, school_text

from luthier.data.batch import IGNORE, collate
from luthier.objectives.base import Forward
from luthier.objectives.caft import Caft, further_labels
from luthier.step.settings import TrainSettings
from luthier.training.loop import Loop
from luthier.tuners.frozen import Frozen
from luthier.tuners.full import Full

AHEAD = 5


@torch.no_grad()
def ahead(view, heads, rows):
    """[AHEAD] nats a token: the model's own loss and that of every head."""
    view.module.eval()
    look, total, n = Caft(stage="heads", ahead=AHEAD), [0.0] * AHEAD, [0] * AHEAD
    for i in range(0, len(rows), 64):
        fwd = Forward(collate(rows[i : i + 64]), view, heads)
        batch = fwd.batch
        total[0], n[0] = total[0] + float(fwd.nll().sum()), n[0] + len(batch.supervised)
        for k, block in enumerate(heads.blocks, start=1):
            labels = further_labels(batch, k)
            state = look._state(fwd, block, len(view.anatomy.blocks) - 1)
            total[k] += float(fwd.nll(state, labels).sum())
            n[k] += int((labels != IGNORE).sum())
    return [t / c for t, c in zip(total, n, strict=True)]


def loop_of(view, rows, tuner, objective, steps, rate, seed, carried=None):
    settings = TrainSettings(max_steps=steps, batch_size=16, learning_rate=rate, tokens_per_forward=8192, seed=seed)
    return Loop(view, rows, tuner.attach(view, None, steps), objective, settings, carried=carried)


@cache
def trained_heads(seed):
    """(state of the heads, losses before, losses after) of the first stage."""
    view, held = python_reader(), pieces(python_text(), 256, "held-python")
    rows = pieces(python_text(), 100 * 16, "heads", seed)
    loop = loop_of(view, rows, Frozen(), Caft(stage="heads", ahead=AHEAD), 100, 1e-3, seed)
    before = ahead(view, loop.extra, held)
    for _ in range(100):
        loop.step()
    return {n: t.clone() for n, t in loop.extra.state_dict().items()}, before, ahead(view, loop.extra, held)


def measure(arm, seed, say):
    state, before, after = trained_heads(seed)
    if arm == "heads":
        falls = [b - a for b, a in zip(before[1:], after[1:], strict=True)]
        steps = [b - a for a, b in pairwise(after)]
        return {"least": min(falls), "ordered": min(steps), **{f"ahead_{k}": x for k, x in enumerate(after)}}
    view, held = python_reader(), pieces(school_text(), 256, "held-school")
    weight = {"caft": 0.01, "caft 0.1": 0.1, "sft": 0.0}[arm]
    objective = Caft(ahead=AHEAD, weight=weight)
    rows = pieces(school_text(), 150 * 16, "school", seed)
    loop = loop_of(view, rows, Full(seed=seed), objective, 150, 1e-3, seed, carried=state)
    for _ in range(150):
        loop.step()
    found = ahead(view, loop.extra, held)
    return {"further": sum(found[1:]) / (AHEAD - 1), **{f"ahead_{k}": x for k, x in enumerate(found)}}
