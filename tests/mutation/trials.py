"""Runs the tests of a file with a fault in it, cheaply: what they need is imported once, and only tests that reach the fault run.

The tests of a file are collected in a process of its own. From there every trial is a fork. First each test runs alone and
unchanged, which gives its time and the lines of the file that it runs. Then every fault runs the tests that reach its
statement; one that no test reaches survives without a run. The order is by time over the chance of noticing, as the faults
before have shown it, and the first test that fails ends the trial.

A fault changes bodies of functions only, so the functions that stand already get the changed code. Two kinds need the module
to be imported anew: what runs while it is imported, and what takes other names from around it. They cost some seconds more.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

from mutation.mutants import Mutant

MARGIN = 5.0  # a fault that takes so many times the tests' own processor time has been noticed
SPARE_SECONDS = 10.0
WAIT = 10.0  # the clock may run so many times longer: other processes need the cores too
SPARE_BYTES = 8 << 30  # a fault that takes so much more memory has been noticed
# Nothing is captured: what the process writes goes nowhere. That an assertion fails is enough; why, is not worked out.
PYTEST = ("-s", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist")


class Seen(NamedTuple):
    """What a test does without any fault."""

    seconds: float  # of processor time
    lines: frozenset[int]  # of the file


class Trials(NamedTuple):
    """What became of faults, and how long the tests take without any."""

    noticed: list[str | None]  # for each the test that noticed it, or how else it was noticed; None for survivors
    seconds: float  # of processor time, for all tests, each run alone


class Outcome(NamedTuple):
    code: int | None  # 0 where every test passed, None where a limit was reached or the process died
    seconds: float  # of processor time
    said: Any  # what the process wrote down, None for nothing


class Job(NamedTuple):
    """Something to be done in a process of its own: it gets a folder, and its limit of processor time."""

    work: Callable[[Path], int]
    seconds: float


def trials(file: Path, name: str, tests: Sequence[Path], found: Sequence[Mutant], workers: int) -> Trials:
    """Every fault against the tests. `name` is the module's. Raises SystemExit where the tests fail without a fault."""
    plan = _Plan(file, name, found, workers)
    (outcome,) = pool([Job(partial(_session, plan, tests), 24 * 3600.0)], 1)
    if outcome.code != 0 or outcome.said is None:
        raise SystemExit(f"{file}: {outcome.said or 'its tests cannot be collected'}")
    noticed: list[str | None] = outcome.said["noticed"]
    anew: list[tuple[int, list[str], float]] = outcome.said["anew"]
    jobs = [Job(partial(_anew, plan, found[i].source, chosen), limit) for i, chosen, limit in anew]
    for (i, *_), o in zip(anew, pool(jobs, workers), strict=True):
        noticed[i] = "a test, or the import" if o.code != 0 else None
    return Trials(noticed, outcome.said["seconds"])


class _Plan(NamedTuple):
    file: Path
    name: str
    found: Sequence[Mutant]
    workers: int


# -- processes ---------------------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    place: int
    folder: Path
    start: float
    limit: float


def pool(
    jobs: Iterable[Job], workers: int, ended: Callable[[int, Outcome], None] = lambda place, outcome: None
) -> list[Outcome]:
    """The outcome of every job, so many at a time. The next is asked for after `ended` was told of those before."""
    outcomes: dict[int, Outcome] = {}
    running: dict[int, _Running] = {}
    waiting = iter(enumerate(jobs))
    while True:
        while len(running) < workers and (following := next(waiting, None)) is not None:
            place, job = following
            folder = Path(tempfile.mkdtemp(prefix="luthier-mutant-"))
            running[_started(job, folder)] = _Running(place, folder, time.monotonic(), WAIT * job.seconds)
        if not running:
            return [outcomes[i] for i in range(len(outcomes))]
        for pid, child in list(running.items()):
            outcome = _ended(pid, child)
            if outcome is not None:
                outcomes[child.place] = outcome
                shutil.rmtree(child.folder, ignore_errors=True)
                del running[pid]
                ended(child.place, outcome)
        time.sleep(0.01)


def _ended(pid: int, child: _Running) -> Outcome | None:
    """None while it runs. What the process started is ended with it."""
    done, status, used = os.wait4(pid, os.WNOHANG)
    if not done and time.monotonic() - child.start < child.limit:
        return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        _, status, used = os.wait4(pid, 0)
    said = child.folder / "said.json"
    code = os.WEXITSTATUS(status) if done and os.WIFEXITED(status) else None
    return Outcome(
        code, used.ru_utime + used.ru_stime, json.loads(said.read_text(encoding="utf-8")) if said.exists() else None
    )


