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
from collections.abc import Iterator, Mapping, Sequence
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
ELSEWHERE = ("data/quadrants.py",)  # what methods compute with, in another room
# Tests of a module that are not called after it; those of any other are test_NAME.py in whichever folder.
OWN = {
    "curation/base.py": ("curation/test_curator.py", "run/test_curate.py", "curation/test_proof.py"),
    "data/quadrants.py": ("objectives/test_q_tuning.py", "curation/test_q_tuning_offline.py"),
    "inspection/base.py": ("inspection/test_inspectors.py", "inspection/test_norms.py"),
    "kernels/linear.py": ("kernels/test_linear_layers.py",),
    "kernels/plain.py": ("kernels/test_head.py",),
    "pipelines/stages.py": ("pipelines/test_stages.py", "pipelines/test_base.py"),
    "pipelines/base.py": ("pipelines/test_base.py", "pipelines/test_list.py", "pipelines/test_stages.py"),
    "tuners/base.py": ("tuners/test_trainable.py", "tuners/test_full.py", "tuners/test_task_head.py"),
    "update/base.py": (
        "update/test_parts.py",
        "update/test_update.py",
        "update/test_compositions.py",
        "update/test_peft_folder.py",
    ),
    "update/binding.py": (
        "update/test_parts.py",
        "update/test_update.py",
        "update/test_following.py",
        "update/test_binding.py",
    ),
    "update/files.py": ("update/test_update.py", "update/test_update_files.py"),
    "update/compositions.py": (
        "update/test_parts.py",
        "update/test_update.py",
        "update/test_then.py",
        "update/test_following.py",
        "update/test_compositions.py",
        "update/test_binding.py",
    ),
    "update/structure.py": ("update/test_structure.py", "update/test_binding.py"),
    "update/update.py": (
        "update/test_update.py",
        "update/test_parts.py",
        "update/test_then.py",
        "update/test_following.py",
        "update/test_binding.py",
    ),
    "update/vectors.py": (
        "update/test_parts.py",
        "update/test_update.py",
        "update/test_structure.py",
        "update/test_vectors.py",
        "update/test_binding.py",
    ),
}


class Fault(NamedTuple):
    """One that was tried."""

    number: int  # of the line
    line: str
    change: str
    noticed: str | None  # the test that noticed it, or how else it was; None for a survivor


class Result(NamedTuple):
    """What became of the faults of one file."""

    faults: list[Fault]
    seconds: float  # by the clock
    tests: float  # seconds of processor time that the tests take without a fault


def own_tests(file: Path) -> list[Path]:
    """The test files that a source file answers to; none where it has none. Raises SystemExit for one in OWN that is missing."""
    named = OWN.get(file.relative_to(PACKAGE).as_posix())
    if named is not None:
        missing = [n for n in named if not (TESTS / n).is_file()]
        if missing:
            raise SystemExit(f"OWN in tests/mutation/run.py names tests/{missing[0]}, which is not a file")
        return [TESTS / n for n in named]
    return sorted(TESTS.rglob(f"test_{file.stem}.py")) + sorted(TESTS.rglob(f"test_{file.stem}_oracle.py"))


def accepted() -> set[tuple[str, str, str]]:
    """Faults that no test can or should notice: file, line, change."""
    return {(a["file"], a["line"], change) for a in accepted_table() for change in a["changes"]}


def accepted_table() -> list[dict[str, Any]]:
    """The same as they are written down, each line with its changes and the reason."""
    return tomllib.loads((TESTS / "mutation/accepted.toml").read_text(encoding="utf-8")).get("survivor", [])


def judged(file: Path, tests: Sequence[Path], workers: int, found: Mapping[str, Mutant]) -> dict[str, Any]:
    """These faults of a file against its tests. Raises SystemExit where the tests fail without any."""
    start = time.monotonic()
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    noticed, seconds = trials(file, name, tests, list(found.values()), workers)
    faults = {key: [*m[:3], by] for (key, m), by in zip(found.items(), noticed, strict=True)}
    return {"faults": faults, "seconds": time.monotonic() - start, "tests": seconds}


def drawn(file: Path, share: float) -> dict[str, Mutant]:
    """The faults of a file by a hash of where they are and what they do; or a share of them, drawn evenly by that hash."""
    name, found = file.relative_to(PACKAGE).as_posix(), mutants(file.read_text(encoding="utf-8"))
    keys = [hashlib.sha256("\0".join((name, str(m.number), m.change, m.source)).encode()).hexdigest() for m in found]
    return {k: m for k, m in zip(keys, found, strict=True) if int(k[:16], 16) < share * 2**64}


def refuse_untested(file: Path) -> None:
    """Raise SystemExit for a file that is not one of the package's, or that no test file is called after."""
    if not file.is_file() or not file.is_relative_to(PACKAGE):
        raise SystemExit(f"{file} is not a file in {PACKAGE}")
    if not own_tests(file):
        name = file.relative_to(PACKAGE).as_posix()
        raise SystemExit(
            f"{name} has no tests of its own: write tests/.../test_{file.stem}.py, or name its tests in OWN in "
            "tests/mutation/run.py"
        )


