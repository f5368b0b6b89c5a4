"""Methods of installed packages: an example package outside the tree, and entry points that go wrong."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from helpers.commands import luthier, write
from luthier import recipe
from luthier.method import building
from luthier.method import registry as manifest
from luthier.support.errors import LuthierError, RecipeError

PACKAGE = Path(__file__).parents[1] / "example_package"


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


def contract(installed, folder, *words):
    """pytest as the package's author calls it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder), *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_the_contract_suite_serves_a_package_of_somebody_else(installed):
    done = contract(installed, PACKAGE / "tests", "-vv")
    assert done.returncode == 0, done.stdout
    assert "test_packed_alone_and_padded_give_the_same_loss[focal-flat] PASSED" in done.stdout
    assert "in_a_bare_loop" in done.stdout and "detach" not in done.stdout
    assert all("on_a_gpu" in line for line in done.stdout.splitlines() if " SKIPPED " in line)


def test_the_contract_suite_finds_what_is_wrong(installed, tmp_path):
    """A field that nothing reads, a field without documentation, a loss that depends on what a row is packed with."""
    source = (PACKAGE / "src/luthier_focal/__init__.py").read_text()
    wrong = source.replace("weighed(focal(fwd.nll(), self.gamma), fwd.batch).sum()", "fwd.nll().sum() * len(fwd.nll())")
    wrong = wrong.replace('    """Focusing strength; 0 is sft."""\n', "")
    assert wrong.count("self.gamma") == 0
    (tmp_path / "wrong_focal.py").write_text(wrong)
    (tmp_path / "test_it.py").write_text(
        "from wrong_focal import Focal\nfrom luthier.testing.contract import *\nEXAMPLES = [Focal(gamma=1.0)]\n"
    )
    done = contract(installed, tmp_path, "-k", "documented_fields or every_field or packed_alone")
    assert done.returncode == 1
    for words in ("no code reads gamma", "gamma has no documentation", "FAILED test_it.py::test_packed_alone"):
        assert words in done.stdout, done.stdout


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(RecipeError, match="there is no objective called 'focal'"):
        recipe.load("model: a/b\ndata: {train: x.jsonl}\nobjective: focal\n")


def test_a_name_that_no_method_has_is_said_in_words_of_its_kind():
    with pytest.raises(RecipeError, match=r"there is no inspection method called 'spectre'; known are norms"):
        building.method("inspect", "spectre", "command line")
    with pytest.raises(RecipeError, match=r"there is no curator called 'randm'; did you mean random\?"):
        building.method("curate", "randm", "command line")


def test_a_class_that_is_exported_but_not_yet_listed_asks_for_the_docs(monkeypatch):
    import luthier.inspection

    monkeypatch.setitem(luthier.inspection.EXPORTS, "NewOne", "new_one")
    with pytest.raises(RecipeError, match="called 'new-one'; its class is in EXPORTS .*; run make docs"):
        building.method("inspect", "new-one", "command line")
    with pytest.raises(RecipeError, match="called 'newest'; known are norms"):
        building.method("inspect", "newest", "command line")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("focal", "m:C", "is not KIND.NAME; kinds are tuner"),
        ("optimizer.x", "m:C", "is not KIND.NAME"),
        ("tuner.lora", "m:C", "the tuner 'lora' exists already"),
    ],
)
def test_a_wrong_entry_point_is_named(name, value, words, monkeypatch):
    monkeypatch.setattr(manifest, "entry_points", lambda group: [EntryPoint(name, value, group)])
    manifest.plugins.cache_clear()
    with pytest.raises(LuthierError, match=words):
        manifest.names("tuner")
    manifest.plugins.cache_clear()


@pytest.mark.parametrize(
    ("value", "words"),
    [("no_such_module:C", "cannot be imported"), ("luthier.support.rng:Streams", "does not derive from Objective")],
)
def test_a_plug_in_that_is_no_method_is_refused_where_it_is_named(value, words, monkeypatch):
    monkeypatch.setattr(manifest, "entry_points", lambda group: [EntryPoint("objective.x", value, group)])
    manifest.plugins.cache_clear()
    with pytest.raises(LuthierError, match=words):
        recipe.load("model: a/b\ndata: {train: x.jsonl}\nobjective: x\n")
    manifest.plugins.cache_clear()
