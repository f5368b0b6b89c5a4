"""Five methods on our loop and on a subclass of Trainer: equal numbers, lines, speed, checkpoints that survive SIGKILL.

python benchmarks/loop_decision.py                    writes benchmarks/results/loop_decision.json
python benchmarks/loop_decision.py --two-processes    measures that part anew, and says so in the file
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch
import transformers
from machine_note import machine_note
from trainer_loop import train

from luthier.objectives.caft import Caft
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training import checkpoint
from luthier.training.loop import Loop
from luthier.tuners.fedkseed import FedKSeed
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

transformers.logging.set_verbosity_error()
STEPS = 30
FIVE = {
    "full, sft": (Full(), Sft()),
    "spiel, sft": (Spiel(density=0.05, reselect_every=6, window=2), Sft()),
    "lora, q-tuning": (Lora(rank=4), QTuning(keep_rows=0.5)),
    "lora, caft": (Lora(rank=4), Caft(allow_untrained_heads=True, weight=0.3)),
    "fedkseed": (FedKSeed(num_seeds=8), Sft()),
}

RANKED = [n for n, methods in FIVE.items() if not any("one_process" in m.traits.needs for m in methods)]


def make(name: str, folder: Path | None = None, **sizes: Any) -> Loop:
    tuner, objective = FIVE[name]
    constant = {"lr_scheduler_type": "constant", "warmup_fraction": 0.0} if name == "fedkseed" else {}
    settings = TrainSettings(
        max_steps=STEPS, batch_size=8, learning_rate=1e-3, tokens_per_forward=60, adam_eps=1e-6, **constant
    )
    rows = rows_of((24, 16, 23, 25, 21, 18, 22, 19, 17, 20), answer=8)
    view = view_of(**sizes)
    return Loop(view, rows, tuner.attach(view, total_steps=STEPS), objective, settings, folder=folder)


def weights(loop: Loop) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in loop.trainable.parameters()])


def equal_numbers() -> dict[str, float]:
    """Largest difference of trained values after the run, by method."""
    out = {}
    for name in FIVE:
        ours, theirs = make(name), make(name)
        for _ in range(STEPS):
            ours.step()
        train(theirs)
        out[name] = float((weights(ours) - weights(theirs)).abs().max())
    return out


def speed(rounds: int = 5) -> dict[str, float]:
    """Median of paired ratios, Trainer's time over ours, alternating in one run (a model of 12 million weights)."""
    sizes = {
        "hidden_size": 320,
        "intermediate_size": 1024,
        "layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    }
    ratios: dict[str, list[float]] = {n: [] for n in FIVE}
    for _ in range(rounds):
        for name in FIVE:
            ours, theirs = make(name, **sizes), make(name, **sizes)
            started = time.perf_counter()
            for _ in range(STEPS):
                ours.step()
            middle = time.perf_counter()
            train(theirs)
            ratios[name].append((time.perf_counter() - middle) / (middle - started))
    return {n: statistics.median(r) for n, r in ratios.items()}


def over_ranks(file: str, ours: bool) -> None:
    """Under torchrun: each method's trained values after the run, and its seconds, written by the first process."""
    out = {}
    for name in RANKED:
        loop = make(name)
        started = time.perf_counter()
        if ours:
            for _ in range(STEPS):
                loop.step()
        else:
            train(loop)
        out[name] = {"seconds": time.perf_counter() - started, "weights": weights(loop).tolist()}
    if loop.accelerator.is_main_process:
        Path(file).write_text(json.dumps(out), encoding="utf-8")


def two_processes(folder: Path) -> dict[str, Any]:
    """Both loops over two gloo processes: largest difference to one process of the same loop; Trainer's time over ours."""
    results: dict[bool, dict[str, Any]] = {}
    for ours in (True, False):
        file = folder / f"ranks-{ours}.json"
        code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        script = folder / f"ranks-{ours}.py"
        script.write_text(f"{code}import loop_decision\nloop_decision.over_ranks({str(file)!r}, {ours})\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            error = next((x for x in done.stderr.splitlines() if "Error" in x), done.stderr[-300:])
            return {"failed": f"{'ours' if ours else 'Trainer'}: {error}"}
        results[ours] = json.loads(file.read_text())
    alone = {}
    for name in RANKED:
        loop = make(name)
        for _ in range(STEPS):
            loop.step()
        alone[name] = weights(loop)
    return {
        "largest difference to one process": {
            label: {n: float((torch.tensor(results[o][n]["weights"]) - alone[n]).abs().max()) for n in RANKED}
            for label, o in (("ours", True), ("Trainer", False))
        },
        "Trainer's time over ours": {n: results[False][n]["seconds"] / results[True][n]["seconds"] for n in RANKED},
    }


def code_lines(file: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    source = file.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(t.strip()) and not t.strip().startswith("#") and n not in docs for n, t in lines)


def overrides() -> int:
    tree = ast.parse((HERE / "trainer_loop.py").read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SeamTrainer")
    return sum(isinstance(n, ast.FunctionDef) and n.name != "__init__" for n in cls.body)


CHILD = """
import sys
sys.path.insert(0, {here!r})
import loop_decision as d
from pathlib import Path
d.STEPS = 2000
loop = d.make("full, sft", Path({folder!r}), hidden_size=192, intermediate_size=512, num_attention_heads=4)
if {ours!r}:
    loop.settings = loop.settings.model_copy(update=dict(save_steps=1))
    loop.run()
else:
    from trainer_loop import train
    train(loop, {folder!r}, save_strategy="steps", save_steps=1, save_total_limit=2)
"""


def survives(ours: bool, kills: int, base: Path) -> int:
    """Kills after which the newest checkpoint that the tool itself would choose can be loaded."""
    good = 0
    for k in range(kills):
        folder = base / f"{'ours' if ours else 'trainer'}-{k}"
        code = CHILD.format(here=str(HERE), folder=str(folder), ours=ours)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folder.exists() and len(list(folder.glob("checkpoint-*"))) >= 2) and child.poll() is None:
            time.sleep(0.005)
        time.sleep(random.Random(k).random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        good += loads(folder, ours)
    return good


def loads(folder: Path, ours: bool) -> bool:
    from safetensors.torch import load_file
    from transformers.trainer_utils import get_last_checkpoint

    chosen = checkpoint.newest(folder) if ours else Path(get_last_checkpoint(str(folder)))
    try:
        load_file(chosen / "trainable.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            # Files this script's own child wrote a moment ago; Trainer's rng_state.pth holds NumPy objects.
            torch.load(chosen / name, weights_only=False)
        json.loads((chosen / "trainer_state.json").read_text())
    except Exception as error:
        print("unusable:", chosen.name, type(error).__name__, file=sys.stderr)
        return False
    return True


def main() -> None:
    import tempfile

    kills, target = 10, HERE / "results" / "loop_decision.json"
    if "--two-processes" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            anew = {**machine_note(), **two_processes(Path(folder))}
        result = {**json.loads(target.read_text(encoding="utf-8")), "two processes": anew}
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            **machine_note(),
            "largest difference of trained values": equal_numbers(),
            "Trainer's time over ours, median of 5": speed(),
            "lines of code, our loop": code_lines(HERE.parent / "src/luthier/training/loop.py"),
            "lines of code, Trainer subclass (which borrows our window, reduction and micro-batch loop)": code_lines(
                HERE / "trainer_loop.py"
            ),
            "methods of Trainer overridden": overrides(),
            "two processes": two_processes(Path(folder)),
            "usable newest checkpoint after SIGKILL": {
                "ours": f"{survives(True, kills, Path(folder))} of {kills}",
                "Trainer": f"{survives(False, kills, Path(folder))} of {kills}",
            },
        }
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
