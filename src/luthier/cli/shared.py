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
Debug = Annotated[bool, typer.Option(help="Show tracebacks and what libraries say.")]


def load(path: Path, overrides: list[str] | None, allow_code: bool = False) -> Any:
    from luthier import recipe

    code = path.parent if allow_code else None
    if str(path) == "-":
        return recipe.load(sys.stdin.read(), "standard input", overrides or [], code)
    return recipe.load_file(path, overrides or [], code)
