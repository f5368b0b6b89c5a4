"""The command line itself: mistakes in what was typed, the version, Ctrl-C. Commands have their tests where their work is.

What typer raises, and how it words a mistake, differs between its versions; these tests run with the oldest and the newest.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import luthier, write
from luthier.method import registry
from luthier.method.kinds import kind_called
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


def test_a_fault_of_ours_leaves_its_traceback_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "listed", lambda: 1 / 0)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    done = luthier("methods", cwd=here)
    assert done.returncode == 1 and "this is a bug in luthier; the traceback is in" in done.stderr
    (file,) = (tmp_path / "cache/errors").iterdir()
    assert str(file) in done.stderr and "ZeroDivisionError" in file.read_text() and not list(here.iterdir())


def test_a_fault_of_ours_in_a_run_leaves_its_traceback_there(model_folder, tmp_path, monkeypatch):
    from luthier.run import execute

    monkeypatch.setattr(execute, "admit", lambda *_: 1 / 0)
    done = luthier("run", write(tmp_path, model_folder), cwd=tmp_path)
    (file,) = (tmp_path / "out").glob("error-*.txt")
    assert done.returncode == 1 and str(file) in done.stderr and "in <lambda>" in file.read_text()


@pytest.mark.parametrize(
    "words", [("-h",), ("run", "-h"), ("collaborate", "-h"), ("collaborate", "tune", "-h")], ids=" ".join
)
def test_h_is_help(words, tmp_path):
    done = luthier(*words, cwd=tmp_path)
    assert done.returncode == 0 and "Usage: luthier" in done.stdout and done.stderr == ""


def test_a_key_of_the_recipe_that_is_written_as_an_option_is_explained(tmp_path):
    for words in (("--learning_rate", "1e-4"), ("--learning-rate=1e-4",)):
        done = luthier("run", "r.yaml", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.endswith(" Keys of the recipe are set without dashes: learning_rate=1e-4\n")
    done = luthier("run", "r.yaml", "--data.limit", "3", cwd=tmp_path)
    assert done.stderr.endswith("data.limit=3\n")
    for words in (("run", "r.yaml", "--nosuch"), ("methods", "--model", "x")):
        assert "without dashes" not in luthier(*words, cwd=tmp_path).stderr


def test_a_method_that_is_misspelt_is_named(tmp_path):
    done = luthier("methods", "lroa", cwd=tmp_path)
    assert done.returncode == 2 and "there is no method or kind called 'lroa'; did you mean lora?" in done.stderr
    assert "did you mean objective?" in luthier("methods", "Objectives", cwd=tmp_path).stderr


def test_a_starter_says_where_its_schema_is(tmp_path):
    first, *_ = luthier("methods", "lora", cwd=tmp_path).stdout.partition("luthier: 1")[0].splitlines()[-1:]
    assert first.startswith("# yaml-language-server: $schema=")
    assert json.loads(Path(first.partition("=")[2]).read_text()) == json.loads(luthier("schema", cwd=tmp_path).stdout)


def test_the_environment_is_json_too(tmp_path):
    told = json.loads(luthier("env", "--json", cwd=tmp_path).stdout)
    assert told["luthier"] == __version__ and {"python", "torch", "transformers"} <= told.keys()


def test_luthier_log_writes_what_is_done_to_standard_error(model_folder, tmp_path, monkeypatch):
    recipe = write(tmp_path, model_folder, evaluate=[], max_steps=1)
    monkeypatch.setenv("LUTHIER_LOG", "loud")
    refused = luthier("check", recipe, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "luthier: LUTHIER_LOG='loud': write debug, info, warning or error\n"
    monkeypatch.setenv("LUTHIER_LOG", "info")
    ours = logging.getLogger("luthier")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "level", ours.level)
    done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 0
    assert any(" INFO luthier.run.execute: saved " in line for line in done.stderr.splitlines()), done.stderr


def test_methods_of_a_kind_by_its_key_or_its_folder(tmp_path):
    curators = [m["name"] for m in registry.read() if m["kind"] == "curate"]
    for name in ("curate", "curation"):
        done = luthier("methods", name, "--json", cwd=tmp_path)
        assert done.returncode == 0 and [m["name"] for m in json.loads(done.stdout)] == curators
    done = luthier("methods", "translators", cwd=tmp_path)
    assert done.returncode == 0 and "ridge" not in curators and "curate" not in done.stdout and "transla" in done.stdout
    done = luthier("methods", "random", cwd=tmp_path)
    assert "keep_fraction" in done.stdout, "a method's name shows its page"
    done = luthier("methods", "curators", cwd=tmp_path)
    assert done.returncode == 2 and "there is no method or kind called 'curators'" in done.stderr
    assert "kinds are tuner, objective" in " ".join(done.stderr.split())


def test_no_method_has_the_name_of_a_kind():
    assert not [m["name"] for m in registry.read() if kind_called(m["name"])]


def test_a_message_about_a_package_that_luthier_does_not_use_is_left_out(caplog):
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    log.warning("another message")
    assert caplog.messages == ["another message"]


def test_claims_that_are_not_here_are_said_to_be_in_a_clone(tmp_path):
    for words in (("--tier", "tiny"), ("no-such-claim",)):
        done = luthier("claim", *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert "claims are in the folder claims of a clone of luthier" in done.stderr and not list(tmp_path.iterdir())


def test_the_bar_moves_in_a_terminal():
    """Its process has a pseudo-terminal, and is told of three steps."""
    import os
    import pty

    code = (
        "import time\nfrom types import SimpleNamespace\nfrom luthier.cli.progress import Bar\n"
        "with Bar() as bar:\n"
        "    for step in (1, 2, 3):\n"
        "        bar.step({'step': step, 'loss': 0.5}, SimpleNamespace(tokens=9, seconds=1.0, step=step), 3)\n"
        "        time.sleep(0.2)\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert all(f"{step}/3".encode() in seen for step in (1, 2, 3)), seen


def test_completion_is_an_option(tmp_path):
    assert "--install-completion" in luthier("--help", cwd=tmp_path).stdout
