"""Two processes under torchrun leave what one process leaves: steps of the loop, and a whole run by the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import luthier, rows, write
from helpers.equalities import RANKS, assert_equal, trained

SCRIPT = str(Path(__file__).parents[1] / "helpers/two_ranks.py")
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", SCRIPT]
KEYS = {"evaluate": [], "tokens_per_forward": 60, "adam_eps": 1e-5}


@pytest.fixture(scope="module")
def together(model_folder, tmp_path_factory):
    """(folder of the run, what the ranks printed, what the first one wrote)."""
    for _ in range(2):  # gloo's rendezvous on a busy machine may stall: once more, then it is a failure
        folder = tmp_path_factory.mktemp("two")
        recipe, steps, log = write(folder, model_folder, train=rows(16), **KEYS), folder / "steps.json", folder / "log"
        with log.open("w") as file:
            child = subprocess.Popen(
                [*COMMAND, str(steps), str(recipe)], stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(100)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        if child.returncode == 0:
            return folder / "out", log.read_text(), json.loads(steps.read_text())
    pytest.fail(log.read_text())


def test_the_steps_of_two_processes_equal_those_of_one(together):
    *_, steps = together
    for name in RANKS:
        assert_equal(trained(name), steps[name])
    assert steps["sft-silent"]["skipped"] == 2
    dropped = steps["resumed"]
    assert dropped["parts"] == dropped["whole"] and dropped["ranks"][0] != dropped["ranks"][1]


def test_the_command_in_two_processes_leaves_one_run_equal_to_that_of_one(together, model_folder, tmp_path):
    """The first process writes and speaks, and the weights are the same."""
    folder, said, _ = together
    assert luthier("run", write(tmp_path, model_folder, train=rows(16), **KEYS), cwd=tmp_path).returncode == 0
    assert said.count("report.html") == 1 and said.count("saved   ") == 1
    ours, theirs = (load_file(x / "adapter_model.safetensors") for x in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in ours)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4
