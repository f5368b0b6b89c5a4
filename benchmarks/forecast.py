"""How far off the forecast of memory and time is, recipe by recipe, on SmolLM2-135M. Bars: 25% and 40%.

python benchmarks/forecast.py
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine_note import machine_note

HERE = Path(__file__).parent
GSM8K = HERE.parents[1] / "shared/data/gsm8k/train.jsonl.gz"
REQUESTS = {"train": "builtin:requests", "system": "Turn the request into a JSON call."}
LONG = {"train": "rows.jsonl"}
RECIPES = {
    "lora": {"data": REQUESTS, "tuner": "lora"},
    "lora, long rows": {"data": LONG, "tuner": "lora"},
    "lora, 256 tokens a forward": {"data": LONG, "tuner": "lora", "tokens_per_forward": 256},
    "lora, checkpointing": {"data": LONG, "tuner": "lora", "gradient_checkpointing": True},
    "full": {"data": REQUESTS, "tuner": "full"},
    "spiel": {"data": REQUESTS, "tuner": {"spiel": {"density": 0.05}}},
    "dept": {"data": REQUESTS, "tuner": {"dept": {"budget_length": 80, "length": 40}}},
    "q-tuning": {"data": LONG, "tuner": "lora", "objective": "q-tuning"},
    "caft": {"data": REQUESTS, "tuner": "lora", "objective": {"caft": {"ahead": 3, "allow_untrained_heads": True}}},
}


def one(name: str, folder: Path) -> dict[str, float]:
    """Run one recipe for a few steps; what it says of its own forecast."""
    recipe = {"model": "builtin:smollm2-135m", "max_steps": 12, "output_dir": name.replace(" ", "-"), **RECIPES[name]}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "luthier", "run", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-800:]}")
    run = json.loads(done.stdout.splitlines()[-1])
    return {
        "memory_miss": round(run["forecast_miss"]["memory"], 3),
        "seconds_miss": round(run["forecast_miss"]["seconds"], 3),
        "peak_GB": round(run["peak_memory_bytes"] / 1e9, 2),
        "train_seconds": round(run["train_seconds"], 1),
    }


def main() -> None:
    names = sys.argv[1:] or list(RECIPES)
    started, results = machine_note(), {}  # before the work: the load and the commit are those it starts from
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with gzip.open(GSM8K, "rt", encoding="utf-8") as source, (folder / "rows.jsonl").open("w") as target:
            for _, line in zip(range(200), source, strict=False):
                row = json.loads(line)
                target.write(json.dumps({"prompt": row["question"], "completion": row["solution"]}) + "\n")
        for name in names:
            results[name] = one(name, folder)
            print(f"{name:<28} {results[name]}", flush=True)
    note = {**started, "bars": "memory 0.25, seconds 0.40", "results": results}
    (HERE / "results/forecast.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
