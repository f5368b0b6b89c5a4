"""Which faults would no test notice? `python tests/mutation/run.py [FILE ...]` puts them in one at a time and runs the tests.

A file is judged by its own tests alone: a fault that only a run of the whole catches is one that the next change lets in.
Libraries are imported once; every fault gets a process forked from there, in which the changed text takes the place of the
module. Files on disk stay as they are. Results go to runs/mutation/: survivors.txt for reading, and a file for each source by
which a later call passes over what has not changed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "src/luthier"
OUT = ROOT / "runs/mutation"
sys.path.insert(0, str(TESTS))

from mutation.mutants import mutants  # noqa: E402

ROOMS = (
    "tuners", "objectives", "compute", "curation", "pipelines", "merging", "decoding", "inspection", "update", "training",
    "kernels",
)  # fmt: skip
# Tests of a module that are not called after it; those of any other are test_NAME.py in whichever folder.
OWN = {
    "data/quadrants.py": ("objectives/test_q_tuning.py", "curation/test_q_tuning_offline.py"),
    "kernels/linear.py": ("tuners/test_spiel.py", "tuners/test_lora.py"),
    "training/checkpoint.py": ("training/test_equalities.py",),
    "training/loop.py": ("training/test_equalities.py",),
    "update/files.py": ("update/test_update.py",),
    "update/compositions.py": ("update/test_parts.py", "update/test_update.py"),
    "update/structure.py": ("update/test_structure.py",),
    "update/vectors.py": ("update/test_parts.py", "update/test_update.py"),
}
MARGIN = 5.0  # a fault that takes so many times the tests' own time has been noticed
SPARE_SECONDS = 20.0


class Result(NamedTuple):
    """What became of the faults of one file."""

    mutants: int
    survived: list[tuple[int, str, str]]  # line's number, the line, the change
    seconds: float


def own_tests(file: Path) -> list[Path]:
    """The test files that a source file answers to; none where it has none."""
    named = OWN.get(file.relative_to(PACKAGE).as_posix())
    if named is not None:
        return [TESTS / n for n in named]
    return sorted(TESTS.rglob(f"test_{file.stem}.py"))


def accepted() -> list[dict[str, str]]:
    """Faults that no test can or should notice, each with its reason."""
    return tomllib.loads((TESTS / "mutation/accepted.toml").read_text(encoding="utf-8")).get("survivor", [])


def judged(file: Path, tests: Sequence[Path], workers: int) -> Result:
    """Every fault of a file against its tests. Raises SystemExit where the tests fail without any."""
    source, start = file.read_text(encoding="utf-8"), time.monotonic()
    (plain,) = _outcomes(file, tests, [source], 1, 600.0)
    if plain.code != 0:
        raise SystemExit(f"{file.relative_to(ROOT)}: its tests end with {plain.code} before anything is changed")
    found = mutants(source)
    limit = MARGIN * plain.seconds + SPARE_SECONDS
    outcomes = _outcomes(file, tests, [m.source for m in found], workers, limit)
    survived = [m for m, o in zip(found, outcomes, strict=True) if o.code == 0]
    return Result(len(found), [(m.number, m.line, m.change) for m in survived], time.monotonic() - start)


class Outcome(NamedTuple):
    code: int | None  # pytest's, None where time ran out or the process died
    seconds: float


class Running(NamedTuple):
    place: int
    folder: str
    start: float


def _outcomes(file: Path, tests: Sequence[Path], sources: Sequence[str], workers: int, limit: float) -> list[Outcome]:
    """pytest's exit code for every text of the file, so many processes at a time."""
    outcomes: dict[int, Outcome] = {}
    running: dict[int, Running] = {}
    waiting = iter(enumerate(sources))
    while len(outcomes) < len(sources):
        while len(running) < workers and (following := next(waiting, None)) is not None:
            index, source = following
            folder = tempfile.mkdtemp(prefix="luthier-mutant-")
            running[_started(file, source, tests, folder)] = Running(index, folder, time.monotonic())
        for pid, child in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            took = time.monotonic() - child.start
            if not done and took < limit:
                continue
            if not done:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            code = os.WEXITSTATUS(status) if done and os.WIFEXITED(status) else None
            outcomes[child.place] = Outcome(code, took)
            shutil.rmtree(child.folder, ignore_errors=True)
            del running[pid]
        time.sleep(0.01)
    return [outcomes[i] for i in range(len(sources))]


def _started(file: Path, source: str, tests: Sequence[Path], folder: str) -> int:
    """A process that runs the tests with this text in the file's place; its exit code is pytest's."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()  # with whatever the tests start
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        sys.meta_path.insert(0, Replaced(name, file, source))
        import pytest

        words = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT), *map(str, tests)]
        code = int(pytest.main(words))
    finally:
        os._exit(code)


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


def wanted(names: Sequence[str]) -> list[Path]:
    """The files named, or all of methods and of what they are made of, in which there is something to change."""
    if names:
        return [Path(n).resolve() for n in names]
    every = (f for room in ROOMS for f in sorted((PACKAGE / room).rglob("*.py")))
    return [f for f in every if mutants(f.read_text(encoding="utf-8"))]


def remembered(file: Path, tests: Sequence[Path]) -> tuple[Path, str]:
    """Where a file's result is kept, and the text by which it is known: the file's, its tests' and the faults'."""
    made_by = [file, *tests, TESTS / "mutation/mutants.py"]
    key = hashlib.sha256(b"\0".join(f.read_bytes() for f in made_by)).hexdigest()
    return OUT / f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}.json", key


def results(files: Sequence[Path], workers: int) -> Iterator[tuple[Path, Result | None]]:
    """A file's result, or None where it has no tests of its own."""
    for file in files:
        tests = own_tests(file)
        if not tests:
            yield file, None
            continue
        kept, key = remembered(file, tests)
        stored: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if stored.get("key") != key:
            stored = {"key": key, **judged(file, tests, workers)._asdict()}
            kept.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        yield (
            file,
            Result(stored["mutants"], [(n, line, why) for n, line, why in stored["survived"]], stored["seconds"]),
        )


def told(file: Path, result: Result | None, known: set[tuple[str, str, str]]) -> tuple[str, list[str]]:
    """One line of counts, and one for every survivor that was not accepted."""
    name = file.relative_to(ROOT).as_posix()
    if result is None:
        return f"{name}: no tests of its own", []
    new = [(n, line, change) for n, line, change in result.survived if (name, line, change) not in known]
    counts = f"{name}: {result.mutants} faults, {len(new)} survived, {len(result.survived) - len(new)} accepted"
    return f"{counts}, {result.seconds:.0f} s", [f"  {n}: {change}: {line}" for n, line, change in new]


def load_libraries() -> None:
    """Import what the package's tests import of others, once for all processes; of the package itself nothing stays."""
    for name in ("luthier.testing.contract", "sklearn.feature_extraction.text", "pytest"):
        importlib.import_module(name)
    for name in [n for n in sys.modules if n.partition(".")[0] == "luthier"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # a process then neither looks through nor copies what all share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="Source files; all methods and what they are made of by default.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes at a time; one a core.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    OUT.mkdir(parents=True, exist_ok=True)
    load_libraries()
    known = {(a["file"], a["line"], a["change"]) for a in accepted()}
    with (OUT / "survivors.txt").open("w", encoding="utf-8") as report:
        for file, result in results(wanted(given.files), given.workers):
            counts, survivors = told(file, result, known)
            print(counts, flush=True)
            print(counts, *survivors, sep="\n", file=report, flush=True)
    print(OUT / "survivors.txt")


if __name__ == "__main__":
    main()
