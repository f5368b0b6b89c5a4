"""Which faults would no test notice? `python tests/mutation/run.py [FILE ...]` puts them in one at a time and runs the tests.

A file is judged by its own tests alone: a fault that only a run of the whole catches is one that the next change lets in.
How they are run is trials.py's. Files on disk stay as they are. Results go to runs/mutation/: survivors.txt for reading, and a
file for each source by which a later call passes over what has not changed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "src/luthier"
OUT = ROOT / "runs/mutation"
sys.path.insert(0, str(TESTS))

from mutation.mutants import Mutant, mutants  # noqa: E402
from mutation.trials import trials  # noqa: E402

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


def judged(file: Path, tests: Sequence[Path], workers: int, found: Sequence[Mutant]) -> Result:
    """These faults of a file against its tests. Raises SystemExit where the tests fail without any."""
    start = time.monotonic()
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    noticed = trials(file, name, tests, found, workers)
    survived = [m for m, n in zip(found, noticed, strict=True) if n is None]
    return Result(len(found), [(m.number, m.line, m.change) for m in survived], time.monotonic() - start)


def wanted(names: Sequence[str]) -> list[Path]:
    """The files named, or all of methods and of what they are made of, in which there is something to change."""
    if names:
        return [Path(n).resolve() for n in names]
    every = (f for room in ROOMS for f in sorted((PACKAGE / room).rglob("*.py")))
    return [f for f in every if mutants(f.read_text(encoding="utf-8"))]


def kept_at(file: Path) -> Path:
    return OUT / f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}.json"


def key_of(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def results(files: Sequence[Path], workers: int, again: bool) -> Iterator[tuple[Path, Result | None]]:
    """A file's result, or None where it has no tests of its own.

    `again`: of a source that has not changed only the faults are tried that survived the last time. That is for use while
    tests are being added: those that were noticed count on, and a call without it tries all.
    """
    for file in files:
        tests = own_tests(file)
        if not tests:
            yield file, None
            continue
        kept = kept_at(file)
        stored: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        made_by = (file, TESTS / "mutation/mutants.py")
        source, key = key_of(*made_by), key_of(*made_by, *tests)
        found = mutants(file.read_text(encoding="utf-8"))
        if again and stored.get("source") == source and stored.get("key") != key:
            left = {(n, line, change) for n, line, change in stored["survived"]}
            some = judged(file, tests, workers, [m for m in found if m[:3] in left])
            stored = {**stored, "survived": some.survived}
        elif stored.get("key") != key:
            stored = {"key": key, "source": source, **judged(file, tests, workers, found)._asdict()}
        kept.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        survived = [(n, line, change) for n, line, change in stored["survived"]]
        yield file, Result(stored["mutants"], survived, stored["seconds"])


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
    parser.add_argument("--again", action="store_true", help="Only what survived the last time, of sources unchanged.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    OUT.mkdir(parents=True, exist_ok=True)
    load_libraries()
    known = {(a["file"], a["line"], a["change"]) for a in accepted()}
    with (OUT / "survivors.txt").open("w", encoding="utf-8") as report:
        for file, result in results(wanted(given.files), given.workers, given.again):
            counts, survivors = told(file, result, known)
            print(counts, flush=True)
            print(counts, *survivors, sep="\n", file=report, flush=True)
    print(OUT / "survivors.txt")


if __name__ == "__main__":
    main()
