"""Long texts with few tokens in attention: does it matter which blocks of them stay?"""

from collections.abc import Iterator
from functools import cache
from itertools import count

import torch
from pydantic import PrivateAttr
from toys import mean_nll, rows_of

from luthier.compute.lemo import Lemo, tokens_of
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora

LENGTH, STEPS, BATCH, KEEP = 2048, 30, 2, 0.4


class RandomBlocks(Lemo):
    """As many blocks, drawn; the first stays as it does there. For this experiment only."""

    seed: int = 0
    """Seed of the draws."""
    _calls: Iterator[int] = PrivateAttr(default_factory=count)

    def choose(self, view, parts, hidden, lengths, keep):
        drawn, kept, start = Streams(self.seed).at("blocks", next(self._calls)), [], 0
        for length in lengths:
            n = -(-length // self.block_size)
            some = 1 + drawn.permutation(n - 1)[: max(1, int(n * keep)) - 1]
            blocks = torch.tensor(sorted([0, *some.tolist()]), device=hidden.device)
            kept.append(tokens_of(blocks, self.block_size, length) + start)
            start += length
        return torch.cat(kept), tuple(len(k) for k in kept)


@cache
def texts(split):
    """Articles end to end, cut into pieces of LENGTH tokens."""
    tokenizer = load_tokenizer(locate(BUILTIN))
    ids = [i for part in tokenizer([r["text"] for r in rows_of("wikitext2", split)])["input_ids"] for i in part]
    return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]


def rows(pieces, key):
    token = {"prompt": [1] + [0] * (LENGTH - 1)}
    return [{"ids": p, "labels": [-100, *p[1:]], "key": f"{key}:{i}", "token": token} for i, p in enumerate(pieces)]


def measure(arm, seed, say):
    view, pieces = load_model(locate(BUILTIN)), texts("train")
    drawn = Streams(seed).at("pieces").permutation(len(pieces))[: STEPS * BATCH]
    keys = {"keep_fraction": KEEP, "block_size": 16}
    compute = {"dense": None, "lemo": Lemo(**keys), "random blocks": RandomBlocks(**keys, seed=seed)}[arm]
    settings = TrainSettings(
        max_steps=STEPS, batch_size=BATCH, learning_rate=5e-4, tokens_per_forward=LENGTH, seed=seed
    )
    train = rows([pieces[i] for i in drawn.tolist()], "train")
    loop = Loop(
        view, train, Lora(rank=16, alpha=32, seed=seed).attach(view, None, STEPS), Sft(), settings, compute=compute
    )
    held = rows(texts("test")[:16], "test")
    before = mean_nll(view, held)
    for _ in range(STEPS):
        loop.step()
    return {"before": before, "loss": mean_nll(view, held)}
