"""Scores of a finished run that were measured before: read without loading a model, or even torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.support.cache import content_of, key_of
from luthier.support.files import write_text
from luthier.support.sources import ROOT, code_key

FILE = "evaluations.json"
BUILTIN = "builtin:"


def known(folder: Path, data: str | None) -> dict[str, float] | None:
    """Values by measure that an earlier evaluation of these weights on this very data gave; None where there is none."""
    key = _key(folder, data)
    return None if key is None else _read(folder).get(key)


def remember(folder: Path, data: str | None, values: dict[str, float]) -> None:
    """Keep them beside the run."""
    key = _key(folder, data)
    if key is not None:
        write_text(folder / FILE, json.dumps({**_read(folder), key: values}))


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(folder: Path, data: str | None) -> str | None:
    """None where the run is not finished, or its rows are no file."""
    try:
        state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        source = data if data is not None else state["eval_file"]
        if state["state"] != "done" or source is None:
            return None
        content = source if source.startswith(BUILTIN) else content_of(Path(source))
        recipe = content_of(folder / "recipe.yaml")
        files = [content_of(f) for f in sorted(folder.glob("*.safetensors"))]
    except (OSError, ValueError, KeyError):
        return None
    code = code_key("luthier.run.ready", *_modules("evaluation"), *_modules("tasks"))
    return key_of(state.get("update_digest"), files, content, recipe, code)


def _modules(room: str) -> list[str]:
    """All modules of a room: which of its methods the recipe names is not worth the seconds of reading it."""
    return sorted(f"luthier.{room}.{f.stem}" for f in (ROOT / room).glob("*.py") if f.stem != "__init__")
