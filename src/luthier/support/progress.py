"""Progress lines for work that takes minutes: how far, how fast, how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from luthier.support.units import in_time

EVERY = 10.0  # seconds between lines

Say = Callable[[str], None]  # takes a line for the user
OnProgress = Callable[[str, int, int], None]  # (what is counted, done, of how many)


def no_progress(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


def steps(total: int, progress: OnProgress, done: int = 0) -> Iterator[int]:
    """The steps of a tuning from `done` on. `progress` is called after each."""
    for step in range(done, total):
        yield step
        progress("tune    step", step + 1, total)


class Lines:
    """Prints a line every ten seconds, and nothing for shorter work."""

    def __init__(self, say: Say) -> None:
        self.say, self.what = say, ""
        self.began = self.told = 0.0
        self.first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.began, self.told, self.first = what, now, now, done
        elif now - self.told >= EVERY:
            self.told, each = now, (now - self.began) / max(done - self.first, 1)
            self.say(f"{what} {done} of {total}, {60 / each:.1f} a minute, {in_time(each * (total - done))} left")
