"""q-tuning's drop mode against plain SFT with LoRA: wall time of a run over the same rows, selection included.

    python benchmarks/drop_mode.py

Bar: at most 0.75 of the time. Both arms stand by side by side in one process and step in turn over the same windows of
32 rows of gsm8k with SmolLM2-135M; ratios are paired step by step. Losses on held-out rows are reported beside it.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note
from steps import rows as rendered

HERE = Path(__file__).parent
WINDOW, STEPS = 32, 6


def loop_of(objective: Any, data: list[dict[str, Any]]) -> Any:
    """LoRA of rank 16 over these rows."""
    from luthier.model.loading import BUILTIN, load_model, locate
    from luthier.step.settings import TrainSettings
    from luthier.training.loop import Loop
    from luthier.tuners import Lora

    view = load_model(locate(BUILTIN))
    settings = TrainSettings(max_steps=STEPS, batch_size=WINDOW, shuffle=False, learning_rate=5e-4)
    return Loop(view, data, Lora(rank=16, alpha=32).attach(view, None, STEPS), objective, settings)


def main() -> None:
    """Entry point."""
    from luthier.data.rendering import Renderer
    from luthier.inference.scoring import Scoring, mean_loss
    from luthier.model.loading import BUILTIN, load_tokenizer, locate
    from luthier.objectives import QTuning, Sft

    everything = rendered(Renderer(load_tokenizer(locate(BUILTIN))))
    data, held = everything[:64], everything[64:96]
    arms = {
        "sft": loop_of(Sft(), data),
        "q-tuning, drop": loop_of(QTuning(keep_rows=0.25, keep_tokens=0.7, pruned="drop"), data),
        "q-tuning, mask": loop_of(QTuning(keep_rows=0.25, keep_tokens=0.7), data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(STEPS):
        for name, loop in arms.items():
            started = time.perf_counter()
            loop.step()
            seconds[name].append(time.perf_counter() - started)
    out: dict[str, Any] = {**machine_note(), "window": WINDOW, "steps": STEPS, "arms": {}}
    for name, loop in arms.items():
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["sft"][1:], strict=True)]
        loss = mean_loss(Scoring(4096).losses(loop.view, held))
        spent = sum(loop.progress.flops.values()) / sum(arms["sft"].progress.flops.values())
        out["arms"][name] = {
            "times the step of sft": round(statistics.median(ratios), 3),
            "work against sft": round(spent, 3),
            "seconds a step": round(statistics.median(seconds[name][1:]), 2),
            "held-out loss": round(loss, 4),
        }
        print(name, out["arms"][name], flush=True)
    (HERE / "results" / "drop_mode.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
