"""Stored scores of finished runs. They are read without loading a model or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.support.cache import content_of, key_of
from luthier.support.files import write_text
from luthier.support.sources import ROOT, code_key

FILE = "evaluations.json"
BUILTIN = "builtin:"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def known(folder: Path, data: str | None, base_too: bool = True) -> dict[str, Any] | None:
    """The measures of an earlier evaluation of the same weights on the same data; None if there is none."""
    key = _key(folder, data, base_too)
    return None if key is None else _read(folder).get(key)


def remember(folder: Path, data: str | None, values: dict[str, Any], base_too: bool = True) -> None:
    """Store measures, as `measures.beside_base` gives them, beside the run."""
    key = _key(folder, data, base_too)
    if key is not None:
        write_text(folder / FILE, json.dumps({**_read(folder), key: values}))


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(folder: Path, data: str | None, base_too: bool) -> str | None:
    """The key of an evaluation; None if the run is not finished, or its rows are not in a file."""
    try:
        state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        source = data if data is not None else state["eval_file"]
        if state["state"] != "done" or source is None:
            return None
        content = source if source.startswith(BUILTIN) else content_of(Path(source))
        recipe = content_of(folder / "recipe.yaml")
        files = [content_of(f) for f in sorted(folder.glob("*.safetensors"))]
        model = _files_of(state.get("model_files"))
    except (OSError, ValueError, KeyError):
        return None
    code = code_key("luthier.run.ready", *_modules("evaluation"), *_modules("tasks"))
    return key_of(state.get("update_digest"), files, model, content, recipe, code, base_too)


def _files_of(place: str | None) -> list[tuple[str, object]]:
    """The files of a base model on this machine: the content of settings and tokenizer, size and time of weights."""
    if place is None:
        return []
    path = Path(place)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return [(f.name, _stamp(f) if f.suffix in WEIGHTS else content_of(f)) for f in files]


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _modules(room: str) -> list[str]:
    """All modules of a room. Finding out which of its methods the recipe uses would take longer."""
    return sorted(f"luthier.{room}.{f.stem}" for f in (ROOT / room).glob("*.py") if f.stem != "__init__")
