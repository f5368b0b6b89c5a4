"""What several commands share: arguments, reading a recipe, and keeping libraries quiet. Loads no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(help="A recipe (.yaml); - reads standard input.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value sets a key, ~a.b removes it.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
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


def load(path: Path, overrides: list[str] | None, allow_code: bool = False) -> Any:
    from luthier import recipe

    code = path.parent if allow_code else None
    if str(path) == "-":
        return recipe.load(sys.stdin.read(), "standard input", overrides or [], code)
    return recipe.load_file(path, overrides or [], code)


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
