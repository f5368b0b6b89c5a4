"""A chain of 32 states, learnt; then 40% of the targets are noise. What is left of the chain?"""

import torch
from toys import llama, trained

from luthier.data.batch import collate
from luthier.objectives.base import Forward
from luthier.objectives.otr import Otr
from luthier.objectives.sft import Sft
from luthier.support.rng import Streams
from luthier.tuners.full import Full

STATES, LENGTH = 32, 24


def sequences(chain, count, seed):
    generator = Streams(seed).at("chain")
    out = []
    for _ in range(count):
        at = [int(generator.integers(STATES))]
        while len(at) < LENGTH:
            at.append(int(generator.choice(STATES, p=chain[at[-1]])))
        out.append(at)
    return out


def rows(seqs, noise=0.0, seed=0):
    """Every position predicts the next state; with `noise` some targets are any state, and the inputs stay clean."""
    generator, out = Streams(seed).at("noise"), []
    for i, ids in enumerate(seqs):
        labels = [-100, *ids[1:]]
        for t in range(1, len(labels)):
            if generator.random() < noise:
                labels[t] = int(generator.integers(STATES))
        out.append({"ids": ids, "labels": labels, "key": str(i)})
    return out


@torch.no_grad()
def accuracy(view, held):
    batch = collate(held)
    logits = Forward(batch, view).logits(batch.supervised)
    return float((logits.argmax(-1) == batch.labels[batch.supervised]).float().mean())


def measure(arm, seed, say):
    chain = Streams(seed).at("transitions").dirichlet([0.08] * STATES, size=STATES)
    view = llama(STATES, 48, 2, 4, 128, seed=seed)
    trained(view, rows(sequences(chain, 250 * 16, seed + 100)), Full(), Sft(), 250, 3e-3, seed=seed)
    held = rows(sequences(chain, 200, seed + 200))
    out = {"start": accuracy(view, held)}
    objective = {"sft": Sft(), "otr": Otr(draws=256), "exact": Otr()}[arm]
    noisy = rows(sequences(chain, 32, seed + 300), noise=0.4, seed=seed)
    trained(view, noisy, Full(), objective, 200, 1e-3, batch=32, seed=seed, lr_scheduler_type="constant")
    return out | {"accuracy": accuracy(view, held)}
