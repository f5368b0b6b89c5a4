"""Habits of this repository: what a reader may rely on without looking."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
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
