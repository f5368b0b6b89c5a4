"""Run under torchrun by test_equalities: the same steps on two ranks, printed by the first."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from accelerate import Accelerator

from helpers.equalities import RANKS, SETTINGS, rows, tuned
from luthier.testing.models import view_of
from luthier.training.loop import Loop


def main() -> None:
    accelerator = Accelerator(cpu=True)
    out = {}
    for name, (tuner, objective) in RANKS.items():
        view = view_of()
        trainable = tuner.attach(view, total_steps=SETTINGS.max_steps)
        loop = Loop(view, rows(), trainable, objective, SETTINGS, accelerator=accelerator)
        losses = [loop.step()["loss"] for _ in range(SETTINGS.max_steps)]
        out[name] = {"losses": losses, "weights": tuned(trainable)}
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may hang at interpreter exit


if __name__ == "__main__":
    main()
