"""The list of methods, generated from the classes: `python -m luthier.method.registry` writes methods.json beside this file.

Reading it needs no torch, so `luthier methods` is fast. A test compares it with the classes. Installed packages add
methods by entry points of the group `luthier.methods`, named KIND.NAME (`objective.focal = package.module:Focal`).
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from luthier.method.base import Method
from luthier.method.kinds import KINDS
from luthier.support.errors import LuthierError

GROUP = "luthier.methods"
FILE = Path(__file__).with_name("methods.json")


def read() -> list[dict[str, Any]]:
    """The stored list. Its entries are shared: do not change them."""
    return list(_stored(FILE))


@cache
def _stored(file: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(file.read_text(encoding="utf-8")))


def classes(kind: str) -> dict[str, type]:
    """Method classes of a recipe key, by name; imports them all."""
    module = importlib.import_module(KINDS[kind].package)
    found = (getattr(module, name) for name in module.EXPORTS)
    return {cls.key(): cls for cls in found if issubclass(cls, KINDS[kind].base_class)}


@cache
def plugins() -> dict[tuple[str, str], EntryPoint]:
    """(kind, name) -> entry point of an installed package. Raises LuthierError for a name that is not KIND.NAME, or is taken."""
    out: dict[tuple[str, str], EntryPoint] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        origin = "a package" if point.dist is None else point.dist.name
        if kind not in KINDS or not name:
            raise LuthierError(
                f"{origin}: the entry point {point.name!r} is not KIND.NAME; kinds are {', '.join(KINDS)}"
            )
        if (kind, name) in out or any(m["kind"] == kind and m["name"] == name for m in read()):
            raise LuthierError(f"{origin}: the {kind} {name!r} exists already; rename it or uninstall the package")
        out[kind, name] = point
    return out


def find(kind: str, key: str) -> type:
    """One method class, importing only its module.

    Raises KeyError for an unknown name, LuthierError for a plug-in that cannot be imported.
    """
    if (kind, key) in plugins():
        point = plugins()[kind, key]
        try:
            cls: type = point.load()
        except (ImportError, AttributeError) as error:
            raise LuthierError(f"{point.value}: the plug-in for {kind} {key} cannot be imported ({error})") from error
        return cls
    entry = next((m for m in read() if m["kind"] == kind and m["name"] == key), None)
    if entry is None:
        raise KeyError(key)
    found: type = getattr(importlib.import_module(entry["module"]), entry["class"])
    return found


def names(kind: str) -> list[str]:
    """The names that a recipe key accepts."""
    return [m["name"] for m in read() if m["kind"] == kind] + [n for k, n in plugins() if k == kind]


def is_new(kind: str, name: str) -> bool:
    """True if the room exports the module of this method, but the stored list does not have it yet."""
    exports: dict[str, str] = importlib.import_module(KINDS[kind].package).EXPORTS
    return name.replace("-", "_") in exports.values() and name.replace("_", "-") not in names(kind)


def listed() -> list[dict[str, Any]]:
    """The methods of luthier and of installed packages, whose modules this imports."""
    return [*read(), *(_entry(kind, name, find(kind, name)) for kind, name in plugins())]


def name_of(cls: type) -> str | None:
    """The name of this class in a recipe; None for a class that is neither luthier's nor a plug-in's."""
    for m in read():
        if (m["module"], m["class"]) == (cls.__module__, cls.__name__):
            return str(m["name"])
    value = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for (_, name), point in plugins().items() if point.value == value), None)


def called(cls: type) -> str:
    """What a recipe calls this class: the name of a known method, or module:Class."""
    return name_of(cls) or f"{cls.__module__}:{cls.__qualname__}"


def written(value: Any) -> Any:
    """A value in YAML's types; a method becomes {name: {fields}}."""
    if isinstance(value, Method):
        return {called(type(value)): {n: written(getattr(value, n)) for n in type(value).model_fields}}
    if isinstance(value, BaseModel):
        return {n: written(getattr(value, n)) for n in type(value).model_fields}
    if isinstance(value, (list, tuple)):
        return [written(v) for v in value]
    return {k: written(v) for k, v in value.items()} if isinstance(value, dict) else value


def modules_of(value: Any) -> list[str]:
    """The modules of all methods within a method, a recipe or a list of them, sorted."""
    found: set[str] = set()
    if isinstance(value, Method):
        found.add(type(value).__module__)
    if isinstance(value, BaseModel):
        value = [getattr(value, n) for n in type(value).model_fields]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        found.update(m for item in value for m in modules_of(item))
    return sorted(found)


def build() -> list[dict[str, Any]]:
    """Make the list from the classes."""
    entries = [_entry(kind, key, cls) for kind in KINDS for key, cls in classes(kind).items()]
    return sorted(entries, key=lambda e: (e["kind"], e["name"]))


def _entry(kind: str, key: str, cls: Any) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    schema = cls.model_json_schema()
    required = schema.get("required", [])
    fields = {
        n: {
            "default": _default(cls.model_fields[n].default, f.get("default")),
            "about": f.get("description", "").replace("\n", " "),
            "required": n in required,
        }
        | ({"example": f["examples"][0]} if "examples" in f else {})
        for n, f in schema.get("properties", {}).items()
    }
    source = None if cls.source is None else cls.source._asdict()
    traits = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in cls.traits._asdict().items()}
    more: dict[str, Any] = {"starter": dict(cls.starter)} if hasattr(cls, "starter") else {}
    more |= {"recipe_lines": list(cls.recipe_lines)} if cls.recipe_lines else {}
    return {
        "name": key, "kind": kind, "class": cls.__name__, "module": cls.__module__, "summary": doc.split("\n")[0],
        "doc": doc, "fields": fields, "source": source, "traits": traits, **more,
    }  # fmt: skip


def titles(named: Sequence[tuple[str, str]]) -> list[str]:
    """A title of each (kind, name): the name if no other kind has it, else KIND-NAME."""
    count = Counter(name for _, name in named)
    return [name if count[name] == 1 else f"{kind}-{name}" for kind, name in named]


def _default(value: Any, shown: Any) -> Any:
    """As a recipe has it: a method by its name."""
    return value.key() if hasattr(value, "key") else shown


def main() -> None:
    """Write the list of methods."""
    FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
