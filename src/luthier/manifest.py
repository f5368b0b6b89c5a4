"""The list of methods, generated from the classes: `python -m luthier.manifest` writes methods.json beside this file.

Reading it needs no torch, so `luthier methods` answers at once. A test compares it with the classes.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

KINDS = {
    "tuner": ("tuners", "collaboration"),
    "objective": ("objectives",),
    "compute": ("compute",),
    "pipeline": ("pipelines",),
    "curate": ("curation",),
    "evaluate": ("evaluation",),
}
LISTS = ("curate", "evaluate")  # keys that hold a list of methods
FILE = Path(__file__).with_name("methods.json")


def read() -> list[dict[str, Any]]:
    """The stored list."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def classes(kind: str) -> dict[str, type]:
    """Method classes of a recipe key, by name; imports them all."""
    out = {}
    for package in KINDS[kind]:
        module = importlib.import_module(f"luthier.{package}")
        for name in getattr(module, "EXPORTS", {}):
            cls = getattr(module, name)
            out[cls.key()] = cls
    return out


def find(kind: str, key: str) -> type:
    """One method class, importing only its module. Raises KeyError for an unknown name."""
    entry = next(m for m in read() if m["kind"] == kind and m["name"] == key)
    return getattr(importlib.import_module(entry["module"]), entry["class"])


def names(kind: str) -> list[str]:
    """The names a recipe key takes."""
    return [m["name"] for m in read() if m["kind"] == kind]


def build() -> list[dict[str, Any]]:
    """The list from the classes."""
    entries = []
    for kind in KINDS:
        for key, cls in classes(kind).items():
            entries.append(_entry(kind, key, cls))
    return sorted(entries, key=lambda e: (e["kind"], e["name"]))


def _entry(kind: str, key: str, cls: Any) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    schema = cls.model_json_schema()
    required = schema.get("required", [])
    fields = {
        n: {"default": f.get("default"), "about": f.get("description", ""), "required": n in required}
        for n, f in schema.get("properties", {}).items()
    }
    source = None if cls.source is None else cls.source._asdict()
    traits = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in cls.traits._asdict().items()}
    return {
        "name": key, "kind": kind, "class": cls.__name__, "module": cls.__module__, "summary": doc.split("\n")[0],
        "doc": doc, "fields": fields, "source": source, "traits": traits,
    }  # fmt: skip


def main() -> None:
    FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
