"""The rooms of the package stand on floors: a room imports only from rooms on floors below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import luthier

ROOT = Path(luthier.__file__).parent
FLOORS = (
    ("support",),
    ("kernels", "method", "data"),
    ("model",),
    ("update",),
    ("step",),
    ("tasks",),
    ("inference",),
    ("tuners", "objectives", "compute", "curation", "merging", "decoding", "inspection", "evaluation"),
    ("training",),
    ("pipelines", "collaboration"),
    ("recipe",),
    ("report", "integrations"),
    ("run", "testing"),
    ("claims", "comparison", "federation"),
    ("tuned", "demos"),
    ("cli",),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(("luthier", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in ROOT.rglob("*.py")
}


def room_of(module: str) -> str:
    """The room of a module; "" for those at the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else ""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] == "luthier")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the module out"
            if node.module and node.module.partition(".")[0] == "luthier":
                full = [f"{node.module}.{a.name}" for a in node.names]
                yield from ((node.lineno, f if f in MODULES else node.module) for f in full)


def test_every_folder_is_a_room_on_a_floor():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= set(FLOOR), f"give these a floor: {', '.join(sorted(folders - set(FLOOR)))}"
    assert len(FLOORS) <= 16


def test_at_most_six_modules_lie_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 6


def test_rooms_import_from_lower_floors_only():
    upward = []
    for module, path in MODULES.items():
        here = room_of(module)
        for line, target in imported(path):
            there = room_of(target)
            if here and (not there or (there != here and FLOOR[there] >= FLOOR[here])):
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not upward, "\n".join(upward)


def test_no_circle_within_a_room():
    graph = {m: {t for _, t in imported(p) if t in MODULES and t != m} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
