"""The kinds of methods: one table that the recipe, the list of methods, the docs and the contract suite read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from luthier.method.base import Method


class Kind(NamedTuple):
    """A kind of method.

    key      in a recipe; package: the room with its methods; base: name of the class they derive from
    listed   True if the recipe's key holds a list of them
    within   the kind and the field of a method that holds this one, if it is not a key of a recipe
    command, takes  what uses methods of this kind, where no recipe does, and the arguments that it needs
    """

    key: str
    package: str
    base: str
    listed: bool = False
    within: tuple[str, str] | None = None
    command: str | None = None
    takes: str = ""

    @property
    def in_recipe(self) -> bool:
        """True where a recipe has this key itself."""
        return self.within is None and self.command is None

    @property
    def base_class(self) -> type[Method]:
        """The class that methods of this kind derive from; imports its module."""
        module = importlib.import_module(f"{self.package}.base")
        found: type[Method] = getattr(module, self.base)
        return found


TABLE = (
    Kind("tuner", "luthier.tuners", "Tuner"),
    Kind("objective", "luthier.objectives", "Objective"),
    Kind("compute", "luthier.compute", "Compute"),
    Kind("task", "luthier.tasks", "Task"),
    Kind("pipeline", "luthier.pipelines", "Pipeline"),
    Kind("curate", "luthier.curation", "Curator", listed=True),
    Kind("evaluate", "luthier.evaluation", "Evaluator", listed=True),
    Kind("collaborate", "luthier.collaboration", "Collaboration"),
    Kind("decode", "luthier.decoding", "Decoder"),
    Kind("merge", "luthier.merging", "Merger", command="luthier merge", takes="RUN RUN -o FOLDER"),
    Kind("inspect", "luthier.inspection", "Inspector", command="luthier inspect", takes="RUN"),
    Kind("translate", "luthier.collaboration.translators", "Translator", within=("collaborate", "translator")),
)
KINDS = {kind.key: kind for kind in TABLE}
LISTED = tuple(kind.key for kind in TABLE if kind.listed)
SINGLE = tuple(kind.key for kind in TABLE if not kind.listed and kind.in_recipe)


def kind_of(method: object) -> Kind:
    """The kind of a method. Raises TypeError for an object that is not a method."""
    for kind in TABLE:
        if isinstance(method, kind.base_class):
            return kind
    raise TypeError(f"{type(method).__qualname__} derives from none of {', '.join(k.base for k in TABLE)}")
