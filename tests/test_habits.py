"""Habits of this repository: what a reader may rely on without looking."""

import ast
import re
import sys
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from luthier.support.version import __version__

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FILES = sorted(p.relative_to(TESTS).as_posix() for p in TESTS.rglob("*.py"))


def is_test(part):
    return part.startswith("test_") or part == "conftest"


def imported_tests(source):
    """Test modules that a file imports, also in code that it hands to another process as text."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if any(map(is_test, a.name.split(".")))]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a module only where nothing stands between the dots and `import`.
            names = [a.name for a in node.names] if not node.module or node.level else []
            found += [n for n in [node.module or "", *names] if any(map(is_test, n.split(".")))]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"(?m)^\s*(?:from|import) ((?:\w+\.)*(?:test_\w+|conftest)\b)", node.value)
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_test_imports_another(file):
    assert imported_tests((TESTS / file).read_text(encoding="utf-8")) == [], "move what is shared to tests/helpers/"


def test_the_folders_of_tests_are_the_rooms_of_the_package():
    folders = {file.partition("/")[0] for file in FILES if "/" in file} - {"example_package", "helpers", "mutation"}
    rooms = {p.name for p in (ROOT / "src/luthier").iterdir() if p.is_dir()}
    assert folders - rooms == set(), "a test lies in the folder that is called like its subject's"


WORDS = {  # what is not written here -> what is
    r'"""Of [a-z]': "begin with what it is",
    r"\bthe house\b": "luthier",
    r"\bhow-manieth\b": "number of",
    r"\blest\b": "so that ... not",
    r"\bhears? of\b": "is called with",
    r"\buntouched (?:model|base)\b": "base model",
    r"\bsomebody else's\b": "another",
    r"\bthe likeliest\b": "the most likely",
}
READ = [
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "src").rglob("*.html"),
    *(p for p in (ROOT / "docs").rglob("*.md") if p.name != "plan.md"),
    *ROOT.glob("*.md"),
]


def odd_words(text):
    """(phrase, what to write instead) for each phrase of WORDS in a text."""
    return [
        (m.group(), instead) for pattern, instead in WORDS.items() for m in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_what_users_read_uses_the_usual_words():
    found = {p.relative_to(ROOT).as_posix(): odd_words(p.read_text(encoding="utf-8")) for p in READ}
    assert len(found) > 300 and {name: words for name, words in found.items() if words} == {}


def test_an_odd_word_is_found_and_a_usual_one_is_not():
    assert odd_words('def f():\n    """Of all rows."""') == [('"""Of a', "begin with what it is")]
    assert [w for w, _ in odd_words("The untouched model hears of it")] == ["hears of", "untouched model"]
    assert odd_words('"""Rows of the base model; softly, offset, household, molest."""') == []


T = "test_"  # apart, lest these lines be found themselves


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (f"from {T}run import rows", ["test_run"]),
        (f"from collaboration.{T}demo import TINY", ["collaboration.test_demo"]),
        (f"import training.{T}equalities", ["training.test_equalities"]),
        (f"from . import {T}run", ["test_run"]),
        ("from .conftest import exam", ["conftest"]),
        (f"CODE = 'import sys\\nfrom {T}messages import message'", ["test_messages"]),
        ("from helpers.commands import rows\nfrom luthier.testing import tiny", []),
        ("text = 'what test_run leaves'", []),
    ],
)
def test_an_import_of_a_test_is_found(source, names):
    assert imported_tests(source) == names


def read_yaml(file):
    return YAML(typ="safe", pure=True).load((ROOT / file).read_text(encoding="utf-8"))


def readers_in_c(source):
    """Lines on which ruamel may take its parser in C, which is another where ruamel.yaml.clib is installed: the one of 0.2.15
    refuses {train: builtin:requests}.
    """
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    given = [(c.lineno, {k.arg: ast.literal_eval(k.value) for k in c.keywords}) for c in calls if is_yaml(c.func)]
    return [line for line, how in given if how.get("typ", "rt") != "rt" and not how.get("pure")]


