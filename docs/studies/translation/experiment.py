"""Is a translated update worth more than what the provider could make without it? Clients, controls, three further tests.

python docs/studies/translation/experiment.py conventions           # two cores; goes on where it was
python docs/studies/translation/experiment.py try --seeds 1 sets=20 clients=8 further=false
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from conventions import leans
from made import RUNS, Setting, Tuned, client_loss, models, named, tune_all, tuned_on_public
from torch import Tensor

from luthier.collaboration.controls import mean_shadow, nearest_shadow, pooled
from luthier.collaboration.similarity import mean_cosine
from luthier.collaboration.translators.base import Pairs, Translator
from luthier.collaboration.translators.ridge import Ridge
from luthier.collaboration.translators.transformer import Transformer
from luthier.support.rng import Streams
from luthier.support.statistics import Estimate, estimate

GROUP = 4  # clients that pool their updates
NOISE = (0.5, 1.0, 2.0)  # norm, in units of the update's own
Losses = dict[str, list[float]]
Made = Callable[[Tensor, Tensor], Tensor]


def translators(seed: int) -> dict[str, Translator]:
    return {"ridge": Ridge(), "transformer": Transformer(width=64, layers=2, seed=seed)}


def judged(s: Setting, seed: int, updates: dict[str, Tensor | None], clients: Tuned) -> Losses:
    """Loss of every client under every update [N, L, d] of the large model, on rows that nobody trained on."""
    return {
        name: [client_loss(s, seed, i, clients, None if y is None else y[i]) for i in range(len(clients.x))]
        for name, y in updates.items()
    }


def beside_controls(s: Setting, seed: int, pairs: Pairs, clients: Tuned) -> Losses:
    """The main test: held-out clients under the translators, every control and the true update."""
    made = {"untouched": None, "true update": clients.y, "C1 mean shadow": mean_shadow(pairs, clients.x)}
    made["C2 tuned on all public rows"] = tuned_on_public(s, seed).expand_as(clients.y)
    made["C3 nearest shadow"] = nearest_shadow(pairs, clients.x)
    for name, translator in translators(seed).items():
        made[f"C5 shuffled pairs, {name}"] = translator.fit(pairs.shuffled(Streams(seed)))(clients.x)
        made[name] = translator.fit(pairs)(clients.x)  # ridge is C4
    own = [client_loss(s, seed, i, clients, x, small=True) for i, x in enumerate(clients.x)]
    return judged(s, seed, made, clients) | {"own small model": own}


def kind_missing(s: Setting, seed: int, pairs: Pairs, shadows: Tuned, clients: Tuned) -> dict[str, Losses]:
    """No shadow set leans to one kind: what becomes of the clients of that kind, and of the others? As many sets, drawn at
    random, are left out for comparison."""
    leaning = torch.tensor([leans(w) for w in shadows.who])
    order = torch.from_numpy(Streams(seed).at("left-out").permutation(s.sets))
    as_many = torch.zeros(s.sets, dtype=torch.bool).index_fill(0, order[: int(leaning.sum())], True)
    out = {}
    of_kind = tune_all(s, "left-out", s.asked, seed)
    for who, asked in (("clients of that kind", of_kind), ("other clients", clients.first(s.asked))):
        made: dict[str, Tensor | None] = {"untouched": None, "true update": asked.y}
        for left_out, without in (("that kind", leaning), ("as many others", as_many)):
            kept = pairs.take(~without)
            made[f"C1, without {left_out}"] = mean_shadow(kept, asked.x)
            for name, translator in translators(seed).items():
                made[f"{name}, without {left_out}"] = translator.fit(kept)(asked.x)
        out[who] = judged(s, seed, made, asked)
    return out


def pooling(s: Setting, seed: int, pairs: Pairs, clients: Tuned) -> dict:
    """Groups of different clients share one update: pooled before translating, or after."""
    groups = [range(a, b) for a, b in pairwise(range(0, len(clients.x) + 1, GROUP))]

    def spread(made: Made) -> Tensor:
        """One update a group, given to all of it."""
        of_group = [made(clients.x[list(g)], clients.y[list(g)]) for g in groups]
        return torch.cat([y.expand(GROUP, *y.shape[1:]) for y in of_group])

    made: dict[str, Tensor | None] = {"untouched": None, "true update": clients.y}
    made["mean of the true updates"] = spread(lambda x, y: _mean(y)[None])
    for name, translator in translators(seed).items():
        fitted = translator.fit(pairs)
        made[f"{name}, mean before"] = spread(lambda x, y, f=fitted: f(_mean(x)[None]))
        made[f"{name}, mean after"] = spread(lambda x, y, f=fitted: _mean(f(x))[None])
        made[f"{name}, sum before"] = spread(lambda x, y, f=fitted: f(x.sum(0, keepdim=True)))
    return {"cosine": [mean_cosine(clients.x[list(g)]) for g in groups], "losses": judged(s, seed, made, clients)}


def _mean(updates: Tensor) -> Tensor:
    return pooled({str(i): u for i, u in enumerate(updates)})


def noise(s: Setting, seed: int, pairs: Pairs, clients: Tuned) -> Losses:
    """Noise on what clients send, with translators that learnt from clean and from equally noisy shadows."""
    asked = clients.first(s.asked)
    made: dict[str, Tensor | None] = {"untouched": None, "true update": asked.y}
    for level in NOISE:
        noisy = noised(asked.x, level, Streams(seed), "client")
        alike = pairs._replace(x=noised(pairs.x, level, Streams(seed), "shadow"))
        for name, translator in translators(seed).items():
            made[f"{name}, {level:g}, learnt clean"] = translator.fit(pairs)(noisy)
            made[f"{name}, {level:g}, learnt noisy"] = translator.fit(alike)(noisy)
    return judged(s, seed, made, asked)


def noised(x: Tensor, level: float, streams: Streams, who: str) -> Tensor:
    """Gaussian, of `level` times each update's own norm (in expectation)."""
    drawn = torch.randn(x.shape, generator=streams.torch("noise", who, str(level)))
    return x + level * x.flatten(1).norm(dim=1)[:, None, None] / x[0].numel() ** 0.5 * drawn


