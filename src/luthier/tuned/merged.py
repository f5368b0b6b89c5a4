"""The record of a merge, beside its update: its members, its method, and how the model is loaded and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from luthier import recipe as recipes
from luthier.model.fingerprint import Fingerprint
from luthier.recipe import Recipe
from luthier.report.card import UNSAID, base_of, front
from luthier.support.errors import LuthierError
from luthier.support.version import __version__

FILE = "merged.json"


class Source(BaseModel, frozen=True, extra="forbid"):
    """A member of a merge: its name, where it was, and the digest of its update."""

    name: str
    folder: str
    update: str


class Merged(BaseModel, frozen=True, extra="forbid"):
    """The record of a merge."""

    luthier: Literal[1] = 1
    method: dict[str, Any]
    """The merger, as {name: {fields}}."""
    members: tuple[Source, ...]
    base: Fingerprint
    asked_as: str
    """The member whose recipe says how the model is loaded and asked."""
    recipe: dict[str, Any]
    """That recipe."""
    recipe_folder: str
    """The folder that its paths are relative to."""
    classes: tuple[str, ...] = ()

    def asked(self, folder: Path, allow_code: bool) -> Recipe:
        """The recipe that says how the model is loaded and asked."""
        code = Path(self.recipe_folder) if allow_code else None
        return recipes.load(json.dumps(self.recipe), str(folder / FILE), code=code)

    def card(self, name: str, relation: str, peft: bool = False) -> str:
        """The model card."""
        (merger,) = self.method
        base = base_of(self.recipe["model"], self.base.name)
        lines = [
            *front(base, name, relation, peft, (merger.rpartition(":")[2],)),
            "",
            f"# {name}",
            "",
            f"Merged by luthier {__version__} from {len(self.members)} updates of {base.name} "
            f"(weights {self.base.weights[:16]}) by {merger}. It is asked as {self.asked_as} is.",
            "",
            "| member | digest of its update |",
            "|---|---|",
            *(f"| {m.name} | {m.update[:16]} |" for m in self.members),
            "",
            UNSAID,
            "",
            "<details><summary>How it was merged</summary>",
            "",
            "```yaml",
            json.dumps(self.method),
            "```",
            "</details>",
            "",
        ]
        return "\n".join(lines)


def merged_in(folder: Path) -> Merged | None:
    """The record in a folder; None if no merge wrote the folder. Raises LuthierError for a record that cannot be read."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        return Merged.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise LuthierError(f"{file}: cannot be read ({str(error).splitlines()[0]}); merge again") from error
