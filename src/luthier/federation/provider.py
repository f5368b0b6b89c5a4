"""The provider's work before clients send updates: shadow runs, a translator, and a comparison with controls."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.collaboration.audit.tokens import distinct
from luthier.collaboration.contract import Contract, start_of
from luthier.collaboration.controls import mean_shadow, nearest_shadow, share_of_gain
from luthier.collaboration.grad_transformer import GradTransformer, pairs_of, shadow
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.collaboration.translators.ridge import Ridge
from luthier.data.reading import Tick, no_tick
from luthier.federation.folder import Place
from luthier.run.folder import RunFolder
from luthier.support import machine
from luthier.support.errors import LuthierError
from luthier.support.files import replaced, write_text
from luthier.support.progress import Lines, Say
from luthier.support.rng import Streams
from luthier.support.units import in_time

HELD_BACK = 0.1  # share of the shadow sets that a translator is judged on
LENGTHS = (1, 4)  # length of the run over all public rows, in lengths of a shadow run; the better run counts
CALIBRATING = 24  # number of shadow sets that token audits are calibrated with


class Shop(NamedTuple):
    """A provider's folder, with its rendered rows and their kinds."""

    place: Place
    protocol: GradTransformer
    contract: Contract
    rows: Sequence[dict[str, Any]]
    draws: list[list[int]]

    def of_set(self, number: int) -> list[dict[str, Any]]:
        """The rows that a shadow set is tuned on."""
        return [self.rows[i] for i in self.draws[number][: self.protocol.rows]]

    def beside(self, number: int) -> list[dict[str, Any]]:
        """Rows in the same shares that the set was not tuned on."""
        return [self.rows[i] for i in self.draws[number][self.protocol.rows :]]


def opened(place: Place, tick: Tick = no_tick) -> Shop:
    """Open a provider's folder. Raises LuthierError for another protocol, or a client's copy."""
    if not isinstance(place.protocol, GradTransformer) or not isinstance(place.contract, Contract):
        raise LuthierError(f"{place.path}: {place.protocol.key()} has no shadow sets; only grad-transformer has them")
    rows, sorts = place.public(tick)
    draws = place.protocol.draws(sorts, place.lab.streams)
    return Shop(place, place.protocol, place.contract, rows, draws)


# --- shadow runs ---


def make_shadows(place: Place, processes: int | None, say: Say, tick: Tick = no_tick) -> None:
    """Make all missing shadow sets. After a stop or a kill, the same call continues.

    processes  how many work at the same time; None: one for each core
    """
    shop = opened(place, tick)
    with RunFolder(place.path).locked():
        missing = place.missing_shadows(shop.protocol.sets)
        if missing:
            _make_missing(shop, missing, processes, say)
        else:
            say(f"all {shop.protocol.sets} shadow sets are made")
        if not place.calibration.exists():
            _calibrate(shop)


def _calibrate(shop: Shop) -> None:
    """Save what clients' audits compare with: updates of public rows, with the tokens of those rows."""
    numbers = range(min(CALIBRATING, shop.protocol.sets))
    updates = torch.stack([load_file(shop.place.shadow_file(k))["x"][-1] for k in numbers])
    shop.place.keep_calibration(updates, [distinct(shop.of_set(k)) for k in numbers])


def _make_missing(shop: Shop, missing: list[int], processes: int | None, say: Say) -> None:
    """Make the first set, to learn how long one takes; then make the others, in parallel unless one process is asked for."""
    first, *others = missing
    began = time.monotonic()
    _make(shop, first)
    seconds, count = time.monotonic() - began, processes or os.cpu_count() or 1
    passes = shop.protocol.sets * shop.protocol.rows / len(shop.rows)
    say(
        f"expect  {len(others)} more sets of {shop.protocol.rows} rows, {seconds:.1f} s each here: "
        f"{in_time(seconds * len(others) / count)}  in {count} processes; all {shop.protocol.sets} sets hold as many rows "
        f"as {passes:.1f} passes over the public rows"
    )
    if count == 1:
        progress = Lines(say)
        for done, number in enumerate(others, 1):
            _make(shop, number)
            progress("shadow  set", done, len(others))
    elif others:
        _side_by_side(shop.place.path, others, min(count, len(others)), say)


def _make(shop: Shop, number: int) -> None:
    views = [shop.place.lab.view(r) for r in shop.protocol.roles]
    made = shadow(shop.contract, views, shop.of_set(number), number, shop.protocol.snapshots)
    shop.place.keep_shadow(number, made)


