"""Six digits, a separator, their running sums mod 7: what does a wrong sum in the prefix do to the next one?"""

import torch
from toys import llama, trained

from luthier.data.batch import collate
from luthier.objectives.base import Forward
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.sft import Sft
from luthier.support.rng import Streams
from luthier.tuners.full import Full

# 0 to 2 are the model's own (begin, end, pad); digits and sums 3 to 9; the separator 10.
FIRST, MOD, SEPARATOR, COUNT = 3, 7, 10, 6


def rows(count, purpose, seed, wrong=0.0):
    """`wrong`: share of the sums in the input that are replaced by random ones; targets stay right."""
    generator, out = Streams(seed).at(purpose), []
    for i in range(count):
        digits = generator.integers(MOD, size=COUNT)
        sums = digits.cumsum() % MOD
        shown = [int(generator.integers(MOD)) if generator.random() < wrong else int(s) for s in sums]
        ids = [*(FIRST + int(d) for d in digits), SEPARATOR, *(FIRST + s for s in shown)]
        labels = [-100] * (COUNT + 1) + [FIRST + int(s) for s in sums]
        out.append(
            {
                "ids": ids,
                "labels": labels,
                "key": f"{purpose}:{i}",
                "token": {"prompt": [1] * (COUNT + 1) + [0] * COUNT},
            }
        )
    return out


@torch.no_grad()
def accuracy(view, held):
    view.module.eval()
    batch = collate(held)
    logits = Forward(batch, view).logits(batch.supervised)
    return float((logits.argmax(-1) == batch.labels[batch.supervised]).float().mean())


def measure(arm, seed, say):
    view = llama(11, 64, 2, 4, 172, seed=seed)
    objective = {
        "sft": Sft(),
        "random": MaskedThought(max_rate=0.4, seed=seed),
        "mask": MaskedThought(max_rate=0.4, random_share=0.0, seed=seed),
    }[arm]
    plain = {"lr_scheduler_type": "constant"}  # as a bare AdamW loop would
    trained(view, rows(900 * 64, "train", seed), Full(), objective, 900, 1e-3, batch=64, seed=seed, **plain)
    return {
        "corrupted": accuracy(view, rows(500, "test", 1000 + seed, wrong=0.25)),
        "clean": accuracy(view, rows(500, "test", 1000 + seed)),
    }
