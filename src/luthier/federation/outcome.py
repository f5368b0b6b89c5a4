"""The result of a collaboration: an update's folder that also says which model it belongs to and how to prompt it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from luthier.collaboration.agreement import Rendering
from luthier.federation.folder import Workspace
from luthier.model.fingerprint import Fingerprint
from luthier.model.loading import locate
from luthier.recipe import Recipe
from luthier.recipe.settings import DataSettings
from luthier.report.card import UNSAID, base_of, front
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import write_text
from luthier.update import Update
from luthier.update.files import save_update

FILE = "given.json"


class Given(BaseModel, frozen=True, extra="forbid"):
    """What is needed to use an update, besides the update."""

    luthier: Literal[1] = 1
    protocol: str
    contract: str
    """Digest of the contract."""
    model: str
    """Where the base model is: a folder, a .gguf file, a Hub id."""
    base: Fingerprint
    """The fingerprint that the base model must have."""
    rendering: Rendering

    def recipe(self, rows: str | None) -> Recipe:
        """A recipe that loads the base model, and scores rows of a file as all parties rendered theirs; None: no rows."""
        data = DataSettings(train=rows or "", eval=rows, **self.rendering.model_dump())
        return Recipe(model=self.model, data=data)

    def card(self, name: str, relation: str, peft: bool = False) -> str:
        """The model card."""
        base = base_of(self.model, self.base.name)
        lines = [
            *front(base, name, relation, peft, (self.protocol,)),
            "",
            f"# {name}",
            "",
            f"Given by luthier's {self.protocol}: several parties tuned together, and none showed its rows to another. For "
            f"{base.name} (weights {self.base.weights[:16]}), under the contract {self.contract[:16]}.",
            "",
            UNSAID,
            "",
        ]
        return "\n".join(lines)


def write_outcome(
    workspace: Workspace, role: str, update: Update, folder: Path, name: str, model_here: bool = True
) -> Path:  # fmt: skip
    """Write an update's files for `luthier.load`, for peft if the update is low-rank, and a model card.

    role        of the model that the update belongs to
    model_here  whether that model is on this machine: peft's file then says where it is
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_update(update, folder, workspace.lab.view(role) if model_here else None)
    given = Given(
        protocol=workspace.protocol.key(), contract=workspace.contract.digest, model=workspace.models[role], base=update.base,
        rendering=workspace.contract.rendering,
    )  # fmt: skip
    write_text(folder / FILE, given.model_dump_json(indent=1))
    write_text(folder / "README.md", given.card(name, "adapter", peft=(folder / "adapter_model.safetensors").exists()))
    return folder


def read_given(folder: Path) -> Given | None:
    """What a collaboration left in a folder; None for other folders. Raises LuthierError for a file that cannot be used, or a
    model that is not at its path."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        given = Given.model_validate_json(file.read_bytes())
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise LuthierError(f"{file}: cannot be read ({first}); ask for the result again") from error
    try:
        locate(given.model)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error.where}", error.what, "write its path on this machine") from error
    return given
