"""Run under torchrun by test_equalities: the same steps on two ranks, printed by the first."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from accelerate import Accelerator

from helpers.equalities import RANKS, trained


def main() -> None:
    accelerator = Accelerator(cpu=True)
    out = {name: trained(name, accelerator) for name in RANKS}
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may hang at interpreter exit


if __name__ == "__main__":
    main()
