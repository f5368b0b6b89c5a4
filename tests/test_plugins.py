"""Methods of installed packages: an example package outside the tree, and entry points that go wrong."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from luthier import manifest, recipe
from luthier.errors import LuthierError, RecipeError
from test_run import luthier, write

PACKAGE = Path(__file__).parent / "example_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as pip installs it, in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def with_package(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    manifest.plugins.cache_clear()
    yield
    manifest.plugins.cache_clear()
    sys.modules.pop("luthier_focal", None)


def test_an_installed_method_is_one_of_ours_to_every_command(with_package, model_folder, tmp_path):
    assert "focal" in manifest.names("objective")
    path = write(tmp_path, model_folder, objective={"focal": {"gamma": 1.0}}, evaluate=[])
    done = luthier("run", path, cwd=tmp_path)  # installed by the user: no --allow-code
    assert done.returncode == 0, done.stderr
    assert "focal:" in (tmp_path / "out/recipe.yaml").read_text(), "under its name, not as module:Class"
    assert recipe.load_file(tmp_path / "out/recipe.yaml").objective.gamma == 1.0
    listed = {m["name"]: m for m in json.loads(luthier("methods", "--json", cwd=tmp_path).stdout)}
    assert listed["focal"]["source"]["reference"] == "arXiv:1708.02002" and "sft" in listed
    assert "Focusing strength" in luthier("methods", "focal", cwd=tmp_path).stdout
    assert '"focal"' in luthier("schema", cwd=tmp_path).stdout
    with pytest.raises(RecipeError, match=r"objective\.focal\.gama: there is no such key; did you mean gamma\?"):
        recipe.load("model: a/b\ndata: {train: x.jsonl}\nobjective: {focal: {gama: 1}}\n")


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(RecipeError, match="there is no objective 'focal'"):
        recipe.load("model: a/b\ndata: {train: x.jsonl}\nobjective: focal\n")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("focal", "m:C", "is no KIND.NAME; kinds are tuner"),
        ("optimizer.x", "m:C", "is no KIND.NAME"),
        ("tuner.lora", "m:C", "the tuner 'lora' is there already"),
    ],
)
def test_a_wrong_entry_point_is_named(name, value, words, monkeypatch):
    monkeypatch.setattr(manifest, "entry_points", lambda group: [EntryPoint(name, value, group)])
    manifest.plugins.cache_clear()
    with pytest.raises(LuthierError, match=words):
        manifest.names("tuner")
    manifest.plugins.cache_clear()


@pytest.mark.parametrize(
    ("value", "words"), [("no_such_module:C", "cannot be imported"), ("luthier.rng:Streams", "is no Objective")]
)
def test_a_plug_in_that_is_no_method_is_refused_where_it_is_named(value, words, monkeypatch):
    monkeypatch.setattr(manifest, "entry_points", lambda group: [EntryPoint("objective.x", value, group)])
    manifest.plugins.cache_clear()
    with pytest.raises(LuthierError, match=words):
        recipe.load("model: a/b\ndata: {train: x.jsonl}\nobjective: x\n")
    manifest.plugins.cache_clear()
