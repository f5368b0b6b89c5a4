"""Which learning rates the study takes: both models on public rows of a few made-up clients, judged on other public rows.

python docs/studies/translation/rates.py conventions
"""

from __future__ import annotations

import sys

import conventions
import torch
from made import Setting, loss, models, named, number_of, settings

from luthier.collaboration.shadows import tuned
from luthier.demos.local import rendered
from luthier.support.rng import Streams

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
CLIENTS = 4


def gains(s: Setting, rate: float) -> tuple[float, float]:
    """Nats a token that tuning saves at this rate, (small, large), on average over clients."""
    both = models(s.rank)
    saved = torch.zeros(2)
    for i in range(CLIENTS):
        streams = Streams(number_of("rates", i))
        who = conventions.client(streams, s.concentration)
        rows, held = (
            rendered(conventions.drawn("public", who, n, Streams(number_of("rates", i, part))), both.small.tokenizer)
            for part, n in (("rows", s.rows), ("held", s.held))
        )
        for side, (view, start) in enumerate(((both.small, both.small_start), (both.large, both.large_start))):
            y = tuned(view, rows, both.tuner, settings(s.steps, rate, i))
            assert y is not None
            saved[side] += loss(view, start, None, held) - loss(view, start, y[-1], held)
    small, large = (saved / CLIENTS).tolist()
    return small, large


def main() -> None:
    """Entry point."""
    s = named(sys.argv[1], sys.argv[2:])
    print("| rate | small model saves | large model saves |\n|---|---|---|")
    for rate in RATES:
        small, large = gains(s, rate)
        print(f"| {rate:g} | {small:.4f} | {large:.4f} |", flush=True)


if __name__ == "__main__":
    main()
