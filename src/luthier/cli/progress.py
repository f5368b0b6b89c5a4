"""Progress on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines
STALL = 60.0  # seconds without progress after which the place is named


class Watch:
    """Reports where the work is if nothing has moved for a minute."""

    def __init__(self, console: Console, patience: float = STALL) -> None:
        self.console, self.patience = console, patience
        self._where, self._moved, self._told = "start", time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    def at(self, where: str) -> None:
        """Note that work has moved to this place."""
        self._where, self._moved, self._told = where, time.monotonic(), False

    def _look(self) -> None:
        while not self._over.wait(self.patience / 10):
            if not self._told and time.monotonic() - self._moved > self.patience:
                self._told = True
                text = f"no progress for {self.patience:.0f} s; the last thing that started: {self._where}"
                self.console.print(text, markup=False, soft_wrap=True)


class Bar:
    """Shows the progress of one stage: step, tokens a second, loss, elapsed time, time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._terminal = (
            sys.stderr.isatty()
        )  # asked now: while a bar is drawn, rich puts an object of its own in this place
        self._progress: Progress | None = None
        self._task: Any = None
        self._last, self._stage, self._stage_began = 0.0, "", 0.0
        self._loss = math.nan
        self._watch = Watch(self.console)

    def __enter__(self) -> Bar:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def tick(self, stage: str, done: int, at: str) -> None:
        """Show progress while rows are read and rendered: how many, and the current row."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began = stage, now
        if done and now - self._last >= EVERY:
            self._last = now
            rate = done / max(now - self._stage_began, 1e-9)
            print(f"{stage}  {done:,} rows, {rate:,.0f} a second", file=sys.stderr, flush=True)
        self._watch.at(f"{stage} {at}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._watch.at(text)
        self._close()
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, entry: Mapping[str, float], progress: Any, total: int) -> None:
        """Show progress after an optimiser step, or the held-out loss after an evaluation."""
        self._watch.at(f"step {int(entry['step']) + 1}")
        if "eval_loss" in entry:
            said = f"step {int(entry['step'])}/{total}  held-out loss {entry['eval_loss']:.4f}"
            self.console.print(said, markup=False, soft_wrap=True)
            return
        rate = progress.tokens / max(progress.seconds, 1e-9)
        loss = self._loss = entry.get("loss", self._loss)  # a skipped step has no loss
        if self._terminal:
            self._draw(entry, rate, loss, total)
        elif time.monotonic() - self._last >= EVERY or entry["step"] == total:
            self._last = time.monotonic()
            left = (total - entry["step"]) * progress.seconds / max(progress.step, 1)
            print(
                f"step {int(entry['step'])}/{total}  loss {loss:.4f}  {rate:.0f} tokens/s  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        if entry["step"] == total:
            self._close()

    def _draw(self, entry: Mapping[str, float], rate: float, loss: float, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.completed:>4.0f}/{task.total:.0f}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task("", total=total, loss=loss, rate=rate)
        self._progress.update(self._task, completed=entry["step"], loss=loss, rate=rate)
