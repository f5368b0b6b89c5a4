"""The services that a method may use. The entry point of every kind gets this one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from luthier.data import store
from luthier.data.batch import Batch, collate
from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.kernels.head import TokenScores
from luthier.model.view import ModelView
from luthier.step.outcome import Outcome, RenderedRows
from luthier.support import sandbox
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams

LIMITS = sandbox.Limits()
T = TypeVar("T")
Pair = tuple[Sequence[int], Sequence[int]]


class RowScore(NamedTuple):
    """The score of one row: summed loss in nats, over how many tokens (1 for a class). For some tasks also the most likely
    class or tokens, and the right ones."""

    total: float
    over: float
    best: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()


class Completion(NamedTuple):
    """An answer, whether the model ended it by itself, its length in tokens, and the thought that the model wrote before it."""

    text: str
    stopped: bool
    tokens: int
    thought: str = ""

    def up_to(self, stops: Iterable[str]) -> Completion:
        """The answer before the first of these texts in it, which end it; the whole answer if it holds none."""
        places = [self.text.index(s) for s in stops if s and s in self.text]
        return self._replace(text=self.text[: min(places)], stopped=True) if places else self


class Continuation(NamedTuple):
    """One continuation of a text: its loss in nats, and whether each of its tokens is the most likely one."""

    total: float
    greedy: bool


class Choices(NamedTuple):
    """For each supervised token of a row (or for its class): the highest probability, whether the most likely choice is right,
    and the right choice.
    """

    confidence: np.ndarray  # [n] float64
    right: np.ndarray  # [n] float64, 0 or 1
    wanted: np.ndarray  # [n] int64


class Scorer(Protocol):
    """Scores rendered rows with a frozen model, batch by batch, in their order."""

    def losses(self, view: ModelView, rows: RenderedRows) -> Iterator[RowScore]:
        """The loss of each row."""

    def tokens(self, view: ModelView, rows: RenderedRows) -> Iterator[TokenScores]:
        """For each row, loss and entropy of its supervised tokens, [n] float32 nats each."""

    def choices(self, view: ModelView, rows: RenderedRows) -> Iterator[Choices]:
        """For each row, the most likely tokens or class."""

    def continuations(self, view: ModelView, pairs: Sequence[Pair]) -> list[Continuation]:
        """For each pair of token ids (text before, continuation), the score of the continuation."""


class Generator(Protocol):
    """Answers tokenised prompts, in their order."""

    def __call__(self, view: ModelView, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]: ...


class Nested(NamedTuple):
    """One nested run: this run's recipe without its pipeline, curators and trackers, with these keys changed.

    changes  keys of a recipe, nested as there: {"data": {"limit": 100}, "max_steps": 20}
    rows     rows to train on, as they came from files or curators; None: those of the recipe
    keep     True: its update is wanted, not only its measures
    """

    changes: Mapping[str, Any]
    rows: store.Rows | None = None
    keep: bool = False


class Runs(Protocol):
    """Carries out nested runs. A run with equal recipe, rows and code is read from disk, not repeated."""

    def __call__(self, runs: Sequence[Nested]) -> list[Outcome]: ...


@dataclass
class Ledger:
    """The costs of work besides training: FLOPs and seconds by stage."""

    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def charge(self, stage: str, flops: float = 0.0, seconds: float = 0.0) -> None:
        """Add a cost to a stage."""
        self.flops[stage] = self.flops.get(stage, 0.0) + flops
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measuring(self, stage: str, *views: ModelView) -> Iterator[None]:
        """Charge the time inside the block, and the FLOPs of these models."""
        before, started = sum(v.meter.total for v in views), time.perf_counter()
        with _watching(views, stage):
            yield
        self.charge(stage, sum(v.meter.total for v in views) - before, time.perf_counter() - started)


@contextmanager
def _watching(views: Sequence[ModelView], stage: str) -> Iterator[None]:
    if not views:
        yield
        return
    first, *rest = views
    with first.meter.watching(first.module), first.meter.stage(stage), _watching(rest, stage):
        yield


@dataclass
class Lab:
    """The services of a run. If a run does not have a service, asking for it raises an error with its name.

    sets       rendered rows by name: "train", "labelled", "unlabelled"
    seed       for all keyed draws
    models     by role; each is loaded at its first use; "base" is the base model
    done       what earlier stages of a pipeline left, by name
    ledger     costs of work besides training
    tick       called with (current work, rows so far, current row)
    shadowing  reads the updates of a collaboration's shadow sets, given their number and the snapshots of each
    """

    sets: Mapping[str, RenderedRows] = field(default_factory=dict)
    seed: int = 0
    models: Mapping[str, Callable[[], ModelView]] = field(default_factory=dict)
    text: Renderer | None = None
    asking: Scorer | None = None
    answering: Generator | None = None
    nested: Runs | None = None
    done: Mapping[str, Outcome] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    tick: Tick = no_tick
    shadowing: Callable[[int, int], list[dict[str, Tensor]]] | None = None
    _loaded: dict[str, ModelView] = field(default_factory=dict)

    @property
    def streams(self) -> Streams:
        """Randomness keyed by purpose and row."""
        return Streams(self.seed)

    def rows(self, name: str) -> RenderedRows:
        """A set of rendered rows."""
        if name not in self.sets:
            raise LuthierError(f"there are no rows called {name!r} here; there are {_listed(self.sets)}")
        return self.sets[name]

    def batch(self, name: str, limit: int) -> Batch:
        """The first rows of a set as one batch."""
        return collate(self.rows(name)[:limit])

    def view(self, role: str = "base") -> ModelView:
        """A model, loaded once."""
        if role not in self._loaded:
            if role not in self.models:
                raise LuthierError(f"there is no model called {role!r} here; there are {_listed(self.models)}")
            self._loaded[role] = self.models[role]()
        return self._loaded[role]

    def outcome(self, name: str) -> Outcome:
        """What an earlier stage left."""
        if name not in self.done:
            raise LuthierError(f"no earlier stage is called {name!r}; there are {_listed(self.done)}")
        return self.done[name]

    @property
    def renderer(self) -> Renderer:
        """The renderer, which turns rows into tokens."""
        return _there(self.text, "renders rows")

    @property
    def scorer(self) -> Scorer:
        """The scorer, which computes losses of rows."""
        return _there(self.asking, "scores rows")

    @property
    def generator(self) -> Generator:
        """The generator, which writes answers."""
        return _there(self.answering, "generates answers")

    def shadows(self, sets: int, snapshots: int) -> list[dict[str, Tensor]]:
        """Both models' updates on this many sets of public rows. Raises LuthierError if some are missing."""
        return _there(self.shadowing, "reads shadow runs")(sets, snapshots)

    def run(self, *runs: Nested) -> list[Outcome]:
        """Carry out nested runs in parallel. Returns their results in order. Their cost is charged under "nested"."""
        done = _there(self.nested, "carries out nested runs")(runs)
        for outcome in done:
            self.ledger.charge("nested", sum(outcome.progress.flops.values()), outcome.progress.seconds)
        return done

    def execute(self, programs: Sequence[str], limits: sandbox.Limits = LIMITS) -> list[sandbox.Verdict]:
        """Run generated programs in the sandbox. Raises LuthierError if no sandbox works."""
        return sandbox.execute_all(programs, limits)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"


def _there(service: T | None, what: str) -> T:
    if service is None:
        raise LuthierError(f"nothing here {what}; give the lab a service that does")
    return service
