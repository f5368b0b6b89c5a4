"""Four clients with one mixture of permutations; a server that only ever sees seeds and scalars."""

import numpy as np
import torch
from toys import llama, mean_nll, trained
from transformers import LlamaForCausalLM

from luthier.data.batch import collate
from luthier.model.view import ModelView, probe_layout
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.rng import Streams
from luthier.tuners.fedkseed import FedKSeed
from luthier.tuners.full import Full
from luthier.update import Seeds

VOCABULARY, LENGTH, CHAINS = 32, 24, 4
CLIENTS, SEQUENCES, BATCH, STEPS, ROUNDS, RATE = 4, 128, 16, 50, 5, 1e-3


def sequences(count, mixtures, generator):
    """x_{t+1} = one of four permutations of x_t, drawn by the row's mixture; 5% of the words are any."""
    maps = np.stack([Streams(0).at("chain", k).permutation(VOCABULARY) for k in range(CHAINS)])
    out = []
    for i in range(count):
        x = [int(generator.integers(VOCABULARY))]
        for k in generator.choice(CHAINS, size=LENGTH - 1, p=mixtures[i % len(mixtures)]):
            x.append(int(generator.integers(VOCABULARY)) if generator.random() < 0.05 else int(maps[k][x[-1]]))
        out.append({"ids": x, "labels": [-100, *x[1:]], "key": str(i), "token": {"prompt": [1] + [0] * (LENGTH - 1)}})
    return out


def base():
    """Three blocks of width 64, trained on all mixtures; kept in the cache."""
    folder = cache_folder() / "claims" / key_of("permutation-reader", 1)
    if not folder.exists():
        generator = Streams(0).at("pretrain")
        rows = sequences(1200 * 64, generator.dirichlet([0.5] * CHAINS, size=1200 * 64), generator)
        view = llama(VOCABULARY, 64, 3, 4, 128)
        trained(view, rows, Full(), Sft(), 1200, 3e-3, batch=64)
        with made(folder) as temporary:
            view.module.save_pretrained(temporary)
    view = ModelView(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    view.layout, _ = probe_layout(view)
    return view


@torch.no_grad()
def tuned_by(view, rows, tuner, signs):
    """One client's accumulated scalars after STEPS steps; with `signs`, each scalar's sign is drawn."""
    client = tuner.attach(view)
    optimizer = client.optimizer(client.groups(), lambda g: torch.optim.SGD([p for x in g for p in x.params], lr=RATE))
    order = Streams(tuner.seed).at("order")
    for _ in range(STEPS):
        batch = collate([rows[i] for i in order.permutation(len(rows))[:BATCH]])
        optimizer.step(lambda b=batch: float(Forward(b, view).nll().mean()))
        index, scalar = client.observed[-1]
        if signs is not None and signs.random() < 0.5:  # the step the other way
            client.add_noise(index, 2 * RATE * scalar)
            client.scalars[index] -= 2 * scalar
    scalars = client.scalars.clone()
    client.detach()
    return scalars, client.seeds


def measure(arm, seed, say):
    generator = Streams(seed).at("federation")
    mixture = generator.dirichlet([0.5] * CHAINS, size=1)
    clients = [sequences(SEQUENCES, mixture, generator) for _ in range(CLIENTS)]
    held, view = sequences(256, mixture, generator), base()
    signs = Streams(seed).at("signs") if arm == "random sign" else None
    losses = [mean_nll(view, held)]
    for turn in range(ROUNDS):
        uploads = []
        for i, rows in enumerate(clients):
            tuner = FedKSeed(num_seeds=16 if arm == "K 16" else 256, seed=seed * 1000 + turn * 10 + i)
            scalars, seeds = tuned_by(view, rows, tuner, signs)
            uploads.append(scalars)
        mean = torch.stack(uploads).mean(0)
        Seeds(torch.as_tensor(seeds), -RATE * mean, view.anatomy.parameters).merge_into(view.module)
        losses.append(mean_nll(view, held))
    falls = -np.diff(losses)
    return {"start": losses[0], "end": losses[-1], "fall": losses[0] - losses[-1], "least": float(falls.min())}
