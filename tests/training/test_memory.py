"""Gradient checkpointing and compilation change what is kept and how fast it goes, never the numbers."""

import shutil

import pytest
import torch

from luthier.compute.lemo import Lemo
from luthier.objectives.caft import Caft
from luthier.objectives.sft import Sft
from luthier.run.forecast import activations_of
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2)


def steps(kind="llama", tuner=None, objective=None, compute=None, layers=3, **changes):
    view = view_of(kind, layers=layers)
    rows = rows_of((40, 33, 48, 29), answer=8)
    tuner = tuner or Lora(rank=4)
    settings = SETTINGS.model_copy(update=changes)
    loop = Loop(view, rows, tuner.attach(view, total_steps=3), objective or Sft(), settings, compute=compute)
    with activations_of(loop.wrapped) as saved:
        losses = [loop.step()["loss"] for _ in range(3)]
    return losses, max(saved)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "lfm2"])
def test_checkpointing_gives_the_same_numbers_for_less_memory(kind):
    plain, more = steps(kind)
    again, less = steps(kind, gradient_checkpointing=True)
    assert again == pytest.approx(plain, abs=1e-6)
    assert less < 0.5 * more


@pytest.mark.parametrize(
    "case",
    [
        {"tuner": Spiel(density=0.05, reselect_every=3, window=1)},
        {"tuner": Full()},
        {"objective": Caft(allow_untrained_heads=True, weight=0.3)},
        {"compute": Lemo(block_size=2)},
        {"compute": Lemo(block_size=2, mlp_prune_fraction=0.5), "tuner": Lora(rank=4, targets=("q_proj", "v_proj"))},
        {"compute": Lemo(block_size=2), "kind": "gemma3"},
    ],
    ids=["spiel", "full", "caft", "lemo", "lemo with pruned MLPs", "lemo with windows"],
)
def test_checkpointing_beside_methods(case):
    assert steps(**case, gradient_checkpointing=True)[0] == pytest.approx(steps(**case)[0], abs=1e-6)


@pytest.mark.soak  # half a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_numbers():

    assert steps(layers=1, torch_compile=True)[0] == pytest.approx(steps(layers=1)[0], abs=1e-5)
    torch.compiler.reset()
