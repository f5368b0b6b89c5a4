"""What more shadow sets buy, from the runs that `experiment.py` left: ridge learnt from a part of them, at several strengths.

python docs/studies/translation/scaling.py conventions
"""

from __future__ import annotations

import json
import sys

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


def of_seed(s: Setting, seed: int) -> Losses:
    """Loss of every client, by how much was learnt from and how; kept in a file once made."""
    file = RUNS / s.name / f"seed-{seed}" / f"scaling-{s.sets}.json"
    if file.exists():
        found: Losses = json.loads(file.read_text())
        return found
    both = models(s.world, s.rank)
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
    s = named(sys.argv[1], sys.argv[2:])
    seeds = sorted(int(p.name.removeprefix("seed-")) for p in (RUNS / s.name).glob("seed-*"))
    found = [of_seed(s, seed) for seed in seeds]
    print("| update of the large model | share of the true gain |\n|---|---|")
    for name, e in shares(found).items():
        print(f"| {name} | {e.value:.2f} ({e.low:.2f} to {e.high:.2f}) |")


if __name__ == "__main__":
    main()
