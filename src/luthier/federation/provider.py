"""The provider's work before clients send updates: shadow runs, a translator, and a comparison with controls."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.collaboration.audit.tokens import distinct
from luthier.collaboration.contract import Contract, start_of
from luthier.collaboration.controls import controls, share_of_gain
from luthier.collaboration.grad_transformer import GradTransformer, pairs_of, shadow
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.data.reading import Tick, no_tick
from luthier.federation.folder import Workspace
from luthier.run.folder import RunFolder
from luthier.support import machine
from luthier.support.errors import LuthierError
from luthier.support.files import replaced, write_text
from luthier.support.progress import Lines, OnProgress, Say
from luthier.support.rng import Streams
from luthier.support.units import in_time

HELD_BACK = 0.1  # share of the shadow sets that a translator is judged on
LENGTHS = (1, 4)  # length of the run over all public rows, in lengths of a shadow run; the better run counts
SETS_MADE = "shadow  set"
PUBLIC = "C2 tuned on all public rows"  # the control that is tuned
CALIBRATING = 24  # number of shadow sets that token audits are calibrated with


class ProviderWorkspace(NamedTuple):
    """A provider's folder, with its rendered rows and their kinds."""

    workspace: Workspace
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


def open_provider(workspace: Workspace, tick: Tick = no_tick) -> ProviderWorkspace:
    """Open a provider's folder. Raises LuthierError for another protocol, or a client's copy."""
    if not isinstance(workspace.protocol, GradTransformer) or not isinstance(workspace.contract, Contract):
        raise LuthierError(
            f"{workspace.path}: {workspace.protocol.key()} has no shadow sets; only grad-transformer has them"
        )
    rows, sorts = workspace.public(tick)
    draws = workspace.protocol.draws(sorts, workspace.lab.streams)
    return ProviderWorkspace(workspace, workspace.protocol, workspace.contract, rows, draws)


# --- shadow runs ---


def make_shadows(workspace: Workspace, processes: int | None, say: Say, tick: Tick = no_tick) -> None:
    """Make all missing shadow sets. After a stop or a kill, the same call continues.

    processes  how many work at the same time; None: one for each core
    """
    provider = open_provider(workspace, tick)
    with RunFolder(workspace.path).locked():
        missing = workspace.missing_shadows(provider.protocol.sets)
        if missing:
            _make_missing(provider, missing, processes, say)
        else:
            say(f"all {provider.protocol.sets} shadow sets are made")
        if not workspace.calibration.exists():
            _calibrate(provider)


def _calibrate(provider: ProviderWorkspace) -> None:
    """Save what clients' audits compare with: updates of public rows, with the tokens of those rows."""
    numbers = range(min(CALIBRATING, provider.protocol.sets))
    updates = torch.stack([load_file(provider.workspace.shadow_file(k))["x"][-1] for k in numbers])
    provider.workspace.keep_calibration(updates, [distinct(provider.of_set(k)) for k in numbers])


def _make_missing(provider: ProviderWorkspace, missing: list[int], processes: int | None, say: Say) -> None:
    """Make the first set, to learn how long one takes; then make the others in parallel."""
    first, *others = missing
    began = time.monotonic()
    _make(provider, first)
    seconds, count = time.monotonic() - began, processes or os.cpu_count() or 1
    passes = provider.protocol.sets * provider.protocol.rows / len(provider.rows)
    say(
        f"expect  {len(others)} more sets of {provider.protocol.rows} rows, {seconds:.1f} s each here: "
        f"{in_time(seconds * len(others) / count)}  in {count} processes; all {provider.protocol.sets} sets hold as many rows "
        f"as {passes:.1f} passes over the public rows"
    )
    progress = Lines(say)
    progress(SETS_MADE, 0, len(others))
    if min(count, len(others)) > 1:
        _side_by_side(provider.workspace.path, others, min(count, len(others)), progress)
        return
    for done, number in enumerate(others, 1):
        _make(provider, number)
        progress(SETS_MADE, done, len(others))


def _make(provider: ProviderWorkspace, number: int) -> None:
    views = [provider.workspace.lab.view(r) for r in provider.protocol.roles]
    made = shadow(provider.contract, views, provider.of_set(number), number, provider.protocol.snapshots)
    provider.workspace.keep_shadow(number, made)


