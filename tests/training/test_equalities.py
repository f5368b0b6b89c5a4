"""What must be equal: one batch of eight and eight of one; interrupted and uninterrupted. Two processes: tests/run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.equalities import CASES, RESUMED, SETTINGS, STEPS, assert_equal, rows, to_the_end, trained
from luthier.objectives.sft import Sft
from luthier.step.order import Order, micro_batches
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.training import checkpoint
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.lora import Lora


@pytest.mark.parametrize("name", CASES)
def test_eight_of_one_equal_one_of_eight(name):
    assert_equal(trained(name, tokens_per_forward=10_000), trained(name, tokens_per_forward=1))


def test_order_is_a_pure_function_of_seed_and_step():
    order = Order(10, 4, 2, None, 7, True)
    assert order.total == 6
    first = [order.rows(s) for s in range(6)]
    assert [Order(10, 4, 2, None, 7, True).rows(s) for s in reversed(range(6))] == first[::-1]
    assert sorted(sum(first[:3], [])) == sorted(sum(first[3:], [])) == list(range(10))
    assert first[:3] != first[3:]


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [14, 6, 13, 40, 11, 8, 12, 9]
    for world in (1, 2, 3):
        ranks = micro_batches(lengths, 30, world)
        assert len(ranks) == world
        everything = sorted(i for rank in ranks for part in rank for i in part)
        assert everything == list(range(8))
        assert all(sum(lengths[i] for i in p) <= 30 or len(p) == 1 for rank in ranks for p in rank)
    assert [len(r) for r in micro_batches([3, 3], 30, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(name, tmp_path):
    """In bfloat16, twice over an event; the contract does it in float32 for every method."""
    settings = SETTINGS.model_copy(update={"max_steps": 9})

    def make(folder=None, stop=lambda: False):
        view = view_of()
        view.module.to(torch.bfloat16)
        trainable = RESUMED[name].attach(view, total_steps=9)
        return Loop(view, rows(), trainable, Sft(), settings, folder=folder, stop=stop, data_hash="x")

    whole = make()
    whole.run()
    for at in (3, 7):  # inside a window, and after an event
        counter = iter(range(100))
        with pytest.raises(Interrupted):
            make(tmp_path, stop=lambda c=counter, at=at: next(c) >= (at if at == 3 else 4)).run()
    again = make(tmp_path)
    again.run()
    assert [e["loss"] for e in again.progress.log] == [e["loss"] for e in whole.progress.log]
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    for (n, p), (_, q) in zip(again.view.module.named_parameters(), whole.view.module.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_other_rows_and_damaged_checkpoints_are_refused_and_half_written_ones_passed_over(tmp_path):
    def make(data_hash="x"):
        view = view_of()
        return Loop(view, rows(), Lora(rank=2).attach(view), Sft(), SETTINGS, folder=tmp_path, data_hash=data_hash)

    loop = make()
    loop.step()
    loop.save()
    loop.step()
    loop.save()
    assert make().resume()
    with pytest.raises(LuthierError, match="other rows than data.train"):
        make("y").resume()
    (tmp_path / "checkpoint-2" / checkpoint.MARKER).unlink()
    again = make()
    again.resume()
    assert again.progress.step == 1
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"garbage")
    with pytest.raises(
        LuthierError, match=r"optimizer\.pt: cannot be read as a checkpoint .*; use --fresh to start over"
    ):
        make().resume()


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path, caplog):
    def make():
        view = view_of()
        settings = SETTINGS.model_copy(update={"save_limit": 3})
        return Loop(view, rows(), Lora(rank=2).attach(view), Sft(), settings, folder=tmp_path)

    loop = make()
    for _ in range(3):
        loop.step()
        loop.save()
    (tmp_path / "checkpoint-3" / checkpoint.MARKER).unlink()
    (tmp_path / "checkpoint-2" / "trainable.safetensors").write_bytes(b"garbage")
    again = make()
    assert again.resume() and again.progress.step == 1
    unfinished, damaged = (r.getMessage() for r in caplog.records if r.name == "luthier.training.checkpoint")
    assert unfinished == f"{tmp_path / 'checkpoint-3'} is unfinished, so training goes on from the one before"
    assert "checkpoint-2/trainable.safetensors: cannot be read" in damaged and "goes on from the one before" in damaged


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'boom'}",))

    view = view_of()
    loop = Loop(view, rows(), Lora(rank=2).attach(view), Sft(), SETTINGS, folder=tmp_path)
    loop.save()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with (tmp_path / "checkpoint-0" / file).open("wb") as handle:
            pickle.dump(Bomb(), handle)
        with pytest.raises(LuthierError, match="cannot be read as a checkpoint"):
            loop.resume()
    assert not (tmp_path / "boom").exists()


def test_best_state_and_early_stopping(tmp_path):
    view, losses = view_of(), iter([3.0, 2.0, 2.5, 2.6, 2.7])
    settings = SETTINGS.model_copy(update={"max_steps": 20, "eval_steps": 1, "early_stopping_patience": 2})
    trainable = Lora(rank=2).attach(view)
    states = []

    def evaluate():
        states.append({k: t.clone() for k, t in trainable.state_dict().items()})
        return next(losses)

    loop = Loop(view, rows(), trainable, Sft(), settings, folder=tmp_path, evaluate=evaluate)
    progress = loop.run()
    assert progress.step == 4 and progress.best_step == 2
    assert all(torch.equal(t, states[1][k]) for k, t in trainable.state_dict().items())


def test_nan_stops_with_a_sentence_or_is_skipped():
    def make(**changes):
        view = view_of()
        trainable = Lora(rank=2).attach(view)
        with torch.no_grad():
            next(iter(trainable.b.values())).fill_(float("nan"))
        return Loop(view, rows(), trainable, Sft(), SETTINGS.model_copy(update=changes))

    with pytest.raises(LuthierError, match="step 1: loss nan.*lower learning_rate"):
        make().step()
    loop = make(on_nan="skip")
    before = {k: t.clone() for k, t in loop.trainable.state_dict().items()}
    loop.step()
    assert loop.progress.skipped == 1
    assert all(torch.equal(t.nan_to_num(), before[k].nan_to_num()) for k, t in loop.trainable.state_dict().items())


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.equalities import to_the_end

to_the_end({name!r}, Path({folder!r}))
"""


def last_step(folder):
    return max((int(p.parent.name.split("-")[1]) for p in folder.glob(f"checkpoint-*/{checkpoint.MARKER}")), default=0)


@pytest.mark.parametrize("name", ["spiel", *(pytest.param(n, marks=pytest.mark.soak) for n in ("lora", "full"))])
def test_killed_by_sigkill_and_resumed_ends_on_the_same_weights(name, tmp_path):
    folder = tmp_path / "killed"
    code = KILLED.format(tests=str(Path(__file__).parents[1]), name=name, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and last_step(folder) < 5:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read().decode()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= last_step(folder) < STEPS, "it was killed in the middle"
    again, whole = to_the_end(name, folder), to_the_end(name, tmp_path / "whole")
    assert again.progress.resumed and not whole.progress.resumed
    a, b = whole.trainable.state_dict(), again.trainable.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
