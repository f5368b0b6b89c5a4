"""Run under torchrun by test_two_processes: steps of the loop on two ranks, then a whole run by the command line.

Arguments: the file that the first rank writes its steps to, and a recipe.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from accelerate import Accelerator

from helpers.equalities import RANKS, SETTINGS, rows, trained
from luthier.objectives.sft import Sft
from luthier.testing.models import view_of
from luthier.training import checkpoint
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora


def resumed(accelerator: Accelerator, folder: Path) -> dict:
    """Losses of four steps with dropout, and of two, a checkpoint and two more."""

    def loop() -> Loop:
        view = view_of()
        trainable = Lora(rank=4, dropout=0.3).attach(view)
        return Loop(view, rows(), trainable, Sft(), SETTINGS, folder=folder, accelerator=accelerator)

    whole, first = loop(), loop()
    losses = [whole.step()["loss"] for _ in range(4)]
    parts = [first.step()["loss"] for _ in range(2)]
    first.save()
    again = loop()
    again.resume()
    parts += [again.step()["loss"] for _ in range(2)]
    ranks = checkpoint.load(folder / "checkpoint-2")["rng"]["ranks"]
    return {"whole": losses, "parts": parts, "ranks": [r["cpu"].tolist() for r in ranks]}


def command(recipe: Path) -> None:
    """`luthier run` in both ranks."""
    from luthier.cli import main as luthier

    sys.argv = ["luthier", "run", str(recipe)]
    luthier()
    sys.stdout.flush()


def main() -> None:
    accelerator = Accelerator(cpu=True)
    out = {name: trained(name, accelerator) for name in RANKS}
    out["resumed"] = resumed(accelerator, Path(sys.argv[1]).parent / "checkpoints")
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(out))
    command(Path(sys.argv[2]))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may hang at interpreter exit


if __name__ == "__main__":
    main()
