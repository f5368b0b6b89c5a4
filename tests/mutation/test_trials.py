"""A small project with a fault for every way in which one is put in, found or not found."""

import importlib.util
import sys

import pytest

from mutation.mutants import mutants
from mutation.run import OWN, PACKAGE, wanted
from mutation.trials import Lines, Reach, trials

SOURCE = """
from functools import cache

@cache
def start():
    return 10

START = start()

def area(a, b):
    if a < 0:
        return 0
    return a * b

def unseen(a):
    return a + 1

def endless(n):
    while n > 0:
        n -= 1
    return [n]
"""
TESTS = """
import {name}

def test_area():
    assert {name}.area(2, 3) == 6

def test_the_start():
    assert {name}.START == 10

def test_it_ends():
    assert {name}.endless(2) == [0]
"""
NAME = "mutated_example"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    file = tmp_path / f"{NAME}.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("mutation.trials.SPARE_SECONDS", 1.0)
    return file


def outcomes(file, tests):
    (file.parent / "test_example.py").write_text(tests)
    found = mutants(SOURCE)
    seen = trials(file, NAME, [file.parent / "test_example.py"], found, 2).noticed
    return {(m.number, m.change): by for m, by in zip(found, seen, strict=True)}


def test_faults_are_put_in_wherever_they_are_and_the_test_that_notices_is_named(project):
    seen = outcomes(project, TESTS.format(name=NAME))
    assert seen[13, "* becomes /"] == "test_example.py::test_area"
    # Runs while the module is imported.
    assert seen[6, "10 becomes 11"] == "a test, or the import"
    # No test gets here, or knows the bound.
    assert seen[12, "0 becomes 1"] is seen[16, "+ becomes -"] is seen[11, "< becomes <="] is None
    # A loop without an end is ended.
    assert seen[20, "-= becomes +="] == "a limit, or the end of the process"
    assert NAME not in sys.modules and project.read_text() == SOURCE


def test_a_module_that_tests_import_late_is_replaced(project):
    seen = outcomes(project, f"def test_area():\n    import {NAME}\n    assert {NAME}.area(2, 3) == 6\n")
    assert seen[13, "* becomes /"] == "test_example.py::test_area"
    assert seen[20, "-= becomes +="] is None


def test_tests_that_fail_without_a_fault_end_the_trial(project):
    with pytest.raises(SystemExit, match=r"test_example.py::test_wrong fails alone"):
        outcomes(project, f"import {NAME}\ndef test_wrong():\n    assert {NAME}.area(2, 3) == 7\n")


def test_the_lines_that_run_and_the_statement_of_a_fault(project):
    spec = importlib.util.spec_from_file_location(NAME, project)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Lines(project) as watched:
        module.area(1, 2)
    assert watched.lines == {10, 11, 13}
    reach, found = Reach(SOURCE), {(m.number, m.change): m for m in mutants(SOURCE)}
    assert reach.lines(found[11, "< becomes <="]) == {11}
    assert reach.lines(found[20, "-= becomes +="]) == {20}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inspection/nothing.py", "is not a file in"),
        ("cli/listing.py", r"cli/listing.py has no tests of its own: write tests/\.\.\./test_listing.py"),
    ],
)
def test_a_file_without_tests_is_refused_by_name(name, words):
    with pytest.raises(SystemExit, match=words):
        wanted([str(PACKAGE / name)])


def test_a_file_is_judged_by_the_tests_that_are_named_for_it(monkeypatch):
    assert wanted([str(PACKAGE / "inspection/base.py")]) == [PACKAGE / "inspection/base.py"]
    monkeypatch.setitem(OWN, "inspection/base.py", ("inspection/test_gone.py",))
    with pytest.raises(SystemExit, match="names tests/inspection/test_gone.py, which is not a file"):
        wanted([str(PACKAGE / "inspection/base.py")])