def is_yaml(called):
    return getattr(called, "id", getattr(called, "attr", None)) == "YAML"


@pytest.mark.parametrize(
    ("source", "lines"),
    [("YAML()", []), ("YAML(typ='rt')", []), ("YAML(typ='safe', pure=True)", []), ("a = 1\nYAML(typ='safe')", [2]),
     ("yaml.YAML(typ='unsafe', pure=False).load('')", [1])],
)  # fmt: skip
def test_a_reader_in_c_is_found(source, lines):
    assert readers_in_c(source) == lines


def test_yaml_is_read_alike_whatever_is_installed_beside_it():
    files = [p for folder in ("src", "tests", "claims", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    found = {str(p.relative_to(ROOT)): readers_in_c(p.read_text(encoding="utf-8")) for p in files}
    assert {p: lines for p, lines in found.items() if lines} == {}


def test_before_a_commit_the_same_is_checked_as_by_make():
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ncheck: ")[1].split("\n\n")[0].splitlines()[1:]
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe]
    assert [hook["entry"] for hook in repo["hooks"]] == made and len(made) == 3


def test_mypy_is_strict_and_tests_and_scripts_alone_are_looser():
    mypy = PYPROJECT["tool"]["mypy"]
    looser = [module for override in mypy["overrides"] for module in override["module"]]
    folders = {f"{file.partition('/')[0]}.*" for file in FILES if "/" in file} - {"example_package.*"}
    scripts = {"benchmarks.*", "docs.*"}  # claims are a folder of tests, too
    assert mypy["strict"] and sorted(looser) == sorted({f[:-3] for f in FILES if "/" not in f} | folders | scripts)


def test_the_workflow_runs_the_oldest_python_that_is_allowed_and_two_newer():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    minor = int(oldest.split(".")[1])
    assert jobs["newest"]["strategy"]["matrix"]["python"] == [f"3.{minor + i}" for i in range(3)]
    assert f"uv venv --python {oldest}" in [step.get("run") for step in jobs["lowest"]["steps"]]


def names_of(requirements):
    """Distributions that a list of requirements names, spelt as Python compares them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", r).group()).lower() for r in requirements}


def test_what_the_package_imports_is_declared():
    declared = names_of(sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]))
    tops = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops.add((node.module or "luthier").partition(".")[0])
    foreign = tops - sys.stdlib_module_names - {"luthier"}
    installed = packages_distributions()
    undeclared = {t for t in foreign if t in installed and not names_of(installed[t]) & declared}
    assert undeclared == set() and {"torch", "pyarrow", "sklearn"} <= foreign


def test_only_the_extra_that_needs_a_cap_has_one():
    extras = PROJECT["optional-dependencies"]
    assert [d for d in PROJECT["dependencies"] if "<" in d or "==" in d] == []
    assert {e for e, items in extras.items() if any("<" in d or "==" in d for d in items)} == {"federated"}


def test_the_wheel_holds_what_the_package_reads(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (made,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(made).name.startswith(f"luthier-{__version__}-")
    inside = set(zipfile.ZipFile(made).namelist())
    beside = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*") if p.is_file()}
    assert {n for n in beside if "__pycache__" not in n} <= inside
    assert {"luthier/py.typed", "luthier/method/methods.json", "luthier/demos/demo.yaml"} <= inside


def test_two_test_files_of_one_name_lie_in_packages():
    """pytest gives a file outside of a package its bare name, so a second one of that name cannot be collected."""
    ours = [p for p in TESTS.rglob("test_*.py") if not p.is_relative_to(TESTS / "example_package")]
    names = Counter(p.name for p in ours if not (p.parent / "__init__.py").exists())
    assert [name for name, count in names.items() if count > 1] == []
