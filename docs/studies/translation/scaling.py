"""What more shadow sets buy, from the runs that `experiment.py` left: ridge learnt from a part of them, at several strengths.

python docs/studies/translation/scaling.py conventions
python docs/studies/translation/scaling.py conventions sets=240 --seeds 2   # four times as many; hours
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from experiment import shares
from made import RUNS, Setting, client_loss, models, named, tune_all
from torch import Tensor

from luthier.collaboration.controls import mean_shadow
from luthier.collaboration.translators.base import Pairs
from luthier.collaboration.translators.ridge import Ridge

PARTS = (0.25, 0.5, 1.0)  # of the shadow sets
STRENGTHS = (0.03, 0.1, 0.3, 1.0)
Losses = dict[str, list[float]]


def of_seed(s: Setting, seed: int, threads: int) -> Losses:
    """Loss of every client, by how much was learnt from and how; kept in a file once made."""
    file = RUNS / s.name / f"seed-{seed}" / f"scaling-{s.sets}.json"
    if file.exists():
        found: Losses = json.loads(file.read_text())
        return found
    torch.set_num_threads(threads)
    both = models(s.rank)
    shadows, clients = tune_all(s, "shadow", s.sets, seed), tune_all(s, "client", s.clients, seed)
    kinds = both.small_start.side.kinds(), both.large_start.side.kinds()
    pairs = Pairs(shadows.x, shadows.y, torch.arange(s.sets), *kinds)
    made: dict[str, Tensor | None] = {"untouched": None, "true update": clients.y}
    for part in PARTS:
        some = pairs.take(torch.arange(round(part * s.sets)))
        made[f"mean of {len(some.x)}"] = mean_shadow(some, clients.x)
        for strength in STRENGTHS:
            made[f"ridge {strength:g}, {len(some.x)} sets"] = Ridge(strength=strength).fit(some)(clients.x)
    out = {
        n: [client_loss(s, seed, i, clients, None if y is None else y[i]) for i in range(s.clients)]
        for n, y in made.items()
    }
    file.write_text(json.dumps(out))
    return out


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What do more shadow sets buy?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("name", help="Of a setting that experiment.py has run.")
    parser.add_argument("values", nargs="*", help="Of the setting: sets=240 makes those that are missing.")
    asked = parser.parse_args()
    s = named(asked.name, asked.values)
    models(s.rank)
    with ProcessPoolExecutor(asked.processes, multiprocessing.get_context("spawn")) as pool:
        threads = max(1, (os.cpu_count() or 1) // asked.processes)
        found = [p.result() for p in [pool.submit(of_seed, s, seed, threads) for seed in range(asked.seeds)]]
    print("| update of the large model | share of the true gain |\n|---|---|")
    for name, e in shares(found).items():
        print(f"| {name} | {e.value:.2f} ({e.low:.2f} to {e.high:.2f}) |")


if __name__ == "__main__":
    main()