def _side_by_side(path: Path, numbers: Sequence[int], processes: int, progress: OnProgress) -> None:
    """Make sets in processes of their own. Raises LuthierError if one of them is killed; sets that are made stay."""
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, context, _begin, (str(path), threads)) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(_work, n) for n in numbers]), 1):
                future.result()
                progress(SETS_MADE, done, len(numbers))
        except BrokenProcessPool as error:
            raise LuthierError(
                f"{path}: a process that made shadow sets was killed, perhaps for memory; run the same command again, "
                "with fewer --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, only the sets in work are finished


_PROVIDER: list[ProviderWorkspace] = []  # of a worker process, opened once


def _begin(path: str, threads: int) -> None:
    """Start a worker: it ends with the process that started it, and ignores Ctrl-C."""
    machine.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from luthier.support.environment import quiet

    machine.prepare()
    quiet(False)
    torch.set_num_threads(threads)
    _PROVIDER.append(open_provider(Workspace(Path(path))))


def _work(number: int) -> int:
    _make(_PROVIDER[0], number)
    return number


# --- judging the translator before it is used ---


def pairs_in(provider: ProviderWorkspace) -> Pairs:
    """The pairs of all shadow runs. Raises LuthierError if some are missing."""
    return pairs_of(provider.contract, provider.workspace.shadows(provider.protocol.sets, provider.protocol.snapshots))


def judge(provider: ProviderWorkspace, say: Say, limit: int = 10) -> dict[str, Any]:
    """The gain of translations on shadow sets that the translator did not learn from, compared with every control.

    Losses are of the large model, on public rows in the shares of each set that no run was tuned on.
    """
    pairs, streams = pairs_in(provider), provider.workspace.lab.streams
    known, kept = pairs.split(1 - HELD_BACK, streams)
    last = torch.tensor([int((kept.shadow == k).nonzero().max()) for k in kept.shadow.unique()[:limit]])
    asked = kept.take(last)
    say(f"judge   on {len(asked.x)} held-out shadow sets, learning from {len(known.shadow.unique())}")
    translator = provider.protocol.translator
    made = {**controls(known, asked.x, translator, streams), PUBLIC: on_public(provider, say).expand_as(asked.y)}
    updates = {
        **dict(sorted(made.items())), "translated": translator.fit(known)(asked.x), "true update": asked.y,
    }  # fmt: skip
    losses: dict[str, list[float]] = {n: [] for n in updates}
    start = start_of(provider.workspace.lab.view("large"), provider.contract.tuner)
    for i, k in enumerate(asked.shadow.tolist()):
        rows = provider.beside(k)
        for name, y in updates.items():
            losses[name].append(provider.workspace.loss("large", start.update(y[i]), rows))
    mean = {n: float(np.mean(x)) for n, x in losses.items()}
    share = {n: share_of_gain(x, mean["C0 no update"], mean["true update"]) for n, x in mean.items()}
    found = {n: {"losses": x, "loss": mean[n], "share": share[n]} for n, x in losses.items()}
    result = {"judged": found, "sets": len(asked.x), "verdict": verdict(losses)}
    write_text(provider.workspace.path / "judged.json", json.dumps(result, indent=1))
    return result


def verdict(losses: dict[str, list[float]]) -> str:
    """The verdict in words: is a translation better than updates that need no client?"""
    mean = {n: float(np.mean(x)) for n, x in losses.items()}
    simple = ("C1 mean shadow", PUBLIC, "C5 shuffled pairs")
    best = min(simple, key=lambda n: mean[n])
    ahead = float(np.mean(np.array(losses["translated"]) < np.array(losses[best])))
    if mean["translated"] >= mean["C0 no update"]:
        return "translations are no better than no update: do not use this translator"
    if mean["translated"] >= mean[best]:
        return f"translations do not beat {best}, which needs no client: sending updates gains nothing here"
    return (
        f"translations beat {best} by {mean[best] - mean['translated']:.4f} nats a token, for {ahead:.0%} of the sets"
    )


def on_public(provider: ProviderWorkspace, say: Say) -> Tensor:
    """[L, d], C2: the large model tuned on all public rows. It is made once and kept."""
    file = provider.workspace.path / "public.safetensors"
    if not file.exists():
        say("public  the large model on all public rows, a control")
        view, c = provider.workspace.lab.view("large"), provider.contract
        order = Streams(c.settings.seed).at("public").permutation(len(provider.rows))
        held = [provider.rows[i] for i in order[: provider.protocol.rows]]
        rows = [provider.rows[i] for i in order[provider.protocol.rows :]]
        steps = c.settings.max_steps or 1 + provider.protocol.rows // c.settings.batch_size
        start, made = start_of(view, c.tuner), []
        for k in LENGTHS:
            y = tuned(view, rows, c.tuner, c.settings_of("large").model_copy(update={"max_steps": k * steps}))
            made.append(y[-1])
        best = min(made, key=lambda y: provider.workspace.loss("large", start.update(y), held))
        with replaced(file) as temporary:
            save_file({"y": best.contiguous()}, temporary)
    return load_file(file)["y"]
