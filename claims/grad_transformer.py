"""The sheet's pair of toys: two small Llamas that know four permutations, clients with mixtures of their own."""

import numpy as np
import torch
from fedkseed import CHAINS, VOCABULARY, sequences
from safetensors.torch import load_file, save_file
from toys import llama, mean_nll, trained
from transformers import LlamaForCausalLM

from luthier.collaboration.contract import start_of
from luthier.collaboration.controls import mean_shadow, nearest_shadow
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.collaboration.translators.ridge import Ridge
from luthier.collaboration.translators.transformer import Transformer
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.rng import Streams
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora

SHADOWS, CLIENTS, SEQUENCES, HELD = 200, 40, 384, 256
TUNER = Lora(rank=2, alpha=32, targets=("q_proj", "v_proj"))
SHAPES = {"small": (32, 2, 64), "large": (64, 3, 128)}


def model(size):
    """A Llama that has read all mixtures; kept in the cache."""
    folder = cache_folder() / "claims" / key_of("permutation-pair", size, 1)
    if not folder.exists():
        generator, (width, layers, inner) = Streams(0).at("pair"), SHAPES[size]
        rows = sequences(1200 * 64, generator.dirichlet([0.5] * CHAINS, size=1200 * 64), generator)
        view = llama(VOCABULARY, width, layers, 4, inner)
        trained(view, rows, Full(), Sft(), 1200, 3e-3, batch=64, lr_scheduler_type="cosine")
        with made(folder) as temporary:
            view.module.save_pretrained(temporary)
    return ModelView.probed(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))


def settings(seed):
    return TrainSettings(
        max_steps=40, batch_size=32, learning_rate=3e-3, lr_scheduler_type="linear", warmup_fraction=0.0, seed=seed,
        tokens_per_forward=8192,
    )  # fmt: skip


def updates(seed, say):
    """(x, y, what each client is judged on) of one seed: shadow sets first, then clients; kept in the cache."""
    file = cache_folder() / "claims" / key_of("permutation-updates", seed, SHADOWS, CLIENTS, 2) / "updates.safetensors"
    generator = Streams(seed).at("pairs")
    mixtures = generator.dirichlet([0.5] * CHAINS, size=SHADOWS + CLIENTS)
    rows = [sequences(SEQUENCES, [m], generator) for m in mixtures]
    held = [sequences(HELD, [m], generator) for m in mixtures[SHADOWS:]]
    if not file.exists():
        small, large, xs, ys = model("small"), model("large"), [], []
        for i, mine in enumerate(rows):  # in other orders: they share what rows say, no path through them
            xs.append(tuned(small, mine, TUNER, settings(2 * i))[-1])
            ys.append(tuned(large, mine, TUNER, settings(2 * i + 1))[-1])
            if i % 40 == 0:
                say(f"tuned {i} of {len(rows)} sets")
        with made(file.parent) as temporary:
            save_file({"x": torch.stack(xs), "y": torch.stack(ys)}, temporary / file.name)
    found = load_file(file)
    return found["x"], found["y"], held


def made_by(arm, pairs, clients, seed):
    """Updates of the large model for these clients' small ones."""
    translators = {"ridge": Ridge(), "transformer": Transformer(width=64, layers=2, seed=seed)}
    if arm == "mean shadow":
        return mean_shadow(pairs, clients)
    if arm == "nearest shadow":
        return nearest_shadow(pairs, clients)
    name = arm.removesuffix(", shuffled")
    learnt = pairs.shuffled(Streams(seed)) if arm != name else pairs
    return translators[name].fit(learnt)(clients)


def measure(arm, seed, say):
    x, y, held = updates(seed, say)
    small, large = model("small"), model("large")
    starts = start_of(small, TUNER), start_of(large, TUNER)
    pairs = Pairs(x[:SHADOWS], y[:SHADOWS], torch.arange(SHADOWS), *(s.side.kinds() for s in starts))
    clients = x[SHADOWS:]

    def losses(view, start, updates):
        out = []
        for update, rows in zip(updates, held, strict=True):
            with start.update(update).bind(view):
                out.append(mean_nll(view, rows))
        return np.array(out)

    none = np.array([mean_nll(large, rows) for rows in held])
    true, mean = losses(large, starts[1], y[SHADOWS:]), losses(large, starts[1], mean_shadow(pairs, clients))
    found = losses(large, starts[1], made_by(arm, pairs, clients, seed))
    own = losses(small, starts[0], clients)
    return worth(none, found, true, mean, own)


def worth(untouched, loss, true, mean, own):
    """From each client's loss under an update, and under what it is compared with."""
    return {
        "untouched": float(untouched.mean()), "loss": float(loss.mean()), "true": float(true.mean()),
        "own_small": float(own.mean()), "share": float((untouched - loss).mean() / (untouched - true).mean()),
        "ahead": float((loss < mean).mean()), "over_own_small": float((own - loss).mean()),
    }  # fmt: skip
