"""FedKSeed-Pro's smaller pool, by the protocol itself: messages between a server and four clients, in one process."""

import numpy as np
from fedkseed import BATCH, CHAINS, CLIENTS, RATE, ROUNDS, SEQUENCES, STEPS, base, sequences
from toys import mean_nll

from luthier.collaboration.parties import in_process, sizes
from luthier.collaboration.seed_rounds import SeedRounds
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.tuners.fedkseed import FedKSeed

ARMS = {"Pro, K 1024": (1024, True), "plain, K 4096": (4096, False)}


def measure(arm, seed, say):
    num_seeds, pro = ARMS[arm]
    generator = Streams(seed).at("federation")
    mixture = generator.dirichlet([0.5] * CHAINS, size=1)
    rows = {f"client {i}": sequences(SEQUENCES, mixture, generator) for i in range(CLIENTS)}
    held, view = sequences(256, mixture, generator), base()
    settings = TrainSettings(
        max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant", warmup_fraction=0.0, seed=seed,
        tokens_per_forward=8192,
    )  # fmt: skip
    protocol = SeedRounds(rounds=ROUNDS, pro=pro, seed=seed)
    contract = protocol.agree([view], FedKSeed(num_seeds=num_seeds, seed_pool=seed), settings)
    server = protocol.server(contract, list(rows), None, Lab())
    parties = [protocol.client(name, contract, view, mine) for name, mine in rows.items()]
    traffic = []

    def count(sent, disclosure):
        if sent.message.header.kind != "result":
            traffic.append(sizes(sent.message)[0])

    in_process([server, *parties], server.begin(), count)
    start = mean_nll(view, held)
    with server.update().bind(view):
        end = mean_nll(view, held)
    used = int((server.scalars != 0).sum())
    return {
        "start": start,
        "fall": start - end,
        "used": used,
        "kilobytes": float(np.sum(traffic)) / CLIENTS / ROUNDS / 1000,
    }
