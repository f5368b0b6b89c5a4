"""The command line itself: mistakes in what was typed, the version, Ctrl-C. Commands have their tests where their work is.

What typer raises, and how it words a mistake, differs between its versions; these tests run with the oldest and the newest.
"""

import subprocess
import sys

import pytest

from helpers.commands import luthier
from luthier.method import registry
from luthier.support.version import __version__


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run",), "Missing argument"),
        (("nosuch",), "No such command 'nosuch'"),
        (("run", "--nosuch"), "No such option"),
        (("methods", "--jsn"), "--json"),
        (("run", "r.yaml", "--max-time"), "'--max-time' requires an argument"),
        (("demo", "--steps", "0"), "Invalid value for '--steps'"),
        (("demo", "--steps", "many"), "Invalid value for '--steps'"),
        (("collaborate", "tune", "c", "rows.jsonl"), "Missing option '--name'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_a_mistake_is_said_in_a_line_and_is_the_users(words, says, tmp_path):
    done = luthier(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("luthier: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [(), ("collaborate",)], ids=["luthier", "collaborate"])
def test_without_a_command_the_commands_are_shown(words, tmp_path):
    done = luthier(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: luthier" in done.stdout and done.stderr == "" and not list(tmp_path.iterdir())


def test_help_is_no_failure(tmp_path):
    done = luthier("run", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "Tune a model as a recipe says" in done.stdout and "A recipe (.yaml)" in done.stdout


def test_the_version_is_told_without_torch():
    code = "import sys; from luthier.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"luthier {__version__}\nFalse\n"


def test_ctrl_c_ends_a_command_with_130(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "listed", interrupted)
    done = luthier("methods", cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.strip() == "luthier: interrupted"


def test_a_fault_of_ours_leaves_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "listed", lambda: 1 / 0)
    done = luthier("methods", cwd=tmp_path)
    assert done.returncode == 1 and "this is a bug in luthier; the traceback is in luthier-error.txt" in done.stderr
    assert "ZeroDivisionError" in (tmp_path / "luthier-error.txt").read_text()
