"""No code outside of tasks/ asks which task it is: it asks the task."""

import ast
from pathlib import Path

import luthier
from luthier.method import registry

ROOT = Path(luthier.__file__).parent
NAMES = set(registry.names("task"))
# Where a name is no branch: the default of Facts and of Traits, the evaluator classification (its module and its page).
ALLOWED = {"method/base.py": 5, "evaluation/__init__.py": 1, "cli/docs.py": 1}


def declared(tree):
    """Constants within a declaration of traits: Traits(tasks=...)."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Traits"]
    return {id(n) for call in calls for n in ast.walk(call)}


def named(path):
    """Lines with a task's name as text, or with a comparison of something called task."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fine = declared(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES and id(node) not in fine:
            yield node.lineno
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            sides = [node.left, *node.comparators]
            if any(ast.unparse(s).rpartition(".")[2] in ("task", "task.key()") for s in sides):
                yield node.lineno


def test_no_code_outside_of_tasks_branches_on_a_tasks_name():
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        lines = list(named(path)) if not name.startswith("tasks/") else []
        if len(lines) > ALLOWED.get(name, 0):
            found[name] = lines
    assert {"causal-lm", "classification"} <= NAMES and not found, f"ask the task instead: {found}"


def test_the_search_finds_what_it_is_for(tmp_path):
    for line in (
        'if recipe.task == "causal-lm": pass',
        "if exam.task != other: pass",
        'x = 1 if name in ("causal-lm", "masked-lm") else 2',
        'kinds = {"classification": 1}',
    ):
        (tmp_path / "x.py").write_text(line)
        assert list(named(tmp_path / "x.py")), line
    (tmp_path / "x.py").write_text('traits = Traits(tasks=frozenset({"causal-lm"}))')
    assert not list(named(tmp_path / "x.py"))
