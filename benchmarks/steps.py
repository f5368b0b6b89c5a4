"""What a step costs: sparse tuning at 5% against LoRA and full tuning, sequence lengths, and the command line's start.

    python benchmarks/steps.py [--rounds 3]

Bars: sparse at 5% at most 1.25 times the step and 1.10 times the memory of LoRA; `luthier --help` under 1 s; importing
luthier loads no torch. Arms are processes of their own and alternate within a round; ratios are paired by round.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

HERE = Path(__file__).parent
GSM8K = HERE.parents[1] / "shared/data/gsm8k/train.jsonl.gz"
TUNERS = ("lora", "spiel 5%", "spiel ma 5%", "full")
LENGTHS = (64, 128, 256, 512, 1024, 2048)
STEPS = 21  # a first one, and twenty: one choice of positions (SpIEL) with the steps it looks at


def rows(renderer: Any) -> list[dict[str, Any]]:
    """The first 96 rows of gsm8k."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        examples = [json.loads(line) for _, line in zip(range(96), file, strict=False)]
    return [
        renderer.render({"prompt": x["question"], "completion": x["solution"]}, str(i)) for i, x in enumerate(examples)
    ]


def child(arm: str) -> dict[str, Any]:
    from luthier import machine

    machine.prepare()
    from luthier.data.rendering import Renderer
    from luthier.forecast import peak_memory
    from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
    from luthier.objectives.sft import Sft
    from luthier.training.loop import Loop
    from luthier.training.settings import TrainSettings
    from luthier.tuners import Full, Lora, Spiel

    located = locate(BUILTIN)
    data = rows(Renderer(load_tokenizer(located)))
    settings = TrainSettings(max_steps=STEPS, batch_size=8, shuffle=False)
    if arm.isdigit():
        ids = (sum((r["ids"] for r in data), []) * 8)[: 8192 * 2]
        n = int(arm)
        parts = [ids[i : i + n] for i in range(0, 8192, n)]
        data = [{"ids": p, "labels": p, "token": {"prompt": [0] * n}} for p in parts]
        settings = TrainSettings(max_steps=3, batch_size=2048 // n, shuffle=False, tokens_per_forward=2048)
    view = load_model(located)
    tuner = {"spiel 5%": Spiel(density=0.05), "spiel ma 5%": Spiel(density=0.05, variant="ma"), "full": Full()}.get(
        arm, Lora()
    )
    loop = Loop(view, data, tuner.attach(view, total_steps=STEPS), Sft(), settings)
    loop.step()
    started, before = time.perf_counter(), loop.progress.tokens
    times = []
    while loop.progress.step < loop.total_steps:
        at = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - at)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "step": statistics.median(times), "tokens_per_second": (loop.progress.tokens - before) / seconds,
        "peak_bytes": peak_memory(),
    }  # fmt: skip


def measured(arm: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--arm", arm], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-800:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm:<12} {result['tokens_per_second']:7.0f} tokens/s {result['peak_bytes'] / 1e9:6.2f} GB", flush=True)
    return result


def startup() -> dict[str, Any]:
    """Seconds of `luthier --help`, best of 5 after a first; whether `import luthier` loads torch."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "luthier", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    loads = "import sys, luthier; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout.strip()
    return {"luthier --help, seconds (bar 1.0)": round(min(times[1:]), 2), "import luthier loads torch": said == "True"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(child(options.arm)))
        return
    note, runs = machine_note(), {}
    for number in range(options.rounds):
        for arm in TUNERS if number == 0 else TUNERS[:-1]:  # full tuning has no bar: once
            runs.setdefault(arm, []).append(measured(arm))
    against = {}
    for arm in TUNERS[1:]:
        pairs = list(zip(runs[arm], runs["lora"], strict=False))
        against[arm] = {
            "time over LoRA's": round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3),
            "median step over LoRA's": round(statistics.median(a["step"] / b["step"] for a, b in pairs), 3),
            "peak memory over LoRA's": round(statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs), 3),
        }
    table = {
        arm: {
            "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in many)),
            "peak_GB": round(statistics.median(r["peak_bytes"] for r in many) / 1e9, 2),
        }
        for arm, many in runs.items()
    }
    lengths = {str(n): measured(str(n)) for n in LENGTHS}
    scaling = {
        n: {"tokens_per_second": round(r["tokens_per_second"]), "peak_GB": round(r["peak_bytes"] / 1e9, 2)}
        for n, r in lengths.items()
    }
    result = {
        **note, "rounds": options.rounds, "steps timed": STEPS - 1, "bars": "sparse at 5%: step 1.25, memory 1.10",
        "tuners": table, "against LoRA": against,
        "LoRA by sequence length, 2048 tokens a forward": scaling, "start": startup(),
    }  # fmt: skip
    (HERE / "results/steps.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
