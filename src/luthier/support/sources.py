"""The sources of luthier that a value depends on: everything that its code imports, directly or not.

Cache keys are made from them, so that nobody must list files by hand, and values of older code are never used.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "luthier"
ROOT = Path(__file__).parents[1]
IMPORT = re.compile(
    rf"^[ \t]*(?:from[ \t]+({PACKAGE}(?:\.\w+)*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+({PACKAGE}(?:\.\w+)*))",
    re.MULTILINE,
)
COMMENT = re.compile(r"#[^\n]*")
EXPORT = re.compile(r'^    "(\w+)": "(\w+)",$', re.MULTILINE)  # a lazy package's table: name -> module


def code_key(*modules: str, root: Path = ROOT) -> str:
    """A key that changes with any source that importing these modules can run. It imports none of them.

    modules  of luthier, by their full names; or modules of other packages that are imported already
    Raises KeyError for a module that is neither.
    """
    return _key(modules, root)


@cache
def _key(modules: tuple[str, ...], root: Path) -> str:
    digest = hashlib.sha256()
    for path in reached(*modules, root=root):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def reached(*modules: str, root: Path = ROOT) -> list[Path]:
    """The files of these modules, of their packages, and of all luthier modules that they import, sorted.

    Imports inside functions and for type checkers count too: measuring something again is better than using an outdated value.
    """
    found: dict[Path, None] = {}
    left = [_file(m, root) or Path(str(sys.modules[m].__file__)) for m in modules]
    for module in modules:
        found |= dict.fromkeys(_packages(module, root))
    followed: set[Path] = set()
    while left:
        path = left.pop()
        if path in followed:
            continue
        followed.add(path)
        found[path] = None
        for target in imported(path.read_text(encoding="utf-8"), root):
            found |= dict.fromkeys(_packages(target, root))
            left += [f for f in (_file(target, root),) if f is not None]
    return sorted(found)


def imported(text: str, root: Path = ROOT) -> Iterator[str]:
    """The modules of luthier that a source imports, by their full names."""
    for match in IMPORT.finditer(COMMENT.sub("", text)):
        package, names, plain = match.groups()
        if plain:
            yield plain
            continue
        for part in names.strip("()").split(","):
            words = part.split()
            if words:
                yield _owner(package, words[0], root)


def _owner(package: str, name: str, root: Path) -> str:
    """The module that `from package import name` reads."""
    if _file(f"{package}.{name}", root) is not None:
        return f"{package}.{name}"
    file = _file(package, root)
    if file is not None and file.name == "__init__.py":
        lazily = dict(EXPORT.findall(file.read_text(encoding="utf-8")))
        if name in lazily:
            return f"{package}.{lazily[name]}"
    return package


def _file(module: str, root: Path) -> Path | None:
    """A module's source; None for a module that is not luthier's."""
    first, *parts = module.split(".")
    if first != PACKAGE:
        return None
    path = root.joinpath(*parts)
    for file in (path.with_suffix(".py") if parts else path / "__init__.py", path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _packages(module: str, root: Path) -> list[Path]:
    """The __init__.py of every package above a module of ours: importing it runs them."""
    first, *parts = module.split(".")
    if first != PACKAGE:
        return []
    above = [root.joinpath(*parts[:n]) / "__init__.py" for n in range(len(parts))]
    return [p for p in above if p.is_file()]
