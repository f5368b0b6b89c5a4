"""A checkpoint is on disk completely or not at all, and only complete ones are found."""

from pathlib import Path

import pytest
import torch

from luthier.support.errors import LuthierError
from luthier.training import checkpoint
from luthier.training.checkpoint import MARKER

FILES = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainable.safetensors", "trainer_state.json"]


def saved(folder, step=3, value=1.0):
    weight = torch.nn.Parameter(torch.full((2, 3), value))
    tensors = {"weight": weight, "turned": weight.T, "again": weight}  # not contiguous; one memory under two names
    return checkpoint.save(
        folder, step, tensors, {"m": torch.ones(2)}, {"last": 7}, {"cpu": torch.zeros(4)}, {"step": step}
    )


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    folder = tmp_path / "runs" / "new"
    path = saved(folder)
    found = checkpoint.load(path)
    assert path == folder / "checkpoint-3" and sorted(p.name for p in path.iterdir()) == sorted([*FILES, MARKER])
    assert {n: t.tolist() for n, t in found["tensors"].items()} == {
        "weight": [[1.0] * 3] * 2, "again": [[1.0] * 3] * 2, "turned": [[1.0] * 2] * 3,
    }  # fmt: skip
    assert found["optimizer"]["m"].tolist() == [1.0, 1.0] and found["rng"]["cpu"].tolist() == [0.0] * 4
    assert found["scheduler"] == {"last": 7} and found["state"] == {"step": 3}


def test_every_file_is_on_disk_before_the_folder_has_its_name_and_the_mark_comes_last(tmp_path, monkeypatch):
    said = []

    def sync(path):
        final = tmp_path / "checkpoint-3"
        said.append((path.name, final.exists(), (final / MARKER).exists()))

    monkeypatch.setattr(checkpoint, "sync", sync)
    saved(tmp_path)
    assert sorted(said[:-2]) == [(name, False, False) for name in FILES]
    assert said[-2:] == [(tmp_path.name, True, False), ("checkpoint-3", True, True)]


def test_what_a_kill_left_behind_is_written_over(tmp_path):
    for left in (".checkpoint-3.tmp", "checkpoint-3"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "other").write_text("half")
    path = saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3"] and not (path / "other").exists()


def test_the_newest_complete_one_is_found_by_its_number(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 2):
        saved(tmp_path, step)
    half = saved(tmp_path, 11)
    (half / MARKER).unlink()
    saved(tmp_path, 12).rename(tmp_path / "checkpoint-12-mine")
    path, found = checkpoint.newest(tmp_path)
    assert path == tmp_path / "checkpoint-10" and found["state"] == {"step": 10}


def test_all_but_the_newest_are_deleted_and_a_users_own_stay(tmp_path):
    for step in (9, 10, 2):
        saved(tmp_path, step)
    saved(tmp_path, 1).rename(tmp_path / "checkpoint-1-mine")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1-mine", "checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, damage):
    path = saved(tmp_path)
    if damage == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:5])
    else:
        (path / name).unlink()
    with pytest.raises(LuthierError, match=rf"{name}: cannot be read as a checkpoint .*; use --fresh to start over"):
        checkpoint.newest(tmp_path)
    before = saved(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[0] == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_file_is_not_executed(tmp_path, name):
    path = saved(tmp_path)
    torch.save(Hostile(tmp_path / "trace"), path / name)
    with pytest.raises(LuthierError, match=f"{name}: cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "trace").exists()
