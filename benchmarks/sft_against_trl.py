"""luthier against trl's SFTTrainer on a CPU: SmolLM2-135M, 96 rows of gsm8k, LoRA r=16 on all linear layers, batch 8.

python benchmarks/sft_against_trl.py [--rounds 2] [--rows 96] [--data ../shared/data/gsm8k/train.jsonl.gz]

Every arm is a process of its own (peak memory cannot be told apart otherwise); arms alternate within a round, and ratios
are paired by round. Same token ids, same order, same schedule. Without the data file the built-in requests serve.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

HERE = Path(__file__).parent
LR, ALPHA, RANK = 1e-3, 32, 16
# trl's own defaults, and settings of its that matter on a CPU.
TRL = {
    "trl defaults": {},
    "trl bf16 weights and adapters": {"dtype": "bfloat16", "pure": True},
    "trl bf16 weights and adapters, 1 x 8": {"dtype": "bfloat16", "pure": True, "micro": 1},
    "trl bf16 weights and adapters, 1 x 8, no checkpointing": {
        "dtype": "bfloat16",
        "pure": True,
        "micro": 1,
        "checkpointing": False,
    },
}
OURS = {"luthier": {}, "luthier, 256 tokens a forward": {"tokens_per_forward": 256}}
REFERENCE = "reference in float32"


def examples(data: str, count: int) -> list[dict[str, str]]:
    path = HERE / data
    if not path.exists():
        from luthier.data.builtin.requests import demo_rows

        return [{"prompt": r["prompt"], "completion": r["answer"]} for r in demo_rows()[0][:count]]
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [{"prompt": r["question"], "completion": r["solution"]} for r in rows]


def rendered(data: str, count: int) -> tuple[Any, list[dict[str, Any]], str]:
    from luthier.data.rendering import Renderer
    from luthier.model.loading import BUILTIN, load_tokenizer, locate

    located = locate(BUILTIN)
    tokenizer = load_tokenizer(located)
    renderer = Renderer(tokenizer)
    return tokenizer, [renderer.render(r, str(i)) for i, r in enumerate(examples(data, count))], located.path


def run_luthier(rows: list[dict[str, Any]], path: str, **settings: Any) -> dict[str, Any]:
    from luthier.model.loading import Located, load_model
    from luthier.objectives.sft import Sft
    from luthier.step.settings import TrainSettings
    from luthier.training.loop import Loop
    from luthier.tuners.lora import Lora

    view = load_model(Located(path, None, path))
    trainable = Lora(rank=RANK, alpha=ALPHA).attach(view)
    loop = Loop(view, rows, trainable, Sft(), TrainSettings(learning_rate=LR, batch_size=8, shuffle=False, **settings))
    started = time.perf_counter()
    progress = loop.run()
    return {"seconds": time.perf_counter() - started, "losses": [e["loss"] for e in progress.log]}


def run_reference(rows: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """transformers' own model and loss with plain factors from the same start; float32; one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, get_scheduler

    from luthier.model.anatomy import Anatomy
    from luthier.support.rng import Streams
    from luthier.tuners.lora import initial_a

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.requires_grad_(False)
    params = []
    for x in Anatomy(model).match("all-linear"):
        module = model.get_submodule(x.module)
        a = torch.nn.Parameter(initial_a(x, RANK, Streams(0)))
        b = torch.nn.Parameter(torch.zeros(x.shape[0], RANK))
        plain = module.forward
        module.forward = lambda h, plain=plain, a=a, b=b: plain(h) + ALPHA / RANK * ((h @ a.T) @ b.T)
        params += [a, b]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    total = len(rows) // 8
    scheduler = get_scheduler("linear", optimizer, round(0.1 * total), total)
    losses, started = [], time.perf_counter()
    for step in range(total):
        part = rows[step * 8 : step * 8 + 8]
        tokens, value = sum(sum(y != -100 for y in r["labels"][1:]) for r in part), 0.0
        for r in part:
            logits = model(input_ids=torch.tensor([r["ids"]])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(r["labels"][1:]), reduction="sum") / tokens
            loss.backward()
            value += float(loss)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(value)
    return {"seconds": time.perf_counter() - started, "losses": losses}


