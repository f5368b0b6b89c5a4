"""Progress on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines


class Bar:
    """Shows one stage: step, tokens a second, loss, elapsed, left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._started, self._last, self._first = time.monotonic(), 0.0, None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self._close()
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, entry: Mapping[str, float], progress: Any, total: int) -> None:
        """After each optimiser step."""
        rate, loss = progress.tokens / max(progress.seconds, 1e-9), entry["loss"]
        if sys.stderr.isatty():
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
