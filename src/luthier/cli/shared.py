"""What several commands share: arguments, reading a recipe, and keeping libraries quiet. Loads no torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(help="A recipe (.yaml); - reads standard input.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value sets a key, ~a.b removes it.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; docs/howto/scripting.md names the keys.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run Python code that the recipe names or its model brings.")
]
Fields = Annotated[
    list[str] | None, typer.Option("--set", help="field=value: a field of the method; may be given again.")
]
AllowOurs = Annotated[
    bool, typer.Option("--allow-code", help="Run Python code that --method or the runs' recipes name.")
]
Debug = Annotated[bool, typer.Option(help="Show tracebacks and what libraries say.")]


def to_json(value: Any) -> str:
    """A command's result as one line of JSON. A number that JSON does not have (NaN, infinity) is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


HELP = {"help_option_names": ["-h", "--help"]}
OF_RECIPES = ("run", "train", "check", "curate", "compare")  # commands that take keys of a recipe


def hint(error: Any, words: Sequence[str]) -> str:
    """What to write instead of an option that is a recipe's key; else an empty text."""
    option = str(getattr(error, "option_name", ""))
    key = option.lstrip("-").replace("-", "_")
    if not option.startswith("--") or words[:1] not in [[c] for c in OF_RECIPES]:
        return ""
    from luthier.recipe.schema import stored

    if key.split(".")[0] not in stored()["properties"]:
        return ""
    at = next((i for i, w in enumerate(words) if w.split("=")[0] == option), None)
    value = "VALUE" if at is None else words[at].partition("=")[2] or next(iter(words[at + 1 : at + 2]), "VALUE")
    return f" Keys of the recipe are set without dashes: {key}={value}"


def load(path: Path, overrides: list[str] | None, allow_code: bool = False) -> Any:
    from luthier.recipe import text

    base = folder_of(path)
    code = base if allow_code else None
    if str(path) == "-":
        return text.load(sys.stdin.read(), "standard input", overrides or [], code, base)
    return text.load_file(path, overrides or [], code)


def folder_of(path: Path) -> Path:
    """The folder that paths in this recipe are relative to."""
    from luthier.recipe import text

    return text.folder_of(path)


def method_named(kind: str, name: str, fields: list[str] | None, allow_code: bool = False) -> Any:
    """A method from its name, or module:Class, and field=value. Raises RecipeError.

    With allow_code a module may lie in the working directory.
    """
    from luthier.method.building import Lines, build_method
    from luthier.recipe.text import apply_overrides
    from luthier.support.errors import RecipeError

    values: dict[str, Any] = {}
    for item in fields or []:
        if item.startswith("~") or "=" not in item:
            raise RecipeError("command line", f"--set {item!r} sets no field", "write --set field=value")
    apply_overrides(values, fields or [])
    lines = Lines("command line", {}, frozenset({(kind,)}))
    return build_method(kind, {name: values}, lines, (kind,), Path() if allow_code else None)
