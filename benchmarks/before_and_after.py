"""Is speed lost between two commits? Steps, rows and answers of an older tree beside this one, in turn within one run.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_and_after.py /tmp/before [--rounds 2]

Each tree runs its own scripts (steps.py, rows.py, evaluation.py) on its own source. Ratios are paired step by step, so that a
machine that slows down slows both. Bar: within 3% of before, or better.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

from evaluation import task_in  # type: ignore[attr-defined]  # mypy finds tests/evaluation first

HERE = Path(__file__).parent
ARMS = ("lora", "spiel 5%", "hft", "full")
ROW_STEPS = ("read", "render", "read again", "render again")
ROWS = 10_000
LOSS_ROWS = 600


def inside(tree: Path) -> dict[str, str]:
    """The environment in which luthier is this tree's."""
    return {**os.environ, "PYTHONPATH": str(tree / "src"), "GOMP_SPINCOUNT": "10000"}


class Arm:
    """One tree's process that makes a step for every line it gets."""

    def __init__(self, tree: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(tree / "benchmarks/steps.py"), "--arm", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=inside(tree),
        )  # fmt: skip
        self.seconds: list[float] = []
        self.total = int(self.answer()["steps"])

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process ended before its last step")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(self.answer()["seconds"])

    def end(self) -> int:
        """The peak of memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return int(self.answer()["peak_bytes"])


def steps(trees: tuple[Path, Path], name: str, count: int) -> dict[str, float]:
    """After over before: the median of paired steps, the whole time, and the peak of memory."""
    before, after = (Arm(tree, name) for tree in trees)
    for i in range(min(count, before.total)):
        for arm in (before, after) if i % 2 else (after, before):
            arm.step()
    pairs = [a / b for a, b in zip(after.seconds[1:], before.seconds[1:], strict=True)]
    whole = sum(after.seconds[1:]) / sum(before.seconds[1:])
    memory = after.end() / before.end()
    return {
        "step": statistics.median(pairs),
        "all steps": whole,
        "peak memory": memory,
        "seconds": sum(after.seconds[1:]),
    }


def rows(trees: tuple[Path, Path], rounds: int) -> dict[str, float]:
    """After over before, the median of rounds, for reading and rendering rows of gsm8k."""
    data = Path(os.environ.get("LUTHIER_DATA", HERE.parents[1] / "shared/data")) / "gsm8k/train.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as source:
        examples = [json.loads(line) for line in source]
    taken: dict[str, list[list[float]]] = {step: [] for step in ROW_STEPS}
    for _ in range(rounds):
        pair: dict[str, list[float]] = {step: [] for step in ROW_STEPS}
        for tree in trees:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "rows.jsonl"
                with file.open("w", encoding="utf-8") as out:
                    for i in range(ROWS):
                        row = {
                            "prompt": examples[i % len(examples)]["question"],
                            "completion": examples[(7 * i) % len(examples)]["solution"],
                        }
                        out.write(json.dumps({**row, "n": i}) + "\n")
                environment = {**inside(tree), "LUTHIER_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "true"}
                unpack = "from luthier.model.loading import BUILTIN, locate; locate(BUILTIN)"
                subprocess.run([sys.executable, "-c", unpack], env=environment, check=True, capture_output=True)
                for step in ROW_STEPS:
                    command = [sys.executable, str(tree / "benchmarks/rows.py"), "--one", step, str(file)]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    pair[step].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
        for step, seconds in pair.items():
            taken[step].append(seconds)
    return {step: statistics.median(after / before for before, after in pairs) for step, pairs in taken.items()}


def evaluation(trees: tuple[Path, Path], rounds: int) -> dict[str, float]:
    """After over before, the median of rounds: a loss of held-out rows, and the choice among three answers."""
    data = Path(os.environ.get("LUTHIER_DATA", HERE.parents[1] / "shared/data"))
    taken: dict[str, list[list[float]]] = {"loss": [], "choice": []}
    with tempfile.TemporaryDirectory() as folder:
        task_in(Path(folder))
        for i in range(rounds):
            for name, words in {"loss": ("rows", str(LOSS_ROWS)), "choice": ("arm", "luthier", folder)}.items():
                found = {}
                for tree in trees if i % 2 else trees[::-1]:
                    environment = {**inside(tree), "LUTHIER_DATA": str(data)}
                    command = [sys.executable, str(tree / "benchmarks/evaluation.py"), *words]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    found[tree] = json.loads(done.stdout.splitlines()[-1])["seconds"]
                taken[name].append([found[tree] for tree in trees])
    return {name: statistics.median(after / before for before, after in pairs) for name, pairs in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="Of rows and of evaluation.")
    parser.add_argument("--steps", type=int, default=13, help="Of each arm, the first one not timed.")
    options = parser.parse_args()
    trees, started = (options.before.resolve(), HERE.parent.resolve()), time.time()
    results: dict[str, Any] = {**machine_note(), "before": commit_of(trees[0])}
    for name in ARMS:
        results[name] = {k: round(v, 3) for k, v in steps(trees, name, options.steps).items()}
        print(f"{name:<10} {results[name]}", flush=True)
    results["rows"] = {k: round(v, 3) for k, v in rows(trees, options.rounds).items()}
    results["evaluation"] = {k: round(v, 3) for k, v in evaluation(trees, options.rounds).items()}
    print(
        f"rows       {results['rows']}\nevaluation {results['evaluation']}  ({time.time() - started:.0f} s in all)",
        flush=True,
    )
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/before_and_after.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def commit_of(tree: Path) -> str:
    """The commit of a tree."""
    done = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
