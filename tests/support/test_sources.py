"""Cache keys follow the sources that the computing code imports: a line changed far below makes them stale."""

import shutil
from pathlib import Path

import pytest

import luthier
from luthier.claims import claim
from luthier.support import sources
from luthier.support.sources import code_key, imported, reached

ROOT = Path(luthier.__file__).parent


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to change lines in."""
    return shutil.copytree(ROOT, tmp_path / "luthier", ignore=shutil.ignore_patterns("__pycache__"))


def changed(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")


def fresh(*modules, root):
    sources._key.cache_clear()
    return code_key(*modules, root=root)


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("model/view.py", True), ("model/anatomy.py", True), ("objectives/base.py", False), ("kernels/head.py", True),
        ("inference/scoring.py", True), ("evaluation/exact_match.py", True), ("evaluation/rouge.py", False),
        ("evaluation/__init__.py", True), ("data/rendering.py", True), ("cli/main.py", False),
    ],
)  # fmt: skip
def test_scores_are_stale_where_code_below_them_changed(copy, file, stale):
    asked = ("luthier.evaluation.base", "luthier.evaluation.exact_match")
    before = fresh(*asked, root=copy)
    assert fresh(*asked, root=copy) == before == fresh(*asked, root=ROOT)
    changed(copy / file)
    assert (fresh(*asked, root=copy) != before) == stale


@pytest.mark.parametrize(
    ("file", "stale"),
    [("model/view.py", True), ("objectives/base.py", True), ("tuners/spiel.py", True), ("tuners/lift.py", False)],
)
def test_claims_are_stale_where_code_below_them_changed(copy, tmp_path, monkeypatch, file, stale):
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "mine.py").write_text("from luthier.tuners import Spiel\nfrom luthier.objectives.base import Objective\n")
    monkeypatch.setattr(claim, "code_key", lambda *modules: fresh(*modules, root=copy))
    before = claim._version("mine", "spiel", folder)
    changed(copy / file)
    assert (claim._version("mine", "spiel", folder) != before) == stale
    (folder / "mine.py").write_text("from luthier.tuners import Spiel\n")
    assert claim._version("mine", "spiel", folder) != before, "the experiment itself counts too"


def test_every_kind_of_import_is_followed():
    text = (
        "import luthier.support.files\nfrom luthier.tuners import Lora as L\nfrom luthier.data import store, batch\n"
        "from luthier.step.window import (\n    Clock,  # why\n    Window,\n)\ndef f():\n    from luthier.method import Method\n"
        "from luthier import recipe\nfrom somewhere.luthier import other\n"
    )
    assert list(imported(text)) == [
        "luthier.support.files", "luthier.tuners.lora", "luthier.data.store", "luthier.data.batch", "luthier.step.window",
        "luthier.step.window", "luthier.method", "luthier.recipe",
    ]  # fmt: skip


def test_what_is_reached_is_what_python_would_load():
    names = {str(p.relative_to(ROOT)) for p in reached("luthier.inference.scoring")}
    assert {"__init__.py", "inference/__init__.py", "inference/scoring.py", "model/view.py", "kernels/head.py"} <= names
    assert not any(n.startswith(("cli", "run", "tuners")) for n in names)


def test_a_module_of_somebody_else_counts_with_what_it_imports_of_ours(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("from luthier.support.rng import Streams\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("theirs")
    names = [p.name for p in reached("theirs")]
    assert "theirs.py" in names and "rng.py" in names and "view.py" not in names
    with pytest.raises(KeyError):
        reached("never_imported")
