"""The faults that mutation testing puts in, and the table of those that may live."""

import ast
import json

import pytest

from mutation import run
from mutation.mutants import mutants
from mutation.run import OWN, PACKAGE, ROOT, TESTS, Fault, Result, accepted_table, drawn, own_tests, told, wanted


def changes(body):
    source = f"def f(x, y):\n    {body}\n"
    return {(m.change, m.source.splitlines()[1].strip()) for m in mutants(source)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return x + y", {("+ becomes -", "return ((x) - (y))"), ("+ y is dropped", "return (x)")}),
        ("return x / y", {("/ becomes *", "return ((x) * (y))")}),
        ("x -= y", {("-= becomes +=", "x += y")}),
        ("return x < y", {("< becomes <=", "return ((x) <= (y))"), ("< becomes >", "return ((x) > (y))")}),
        ("return x is y", {("is becomes is not", "return ((x) is not (y))")}),
        ("return max(x, y)", {("max becomes min", "return (min(x, y))")}),
        ("return x.sum(y)", {("sum becomes mean", "return (x.mean(y))")}),
        ("return sum(x)", set()),  # there is no plain function of the name mean
        ("return x[2]", {("2 becomes 3", "return x[(3)]"), ("2 becomes 1", "return x[(1)]")}),
        ("return not x", {("not is dropped", "return (x)")}),
        ("return -x", {("the minus is dropped", "return (x)")}),
        ("return x[-1]", {("1 becomes 2", "return x[-(2)]"), ("1 becomes 0", "return x[-(0)]")}),
        ("return x and y", {("and becomes or", "return ((x) or (y))")}),
        ("return True", {("True becomes False", "return False")}),
        ("return x.detach()", {(".detach() is dropped", "return (x)")}),
        ("x.zero_()", {("x.zero_(...) is dropped", "pass")}),
        ("return x if x > y else y", {
            ("> becomes >=", "return x if ((x) >= (y)) else y"), ("> becomes <", "return x if ((x) < (y)) else y"),
            ("the two cases change places", "return (y if x > y else x)"),
        }),
        # The condition's own change turns the cases round already.
        ("return x if x is y else y", {("is becomes is not", "return x if ((x) is not (y)) else y")}),
    ],
)  # fmt: skip
def test_each_fault_is_made_once(body, expected):
    assert changes(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        'raise ValueError(f"{x + 1}")',
        'return f"{x + 1}"',
        '"""x + 1"""',
        "log.info(x + 1)",
        'return "a" + x',
        "z: list[1] = x",
        "return zip(x, y, strict=True)",
    ],
)
def test_what_is_only_said_stays_as_it_is(body):
    assert changes(body) == set()


def test_defaults_decorators_and_what_is_outside_of_functions_stay_as_they_are():
    assert mutants("A = 1 + 2\n@d(1)\ndef f(x=1) -> list[2]:\n    return x\nclass C:\n    y: int = 3\n") == []


def test_a_method_is_changed_and_every_line_keeps_its_number():
    source = (
        "class C:\n    def f(self, größe):\n        return g(\n            größe\n            + 1\n        )  # ü\n"
    )
    for m in mutants(source):
        ast.parse(m.source)
        assert len(m.source.splitlines()) == 6 and m.number == source.splitlines().index(next(
            line for line in source.splitlines() if line.strip() == m.line)) + 1  # fmt: skip
    assert {m.change for m in mutants(source)} == {"+ becomes -", "+ 1 is dropped", "1 becomes 2", "1 becomes 0"}


def test_every_fault_of_a_real_file_can_be_read_by_python():
    made = mutants((PACKAGE / "objectives/otr.py").read_text(encoding="utf-8"))
    assert len(made) > 50 and len({m.source for m in made}) == len(made)
    for m in made:
        ast.parse(m.source)


def test_tests_named_for_a_file_exist():
    for file, tests in OWN.items():
        assert (PACKAGE / file).is_file() and all((TESTS / t).is_file() for t in tests), file
    assert own_tests(PACKAGE / "objectives/otr.py") == [TESTS / "objectives/test_otr.py"]
    assert own_tests(PACKAGE / "data/quadrants.py")[0] == TESTS / "objectives/test_q_tuning.py"