def one_seed(s: Setting, seed: int, threads: int) -> dict:
    """All tests of one seed; each is kept in a file as soon as it is done."""
    torch.set_num_threads(threads)
    shadows, clients = tune_all(s, "shadow", s.sets, seed), tune_all(s, "client", s.clients, seed)
    both = models(s.rank)
    kinds = both.small_start.side.kinds(), both.large_start.side.kinds()
    pairs = Pairs(shadows.x, shadows.y, torch.arange(s.sets), *kinds)
    tests = {"main": lambda: beside_controls(s, seed, pairs, clients)}
    if s.further:
        tests["missing"] = lambda: kind_missing(s, seed, pairs, shadows, clients)
        tests["pooling"] = lambda: pooling(s, seed, pairs, clients)
        tests["noise"] = lambda: noise(s, seed, pairs, clients)
    out = {}
    for name, test in tests.items():
        file = RUNS / s.name / f"seed-{seed}" / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(test()))
        out[name] = json.loads(file.read_text())
    return out


# --- what came out ---


def shares(found: list[Losses]) -> dict[str, Estimate]:
    """Each update's share of the true update's gain: one number a seed (a mean over its clients), and their interval."""
    out = {}
    for name in found[0]:
        mean = np.array([[np.mean(f[n]) for n in ("untouched", name, "true update")] for f in found])
        out[name] = estimate(((mean[:, 0] - mean[:, 1]) / (mean[:, 0] - mean[:, 2]))[:, None])
    return out


def better(found: list[Losses], name: str, than: str) -> tuple[Estimate, float]:
    """(nats saved against another update, share of clients that are better off)."""
    gain = [np.array(f[than]) - np.array(f[name]) for f in found]
    return estimate(np.array([g.mean() for g in gain])[:, None]), float(np.mean([(g > 0).mean() for g in gain]))


def table(title: str, found: list[Losses], against: tuple[str, ...] = ()) -> str:
    """A row an update: loss, share of the true gain, and what it saves against controls."""
    head = ["update of the large model", "loss", "share of the true gain", *(f"saves against {a}" for a in against)]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    by_share = shares(found)
    for name in found[0]:
        loss = np.mean([np.mean(f[name]) for f in found])
        cells = [name, f"{loss:.4f}", _range(by_share[name])]
        for a in against:
            gain, share = better(found, name, a)
            cells.append("" if a == name else f"{_range(gain, 4)}, {share:.0%} of clients")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _range(e: Estimate, digits: int = 2) -> str:
    return f"{e.value:.{digits}f} ({e.low:.{digits}f} to {e.high:.{digits}f})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Is a translated update worth it?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("name", help="Of the setting; its runs go there.")
    parser.add_argument("values", nargs="*", help="Of the setting: sets=20.")
    asked = parser.parse_args()
    s = named(asked.name, asked.values)
    Path(RUNS / s.name).mkdir(parents=True, exist_ok=True)
    models(s.rank)  # made once, before processes ask for them
    with ProcessPoolExecutor(asked.processes, multiprocessing.get_context("spawn")) as pool:
        parts = [
            pool.submit(one_seed, s, seed, max(1, (os.cpu_count() or 1) // asked.processes))
            for seed in range(asked.seeds)
        ]
        found = [p.result() for p in parts]
    print(
        table(
            s.name, [f["main"] for f in found], ("C1 mean shadow", "C2 tuned on all public rows", "C3 nearest shadow")
        )
    )
    if s.further:
        for who in ("clients of that kind", "other clients"):
            print(table(f"one kind left out of the shadows: {who}", [f["missing"][who] for f in found]))
        print(table("pooled over four clients", [f["pooling"]["losses"] for f in found]))
        print(f"Mean cosine in a group: {np.mean([f['pooling']['cosine'] for f in found]):.2f}\n")
        print(table("noise on the clients' updates", [f["noise"] for f in found]))


if __name__ == "__main__":
    main()