def run_trl(
    rows: list[dict[str, Any]], path: str, tokenizer: Any, dtype: str | None = None, pure: bool = False, micro: int = 8,
    checkpointing: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    import tempfile

    import datasets
    import torch
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    table = datasets.Dataset.from_list(
        [{"input_ids": r["ids"], "completion_mask": [int(y != -100) for y in r["labels"]]} for r in rows]
    )
    more: dict[str, Any] = {} if checkpointing is None else {"gradient_checkpointing": checkpointing}
    if dtype:
        more["model_init_kwargs"] = {"dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, num_train_epochs=1,
            learning_rate=LR, lr_scheduler_type="linear", warmup_steps=round(0.1 * (len(rows) // 8)), weight_decay=0.0,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, max_length=None,
            completion_only_loss=True, **more,
        )  # fmt: skip
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = InOrder(model=path, args=args, train_dataset=table, processing_class=tokenizer, peft_config=config)
        if pure:
            trainer.model.to(torch.bfloat16)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e]}


def child(arm: str, data: str, count: int) -> None:
    if arm in OURS:
        from luthier.support import machine

        machine.prepare()  # as the command line does
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer, rows, path = rendered(data, count)
    if arm in OURS:
        result = run_luthier(rows, path, **OURS[arm])
    elif arm == REFERENCE:
        result = run_reference(rows, path)
    else:
        result = run_trl(rows, path, tokenizer, **TRL[arm])
    tokens = sum(len(r["ids"]) for r in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        "RESULT "
        + json.dumps({**result, "tokens_per_second": tokens / result["seconds"], "peak_bytes": peak, "tokens": tokens})
    )


def measured(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    env = {
        **os.environ,
        "GOMP_SPINCOUNT": "10000",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, __file__, "--arm", arm, "--rows", str(args.rows), "--data", args.data]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result = json.loads(line[7:])
    print(
        f"{arm}: {result['tokens_per_second']:.0f} tokens/s, {result['peak_bytes'] / 1e9:.2f} GB",
        file=sys.stderr,
        flush=True,
    )
    return result


def matrix_rate() -> float:
    """bf16 multiply-adds this machine makes at these shapes, FLOP/s: 512 x 576 x 1536, both directions, best of 5."""
    import torch

    x, w = torch.randn(512, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(100):
            x @ w.T
        best = max(best, 100 * 2 * 512 * 576 * 1536 / (time.perf_counter() - started))
    return best


def summary(runs: dict[str, list[dict[str, Any]]], rate: float) -> dict[str, Any]:
    median = lambda arm, key: statistics.median(r[key] for r in runs[arm])  # noqa: E731
    trl = [a for a in runs if a.startswith("trl")]
    best = max(trl, key=lambda a: median(a, "tokens_per_second"))
    paired = lambda a, b, key: statistics.median(x[key] / y[key] for x, y in zip(runs[a], runs[b], strict=True))  # noqa: E731
    reference = runs[REFERENCE][0]["losses"]
    worst = max(abs(a - b) / b for a, b in zip(runs["luthier"][0]["losses"], reference, strict=True))
    weights, head = 106_168_320, 49152 * 576
    supervised = 0.75
    flops = 4 * weights + 4 * supervised * head + 6 * 4_884_480
    slim = "luthier, 256 tokens a forward"
    frugal = min(trl, key=lambda a: median(a, "peak_bytes"))
    return {
        "table": {
            a: {
                "tokens_per_second": round(median(a, "tokens_per_second")),
                "peak_GB": round(median(a, "peak_bytes") / 1e9, 2),
            }
            for a in runs
        },
        "speed over trl's defaults (bar 3.0)": round(paired("luthier", "trl defaults", "tokens_per_second"), 2),
        f"speed over trl's best, {best} (bar 1.8)": round(paired("luthier", best, "tokens_per_second"), 2),
        "peak memory over trl's defaults (bar 0.40)": round(paired("luthier", "trl defaults", "peak_bytes"), 2),
        f"256 tokens a forward: speed over {best} (bar 1.5)": round(paired(slim, best, "tokens_per_second"), 2),
        f"256 tokens a forward: peak memory over {best} (bar 1.0)": round(paired(slim, best, "peak_bytes"), 2),
        f"256 tokens a forward: peak memory over the smallest, {frugal}": round(paired(slim, frugal, "peak_bytes"), 2),
        "largest relative difference of a step's loss to float32 (bar 0.01)": round(worst, 4),
        "bf16 matrix rate, GFLOP/s": round(rate / 1e9),
        "share of that rate in LoRA's matrix products (bar 0.40)": round(
            median("luthier", "tokens_per_second") * flops / rate, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--data", default="../../shared/data/gsm8k/train.jsonl.gz")
    args = parser.parse_args()
    if args.arm:
        child(args.arm, args.data, args.rows)
        return
    note, rate = machine_note(), matrix_rate()
    runs: dict[str, list[dict[str, Any]]] = {REFERENCE: [measured(REFERENCE, args)]}
    for _ in range(args.rounds):
        for arm in [*OURS, *TRL]:
            runs.setdefault(arm, []).append(measured(arm, args))
    result = {
        **note,
        "rows": args.rows,
        "rounds": args.rounds,
        "tokens": runs["luthier"][0]["tokens"],
        **summary(runs, rate),
        "runs": {a: [{k: r[k] for k in ("seconds", "peak_bytes", "losses")} for r in v] for a, v in runs.items()},
    }
    (HERE / "results" / "sft_against_trl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
