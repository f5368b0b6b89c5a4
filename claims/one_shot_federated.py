"""Four clients, one round of three epochs against three of one, full tuning: rows alike, rows by topic, no schooling."""

import numpy as np
from fedkseed import CHAINS, base, sequences
from toys import llama, mean_nll

from luthier.collaboration.one_shot import AverageClient, AverageServer, OneShot, alone
from luthier.collaboration.parties import in_process
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.tuners.full import Full

CLIENTS, SEQUENCES, BATCH, EPOCHS = 4, 256, 32, 3
TOPIC = 0.85  # of a client's own permutation, where rows differ


def settings(epochs, rate):
    return TrainSettings(
        max_steps=epochs * SEQUENCES // BATCH, batch_size=BATCH, learning_rate=rate, lr_scheduler_type="linear",
        warmup_fraction=0.0, tokens_per_forward=8192,
    )  # fmt: skip


def averaged(view, clients, rounds, rate):
    """The update of so many rounds, with as much local work in all."""
    contract = OneShot(rounds=rounds).agree([view], Full(), settings(EPOCHS // rounds, rate))
    names = [str(i) for i in range(len(clients))]
    server = AverageServer(contract, names)
    parties = [AverageClient(n, contract, view, rows) for n, rows in zip(names, clients, strict=True)]
    in_process([server, *parties], server.begin(), lambda sent, disclosure: None)
    return server.update, contract


def loss(view, update, held):
    with update.bind(view):
        return mean_nll(view, held)


def measure(arm, seed, say):
    generator = Streams(seed).at("one-shot")
    schooled, alike = arm != "unschooled, alike", arm != "schooled, by topic"
    if alike:
        mixtures = [generator.dirichlet([0.5] * CHAINS)] * CLIENTS
    else:
        rest = (1 - TOPIC) / (CHAINS - 1)
        mixtures = [np.where(np.arange(CHAINS) == k, TOPIC, rest) for k in range(CLIENTS)]
    clients = [sequences(SEQUENCES, [m], generator) for m in mixtures]
    held = [r for m in mixtures for r in sequences(64, [m], generator)]
    view, rate = (base(), 1e-3) if schooled else (llama(32, 64, 3, 4, 128, seed), 3e-3)
    once, contract = averaged(view, clients, 1, rate)
    thrice, _ = averaged(view, clients, EPOCHS, rate)
    before, one, three = mean_nll(view, held), loss(view, once, held), loss(view, thrice, held)
    by_itself = float(np.mean([loss(view, alone(contract, view, rows)[0], held) for rows in clients]))
    together, _ = alone(
        contract.model_copy(update={"settings": settings(EPOCHS * CLIENTS, rate)}),
        view,
        [r for c in clients for r in c],
    )
    return {
        "before": before, "one_shot": one, "rounds": three, "alone": by_itself, "pooled": loss(view, together, held),
        "gap": (one - three) / (before - three), "gain_over_alone": by_itself - one,
    }  # fmt: skip