def _started(job: Job, folder: Path) -> int:
    """A process that does the job and ends with its code."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()  # with whatever the tests start
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        os.environ["LUTHIER_CACHE"] = str(
            folder / "cache"
        )  # what a faulty function left there would be found by others
        _limit(resource.RLIMIT_CPU, int(job.seconds) + 1)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _limit(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES)
        code = job.work(folder)
    finally:
        os._exit(code)


def _limit(what: int, value: int) -> None:
    """The soft limit only: what is started from here may have a higher one."""
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def _say(folder: Path, what: Any) -> None:
    (folder / "said.json").write_text(json.dumps(what), encoding="utf-8")


# -- the session of one file -------------------------------------------------------------------------------------------


def _session(plan: _Plan, tests: Sequence[Path], folder: Path) -> int:
    with Lines(plan.file) as imported:
        judge = _Judge(plan, imported, folder)
        code = int(pytest.main([*PYTEST, "--rootdir", str(_root(plan.file)), *map(str, tests)], plugins=[judge]))
    return code


def _anew(plan: _Plan, source: str, chosen: Sequence[str], _folder: Path) -> int:
    """The tests of these names, with the module imported from this text."""
    sys.meta_path.insert(0, Replaced(plan.name, plan.file, source))
    os.chdir(_root(plan.file))
    return int(pytest.main(["-x", *PYTEST, "--rootdir", str(_root(plan.file)), *chosen]))


def _root(file: Path) -> Path:
    return next(p for p in file.parents if (p / "pyproject.toml").exists())


class _Judge:
    """A plugin of pytest's that, in place of running the collected tests once, runs them for every fault."""

    def __init__(self, plan: _Plan, imported: Lines, folder: Path) -> None:
        self.plan, self.imported, self.folder = plan, imported, folder
        self.failed: Callable[[str], None] = lambda name: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Ends the trial before the failure is described, which can take longer than the test."""
        # A test that skips or is expected to fail says nothing about the fault, so the trial goes on.
        expected = (pytest.skip.Exception, pytest.xfail.Exception)
        if (
            call.excinfo is not None
            and not call.excinfo.errisinstance(expected)
            and not item.get_closest_marker("xfail")
        ):
            self.failed(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.imported.stop()
        if session.testsfailed or not session.items:
            _say(self.folder, "its tests cannot be collected, or there are none")
            os._exit(1)
        module = sys.modules.get(self.plan.name)
        if module is not None and Path(module.__file__ or "") != self.plan.file:
            _say(self.folder, f"the tests import {module.__file__}")
            os._exit(1)
        items = {item.nodeid: item for item in session.items}
        live = _functions_of(self.plan.file)
        gc.collect()
        gc.freeze()
        seen = self._alone(list(items.values()))
        noticed, anew = self._faults(items, seen, live)
        said = {"noticed": noticed, "anew": anew, "seconds": sum(s.seconds for s in seen.values())}
        _say(self.folder, said)
        return True

    def _alone(self, items: list[pytest.Item]) -> dict[str, Seen]:
        """Every test by itself. Ends the process where one fails."""
        outcomes = pool([Job(self._watched(i), 600.0) for i in items], self.plan.workers)
        seen = {}
        for item, o in zip(items, outcomes, strict=True):
            if o.code != 0:
                _say(self.folder, f"{item.nodeid} fails alone, before anything is changed")
                os._exit(1)
            seen[item.nodeid] = Seen(o.seconds, frozenset(o.said))
        return seen

    def _faults(
        self, items: dict[str, pytest.Item], seen: dict[str, Seen], live: Sequence[FunctionType]
    ) -> tuple[list[str | None], list[tuple[int, list[str], float]]]:
        """What noticed each; and those for which the module has to be imported anew, with their tests and limit."""
        reach = Reach(self.plan.file.read_text(encoding="utf-8"))
        odds = _Odds(seen)
        noticed: list[str | None] = [None] * len(self.plan.found)
        anew: list[tuple[int, list[str], float]] = []
        orders: list[tuple[int, list[str]]] = []

        def jobs() -> Iterator[Job]:
            for i, m in enumerate(self.plan.found):
                lines = reach.lines(m)
                early = bool(lines & self.imported.lines)
                chosen = odds.ordered(n for n, s in seen.items() if early or not s.lines.isdisjoint(lines))
                if not chosen:
                    continue
                put: Callable[[], None] | None = _replacing(self.plan, m.source)
                if self.plan.name in sys.modules:
                    put = None if early else _exchange(m.source, self.plan.file, live)
                if put is None:
                    anew.append((i, chosen, odds.limit(chosen)))
                else:
                    orders.append((i, chosen))
                    yield Job(self._run([items[n] for n in chosen], put), odds.limit(chosen))

        def ended(place: int, outcome: Outcome) -> None:
            i, chosen = orders[place]
            if outcome.code == 1:
                noticed[i] = outcome.said
                odds.learn(chosen, outcome.said)
            elif outcome.code == 0:
                odds.learn(chosen, None)
            else:
                noticed[i] = "a limit, or the end of the process"

        pool(jobs(), self.plan.workers, ended)
        if orders and all(noticed[i] for i, _ in orders):
            self._together([items[n] for n in odds.ordered(seen)])
        return noticed, anew

    def _together(self, items: Sequence[pytest.Item]) -> None:
        """Where every trial failed, it may be that the tests fail after one another. Ends the process in that case."""
        (outcome,) = pool([Job(self._run(items, None), 1800.0)], 1)
        if outcome.code != 0:
            _say(self.folder, f"{outcome.said} fails after others, before anything is changed")
            os._exit(1)

    def _run(self, items: Sequence[pytest.Item], put: Callable[[], None] | None) -> Callable[[Path], int]:
        """These tests, until one fails, after `put` has put the fault in."""

        def work(folder: Path) -> int:
            def failed(name: str) -> None:
                _say(folder, name)
                os._exit(1)

            self.failed = failed
            if put is not None:
                put()
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            return 0

        return work

    def _watched(self, item: pytest.Item) -> Callable[[Path], int]:
        """One test, whose lines are written down."""
        run = self._run([item], None)

        def work(folder: Path) -> int:
            with Lines(self.plan.file) as watched:
                code = run(folder)
            _say(folder, sorted(watched.lines))
            return code

        return work


class _Odds:
    """Which test to ask first: the one with the least time for each fault that it may be expected to notice."""

    def __init__(self, seen: dict[str, Seen]) -> None:
        self.seen = seen
        self.asked: Counter[str] = Counter()
        self.noticed: Counter[str] = Counter()

    def ordered(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda n: self.seen[n].seconds * (self.asked[n] + 2) / (self.noticed[n] + 1))

    def limit(self, names: Iterable[str]) -> float:
        return MARGIN * sum(self.seen[n].seconds for n in names) + SPARE_SECONDS

    def learn(self, asked: Sequence[str], by: str | None) -> None:
        """These were asked in this order, and the last that ran noticed the fault; None: none did."""
        self.asked.update(asked if by is None else asked[: asked.index(by) + 1])
        if by is not None:
            self.noticed[by] += 1


# -- where a fault is, and putting it in -------------------------------------------------------------------------------


class Lines:
    """Which lines of a file run, in this thread and in those that are started meanwhile."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)
        self.lines: set[int] = set()

    def __enter__(self) -> Lines:
        threading.settrace(self._called)
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        sys.settrace(None)
        threading.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        # What runs while a module or a class is made is not in any function.
        if frame.f_code.co_filename != self.file or not frame.f_code.co_flags & 0x2:
            return None
        self.lines.add(frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        self.lines.add(frame.f_lineno)
        return self._line


class Reach:
    """For a fault, the lines of its statement; of one that holds others, the lines before those."""

    def __init__(self, source: str) -> None:
        self.spans = sorted(_spans(ast.parse(source)), key=lambda s: s[1] - s[0])

    def lines(self, mutant: Mutant) -> set[int]:
        first, last = next(s for s in self.spans if s[0] <= mutant.number <= s[1])
        return set(range(first, last + 1))


def _spans(tree: ast.AST) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            yield node.lineno, max(end, node.lineno)
            yield node.lineno, node.end_lineno or node.lineno


def _codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _functions_of(file: Path) -> list[FunctionType]:
    """The functions of a file that stand now."""
    every = (f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__code__.co_filename == str(file))
    return [f for f in every if f.__name__ != "<lambda>"]  # two of a line have one key; none is changed on its own


def _exchange(source: str, file: Path, live: Sequence[FunctionType]) -> Callable[[], None] | None:
    """What gives the standing functions the code of this text; None where they cannot take it."""
    new = {_key(c): c for c in _codes(compile(source, str(file), "exec", dont_inherit=True))}
    pairs = [(f, new.get(_key(f.__code__))) for f in live]
    if any(c is None or c.co_freevars != f.__code__.co_freevars for f, c in pairs):
        return None
    changed = [(f, c) for f, c in pairs if c is not None and c != f.__code__]
    if not changed:
        return None

    def put() -> None:
        for function, code in changed:
            function.__code__ = code

    return put


def _replacing(plan: _Plan, source: str) -> Callable[[], None]:
    """For a module that no test file imports before its tests run."""
    return lambda: sys.meta_path.insert(0, Replaced(plan.name, plan.file, source))


class Replaced:
    """Gives one module another text; stands before the usual finders."""

    def __init__(self, name: str, file: Path, source: str) -> None:
        self.name, self.file, self.source = name, file, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.file, loader=_Loader(name, self.file, self.source))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, file: Path, source: str) -> None:
        super().__init__(name, str(file))
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)