def _side_by_side(path: Path, numbers: list[int], processes: int, say: Say) -> None:
    progress = Lines(say)
    progress("shadow  set", 0, len(numbers))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin, (str(path), max(1, (os.cpu_count() or 1) // processes))) as pool:
        for done, _ in enumerate(pool.imap_unordered(_work, numbers), 1):
            progress("shadow  set", done, len(numbers))


_SHOP: list[Shop] = []  # of a worker process, opened once


def _begin(path: str, threads: int) -> None:
    """Start a worker: it ends with the process that started it, and ignores Ctrl-C."""
    machine.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from luthier.support.environment import quiet

    machine.prepare()
    quiet(False)
    torch.set_num_threads(threads)
    _SHOP.append(opened(Place(Path(path))))


def _work(number: int) -> int:
    _make(_SHOP[0], number)
    return number


# --- judging the translator before it is used ---


def pairs_in(shop: Shop) -> Pairs:
    """The pairs of all shadow runs. Raises LuthierError if some are missing."""
    return pairs_of(shop.contract, shop.place.shadows(shop.protocol.sets, shop.protocol.snapshots))


def judge(shop: Shop, say: Say, limit: int = 10) -> dict[str, Any]:
    """The gain of translations on shadow sets that the translator did not learn from, compared with every control.

    Losses are of the large model, on public rows in the shares of each set that no run was tuned on.
    """
    pairs, streams = pairs_in(shop), shop.place.lab.streams
    known, kept = pairs.split(1 - HELD_BACK, streams)
    last = torch.tensor([int((kept.shadow == k).nonzero().max()) for k in kept.shadow.unique()[:limit]])
    asked = kept.take(last)
    say(f"judge   on {len(asked.x)} held-out shadow sets, learning from {len(known.shadow.unique())}")
    updates = {
        "C0 no update": None, "C1 mean shadow": mean_shadow(known, asked.x),
        "C2 tuned on all public rows": on_public(shop, say).expand_as(asked.y),
        "C3 nearest shadow": nearest_shadow(known, asked.x), "C4 ridge": Ridge().fit(known)(asked.x),
        "C5 shuffled pairs": shop.protocol.translator.fit(known.shuffled(streams))(asked.x),
        "translated": shop.protocol.translator.fit(known)(asked.x), "true update": asked.y,
    }  # fmt: skip
    losses = {n: [] for n in updates}  # type: dict[str, list[float]]
    start = start_of(shop.place.lab.view("large"), shop.contract.tuner)
    for i, k in enumerate(asked.shadow.tolist()):
        rows = shop.beside(k)
        for name, y in updates.items():
            losses[name].append(shop.place.loss("large", None if y is None else start.update(y[i]), rows))
    found = {n: {"losses": x, "loss": float(np.mean(x))} for n, x in losses.items()}
    for f in found.values():
        f["share"] = share_of_gain(f["loss"], found["C0 no update"]["loss"], found["true update"]["loss"])  # type: ignore[arg-type]
    result = {"judged": found, "sets": len(asked.x), "verdict": verdict(losses)}
    write_text(shop.place.path / "judged.json", json.dumps(result, indent=1))
    return result


def verdict(losses: dict[str, list[float]]) -> str:
    """The verdict in words: is a translation better than updates that need no client?"""
    mean = {n: float(np.mean(x)) for n, x in losses.items()}
    simple = ("C1 mean shadow", "C2 tuned on all public rows", "C5 shuffled pairs")
    best = min(simple, key=lambda n: mean[n])
    ahead = float(np.mean(np.array(losses["translated"]) < np.array(losses[best])))
    if mean["translated"] >= mean["C0 no update"]:
        return "translations are no better than no update: do not use this translator"
    if mean["translated"] >= mean[best]:
        return f"translations do not beat {best}, which needs no client: sending updates gains nothing here"
    return (
        f"translations beat {best} by {mean[best] - mean['translated']:.4f} nats a token, for {ahead:.0%} of the sets"
    )


def on_public(shop: Shop, say: Say) -> Tensor:
    """[L, d], C2: the large model tuned on all public rows. It is made once and kept."""
    file = shop.place.path / "public.safetensors"
    if not file.exists():
        say("public  the large model on all public rows, a control")
        view, c = shop.place.lab.view("large"), shop.contract
        order = Streams(c.settings.seed).at("public").permutation(len(shop.rows))
        held = [shop.rows[i] for i in order[: shop.protocol.rows]]
        rows = [shop.rows[i] for i in order[shop.protocol.rows :]]
        steps = c.settings.max_steps or 1 + shop.protocol.rows // c.settings.batch_size
        start, made = start_of(view, c.tuner), []
        for k in LENGTHS:
            y = tuned(view, rows, c.tuner, c.settings_of("large").model_copy(update={"max_steps": k * steps}))
            made.append(y[-1])
        best = min(made, key=lambda y: shop.place.loss("large", start.update(y), held))
        with replaced(file) as temporary:
            save_file({"y": best.contiguous()}, temporary)
    return load_file(file)["y"]