def wanted(names: Sequence[str]) -> list[Path]:
    """The files named, or all of methods and of what they are made of, in which there is something to change."""
    if names:
        files = [Path(n).resolve() for n in names]
        for file in files:
            refuse_untested(file)
        return files
    every = [f for room in ROOMS for f in sorted((PACKAGE / room).rglob("*.py"))]
    return [f for f in (*every, *(PACKAGE / n for n in ELSEWHERE)) if mutants(f.read_text(encoding="utf-8"))]


def kept_at(file: Path) -> Path:
    return OUT / f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}.json"


def key_of(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def keys_of(file: Path, tests: Sequence[Path]) -> dict[str, str]:
    """What a file's results hold for: its source and the faults made of it, and these with its tests."""
    made_by = (file, TESTS / "mutation/mutants.py")
    return {"source": key_of(*made_by), "key": key_of(*made_by, *tests)}


def stored_for(file: Path) -> dict[str, Any]:
    """What is known of a file from earlier calls; empty for nothing."""
    kept = kept_at(file)
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    return found


def results(files: Sequence[Path], workers: int, again: bool, share: float) -> Iterator[tuple[Path, Result | None]]:
    """A file's result, or None where it has no tests of its own. Faults are tried that have not been; all, after a change.

    `again`: of a source that has not changed those are tried again that survived. That is for use while tests are being
    added: those that were noticed count on, and a call without it tries all.
    """
    for file in files:
        tests = own_tests(file)
        if not tests:
            yield file, None
            continue
        kept, now, stored = kept_at(file), keys_of(file, tests), stored_for(file)
        if again and stored.get("source") == now["source"] and stored["key"] != now["key"]:
            stored["faults"] = {k: f for k, f in stored["faults"].items() if f[3] is not None}
            stored["key"] = now["key"] + " for survivors"
        elif stored.get("key", "").partition(" ")[0] != now["key"] or ("for" in stored["key"] and not again):
            stored = {**now, "faults": {}, "seconds": 0.0, "tests": 0.0}
        left = {k: m for k, m in drawn(file, share).items() if k not in stored["faults"]}
        if left:
            more = judged(file, tests, workers, left)
            stored["faults"] |= more["faults"]
            stored["seconds"] += more["seconds"]
            stored["tests"] = more["tests"]
            kept.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        faults = sorted((Fault(*f) for f in stored["faults"].values()), key=lambda f: f[:3])
        yield file, Result(faults, stored["seconds"], stored["tests"])


def told(file: Path, result: Result | None, known: set[tuple[str, str, str]]) -> tuple[str, list[str]]:
    """One line of counts, and one for every survivor that was not accepted, or that was and is noticed by now."""
    name = file.relative_to(ROOT).as_posix()
    if result is None:
        return f"{name}: no tests of its own", []
    survived = [f for f in result.faults if f.noticed is None]
    new = [f for f in survived if (name, f.line, f.change) not in known]
    counts = f"{name}: {len(result.faults)} faults, {len(new)} survived, {len(survived) - len(new)} accepted"
    alive = {(f.line, f.change) for f in survived}  # a line may stand in several places
    outdated = {
        (f.line, f.change): f
        for f in result.faults
        if (name, f.line, f.change) in known and (f.line, f.change) not in alive
    }
    return f"{counts}, {result.seconds:.0f} s", [
        *(f"  {f.number}: {f.change}: {f.line}" for f in new),
        *(f"  {f.number}: accepted, but noticed by {f.noticed}: {f.change}: {f.line}" for f in outdated.values()),
    ]


def table(files: Sequence[Path], known: set[tuple[str, str, str]]) -> Iterator[str]:
    """Lines of Markdown: what earlier calls have found. A star marks a file that has changed since, or whose tests have."""
    yield from ("| file | faults | tried | accepted | left |", "|---|---|---|---|---|")
    sums = [0] * 4
    for file in files:
        stored, name = stored_for(file), file.relative_to(ROOT).as_posix()
        if not stored:
            continue
        survived = [f for f in map(Fault._make, stored["faults"].values()) if f.noticed is None]
        left = sum((name, f.line, f.change) not in known for f in survived)
        row = (len(drawn(file, 1.0)), len(stored["faults"]), len(survived) - left, left)
        since = "" if stored["key"].partition(" ")[0] == keys_of(file, own_tests(file))["key"] else " *"
        yield f"| {file.relative_to(PACKAGE).as_posix()}{since} | {' | '.join(map(str, row))} |"
        sums = [a + b for a, b in zip(sums, row, strict=True)]
    yield f"| all of these | {' | '.join(map(str, sums))} |"


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
    parser.add_argument("--share", type=float, default=1.0, help="Of all faults only so many, drawn evenly by a hash.")
    parser.add_argument(
        "--table", action="store_true", help="Try nothing; print what earlier calls have found, in Markdown."
    )
    given = parser.parse_args()
    if given.table:
        print(*table(wanted(given.files), accepted()), sep="\n")
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    OUT.mkdir(parents=True, exist_ok=True)
    load_libraries()
    known = accepted()
    with (OUT / "survivors.txt").open("w", encoding="utf-8") as report:
        for file, result in results(wanted(given.files), given.workers, given.again, given.share):
            counts, survivors = told(file, result, known)
            print(counts, flush=True)
            print(counts, *survivors, sep="\n", file=report, flush=True)
    print(OUT / "survivors.txt")


if __name__ == "__main__":
    main()
