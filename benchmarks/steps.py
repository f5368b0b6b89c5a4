"""What a step costs: sparse tuning at 5% against LoRA and full tuning, sequence lengths, and the command line's start.

    python benchmarks/steps.py [--rounds 2] [--no-lengths]

Bars: sparse at 5% at most 1.25 times the step and 1.10 times the memory of LoRA; `luthier --help` under 1 s; importing
luthier loads no torch. Arms are processes of their own that stand by side by side and step in turn, over the same rows, so
that a machine that slows down slows all of them: ratios are paired step by step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

HERE = Path(__file__).parent
GSM8K = Path(os.environ.get("LUTHIER_DATA", HERE.parents[1] / "shared/data")) / "gsm8k/train.jsonl.gz"
TUNERS = ("lora", "spiel 5%", "spiel ma 5%", "hft", "lift", "full")
LENGTHS = (64, 128, 256, 512, 1024, 2048)
STEPS = 21  # a first one, and twenty: one choice of positions (SpIEL) with the steps it looks at


def rows(renderer: Any) -> list[dict[str, Any]]:
    """The first 96 rows of gsm8k."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        examples = [json.loads(line) for _, line in zip(range(96), file, strict=False)]
    return [
        renderer.render({"prompt": x["question"], "completion": x["solution"]}, str(i)) for i, x in enumerate(examples)
    ]


def loop_of(arm: str) -> Any:
    """The arm's loop, before its first step."""
    from luthier.data.rendering import Renderer
    from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
    from luthier.objectives.sft import Sft
    from luthier.step.settings import TrainSettings
    from luthier.training.loop import Loop
    from luthier.tuners import Full, Hft, Lift, Lora, Spiel

    located = locate(BUILTIN)
    data = rows(Renderer(load_tokenizer(located)))
    size = {"batch_size": 32, "tokens_per_forward": 8192} if on_gpu() else {"batch_size": 8}
    settings = TrainSettings(max_steps=STEPS, shuffle=False, **size)
    if arm.isdigit():
        ids = (sum((r["ids"] for r in data), []) * 8)[: 8192 * 2]
        n = int(arm)
        parts = [ids[i : i + n] for i in range(0, 8192, n)]
        data = [{"ids": p, "labels": p, "token": {"prompt": [0] * n}} for p in parts]
        settings = TrainSettings(max_steps=3, batch_size=2048 // n, shuffle=False, tokens_per_forward=2048)
    view = load_model(located)
    tuners = {
        "spiel 5%": Spiel(density=0.05), "spiel ma 5%": Spiel(density=0.05, variant="ma"), "full": Full(), "hft": Hft(),
        "lift": Lift(reselect_every=0),  # one choice, before the first step, which is not timed
    }  # fmt: skip
    tuner = tuners.get(arm, Lora())
    return Loop(view, data, tuner.attach(view, total_steps=STEPS), Sft(), settings)


def on_gpu() -> bool:
    """Where the model will be."""
    import torch

    return torch.cuda.is_available()


def settled() -> None:
    """Wait for what a GPU still has to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def child(arm: str) -> None:
    """Make one step for every line that comes, and say what it took; at the end of the input the peak of memory."""
    from luthier.support import machine

    machine.prepare()
    from luthier.run.forecast import peak_memory

    loop = loop_of(arm)
    print(json.dumps({"steps": loop.total_steps}), flush=True)
    for _ in sys.stdin:
        tokens, started = loop.progress.tokens, time.perf_counter()
        loop.step()
        settled()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": loop.progress.tokens - tokens}), flush=True)
    print(json.dumps({"peak_bytes": peak_memory()}), flush=True)


class Arm:
    """A process that stands by."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--arm", name]
        self.name, self.steps = name, []
        # The same for all arms, whatever the load was when each began; threads that wait for long sleep.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "GOMP_SPINCOUNT": "10000"},
        )  # fmt: skip
        self.total = self.answer()["steps"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended")
        return json.loads(line)

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self.answer())

    def end(self) -> dict[str, Any]:
        """Seconds of each step after the first, tokens a second, and the peak of memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        timed = self.steps[1:]
        rate = sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed)
        result = {"seconds": [s["seconds"] for s in timed], "tokens_per_second": rate, **self.answer()}
        print(f"{self.name:<12} {rate:7.0f} tokens/s {result['peak_bytes'] / 1e9:6.2f} GB", flush=True)
        return result


def in_turn(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """All arms, one step each in turn, to their end."""
    arms = [Arm(name) for name in names]
    for _ in range(arms[0].total):
        for arm in arms:
            arm.step()
    return {arm.name: arm.end() for arm in arms}


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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-lengths", action="store_true", help="Tuners alone.")
    options = parser.parse_args()
    if options.arm:
        child(options.arm)
        return
    # Full tuning has no bar: it takes part in the first round only.
    note, runs = machine_note(), [in_turn(TUNERS if n == 0 else TUNERS[:-1]) for n in range(options.rounds)]
    against = {}
    for arm in TUNERS[1:]:
        took_part = [run for run in runs if arm in run]
        ratios = [a / b for run in took_part for a, b in zip(run[arm]["seconds"], run["lora"]["seconds"], strict=True)]
        whole = [sum(run[arm]["seconds"]) / sum(run["lora"]["seconds"]) for run in took_part]
        against[arm] = {
            "step over LoRA's, all steps of each round": [round(x, 3) for x in whole],
            "median of paired steps": round(statistics.median(ratios), 3),
            "peak memory over LoRA's": round(
                statistics.median(r[arm]["peak_bytes"] / r["lora"]["peak_bytes"] for r in took_part), 3
            ),
        }
    table = {
        arm: {
            "tokens_per_second": round(statistics.median(run[arm]["tokens_per_second"] for run in runs if arm in run)),
            "peak_GB": round(statistics.median(run[arm]["peak_bytes"] for run in runs if arm in run) / 1e9, 2),
        }
        for arm in TUNERS
    }
    lengths = {} if options.no_lengths else {str(n): in_turn((str(n),))[str(n)] for n in LENGTHS}
    scaling = {
        n: {"tokens_per_second": round(r["tokens_per_second"]), "peak_GB": round(r["peak_bytes"] / 1e9, 2)}
        for n, r in lengths.items()
    }
    result = {
        **note, "rounds": options.rounds, "steps timed": STEPS - 1, "bars": "sparse at 5%: step 1.25, memory 1.10",
        "tuners": table, "against LoRA": against,
        "LoRA by sequence length, 2048 tokens a forward": scaling, "start": startup(),
    }  # fmt: skip
    name = "steps-gpu.json" if on_gpu() else "steps.json"
    (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
