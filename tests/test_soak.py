"""Hours, not minutes: `make soak`."""

import json
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import LUTHIER, luthier, write

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(
    "tuner", [{"lora": {"rank": 4}}, {"spiel": {"density": 0.05, "reselect_every": 6, "window": 2}}, "full"]
)
def test_twenty_random_kills_leave_the_same_weights(tuner, model_folder, tmp_path):
    """SIGKILL at random moments, start-up, checkpoints and the end included; the same command goes on each time."""
    keys = {"tuner": tuner, "epochs": 6, "save_steps": 1, "evaluate": [], "batch_size": 2}
    whole, killed = write(tmp_path / "whole", model_folder, **keys), write(tmp_path / "killed", model_folder, **keys)
    started = time.monotonic()
    assert luthier("run", whole, cwd=tmp_path).returncode == 0
    seconds, draw, kills = time.monotonic() - started, random.Random(0), 0
    while kills < 20:
        child = subprocess.Popen(
            [*LUTHIER, "run", str(killed)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            child.wait(draw.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        state = tmp_path / "killed/out/run.json"
        if state.exists() and json.loads(state.read_text()).get("state") == "done":
            break
    assert luthier("run", killed, cwd=tmp_path).returncode == 0
    names = [p.name for p in (tmp_path / "whole/out").glob("*.safetensors")]
    assert names
    for name in names:
        a, b = (load_file(tmp_path / x / "out" / name) for x in ("whole", "killed"))
        assert all(torch.equal(a[n], b[n]) for n in a), name
    print(f"{tuner}: {kills} kills")
