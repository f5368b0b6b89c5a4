"""A file or folder is there whole or not at all, and what killed processes left goes."""

import os
import subprocess
import sys

import pytest

from luthier.support.files import replaced, sweep, whole, write_text


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(OSError), replaced(file) as temporary:
        temporary.write_text("half")
        raise OSError("disk is full")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError), whole(tmp_path / "b") as folder:
        (folder / "x").write_text("half")
        raise OSError("disk is full")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_next_write_removes_what_a_killed_one_left_and_no_others(tmp_path, dead):
    mine, other = tmp_path / f".a[1].json.{dead}", tmp_path / f".b.json.{dead}"
    alive = tmp_path / f".a[1].json.{os.getppid()}"
    for file in (mine, other, alive):
        file.write_text("half")
    write_text(tmp_path / "a[1].json", "new")
    assert not mine.exists() and other.exists() and alive.exists()
    sweep(tmp_path)
    assert not other.exists() and alive.exists()