def test_accepted_faults_are_still_made_and_have_a_reason():
    for a in accepted_table():
        made = mutants((ROOT / a["file"]).read_text(encoding="utf-8"))
        for change in a["changes"]:
            assert any((m.line, m.change) == (a["line"], change) for m in made), (a, change)
        assert len(a["reason"]) > 10 and a["changes"], a


def test_accepted_survivors_are_counted_apart():
    file = PACKAGE / "objectives/otr.py"
    faults = [
        Fault(2, "x = 1", "1 becomes 2", "test_x"), Fault(3, "a = b + 1", "1 becomes 2", None),
        Fault(4, "c = -d", "the minus is dropped", None),
    ]  # fmt: skip
    result = Result(faults, 7.4, 0.5)
    counts, lines = told(file, result, {("src/luthier/objectives/otr.py", "c = -d", "the minus is dropped")})
    assert counts == "src/luthier/objectives/otr.py: 3 faults, 1 survived, 1 accepted, 7 s"
    assert lines == ["  3: 1 becomes 2: a = b + 1"]
    assert told(file, None, set())[0] == "src/luthier/objectives/otr.py: no tests of its own"


def test_accepted_faults_that_a_test_notices_by_now_are_named():
    file, name = PACKAGE / "objectives/otr.py", "src/luthier/objectives/otr.py"
    known = {(name, "x = 1", "1 becomes 2"), (name, "y = 1", "1 becomes 2")}
    faults = [
        Fault(2, "x = 1", "1 becomes 2", "test_x"), Fault(5, "x = 1", "1 becomes 2", "test_x"),
        Fault(3, "y = 1", "1 becomes 2", "test_y"), Fault(4, "y = 1", "1 becomes 2", None),
        Fault(6, "z = 1", "1 becomes 2", "test_z"),
    ]  # fmt: skip
    _, lines = told(file, Result(faults, 1.0, 0.5), known)
    assert lines == ["  5: accepted, but noticed by test_x: 1 becomes 2: x = 1"]


def test_the_table_counts_what_is_stored_and_marks_what_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "OUT", tmp_path)
    file, other, third = (PACKAGE / n for n in ("objectives/sft.py", "curation/random.py", "objectives/otr.py"))
    faults = {
        "a": [2, "x = 1", "1 becomes 2", "test_x"],
        "b": [3, "y = 1", "1 becomes 2", None],
        "c": [4, "z = 1", "1 becomes 2", None],
    }
    for path, key in ((file, run.keys_of(file, own_tests(file))["key"] + " for survivors"), (other, "another")):
        run.kept_at(path).write_text(
            json.dumps({"source": "", "key": key, "faults": faults, "seconds": 1.0, "tests": 1.0})
        )
    known = {("src/luthier/objectives/sft.py", "y = 1", "1 becomes 2")}
    made = [len(drawn(f, 1.0)) for f in (file, other)]
    assert list(run.table([file, other, third], known))[2:] == [
        f"| objectives/sft.py | {made[0]} | 3 | 1 | 1 |",
        f"| curation/random.py * | {made[1]} | 3 | 0 | 2 |",
        f"| all of these | {sum(made)} | 6 | 1 | 3 |",
    ]


def test_methods_are_looked_through_and_packages_front_doors_are_not():
    names = {f.relative_to(PACKAGE).as_posix() for f in wanted([])}
    assert {"objectives/otr.py", "curation/scdp.py", "kernels/head.py"} <= names
    assert not any(n.endswith("__init__.py") for n in names) and not any(n.startswith("cli/") for n in names)


def test_a_share_of_the_faults_is_drawn_evenly_and_always_the_same():
    file = PACKAGE / "tuners/spiel.py"
    every, half = drawn(file, 1.0), drawn(file, 0.5)
    assert list(every.values()) == mutants(file.read_text(encoding="utf-8")) and half == drawn(file, 0.5)
    assert drawn(file, 0.25).keys() < half.keys() < every.keys()
    assert 0.4 < len(half) / len(every) < 0.6
