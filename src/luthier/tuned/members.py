"""Several finished runs or adapters of one base, checked against each other before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.federation import outcome
from luthier.method import Facts, Method
from luthier.method.kinds import kind_of
from luthier.model.fingerprint import Fingerprint
from luthier.recipe import DataSettings, Recipe
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError, RecipeError
from luthier.tuned import merged
from luthier.tuned.open import Use, lab_of, use_of
from luthier.update import Update
from luthier.update.files import adapter_base, base_of, load, load_adapter

SAYS = ("run.json", outcome.FILE, merged.FILE)  # files that say how a model is loaded and asked
OURS, PEFT = "update.json", "adapter_config.json"


@dataclass(frozen=True)
class Members:
    """Updates in folders, by name.

    use       how their base is loaded and asked, from the first member that says it
    asked_as  the name of that member
    """

    folders: dict[str, Path]
    use: Use
    asked_as: str

    def updates(self, base: Fingerprint) -> dict[str, Update]:
        """Read every update. An adapter that peft alone wrote counts as one of `base`."""
        return {n: load(f) if (f / OURS).exists() else load_adapter(f, base) for n, f in self.folders.items()}

    def lab(self, quantize: bool = True) -> Lab:
        """The services around the members' base. Raises LuthierError if a peft adapter belongs to another model.

        quantize  False: use the original weights even if the recipe holds them in 4 bits
        """
        lab = lab_of(self.use, quantize)
        for folder in self.folders.values():
            if not (folder / OURS).exists():
                _refuse_foreign(folder, self.use, lab)
        return lab


def members_of(folders: Sequence[Path], allow_code: bool = False) -> Members:
    """The members in folders of finished runs, merges, results of a collaboration and adapters.

    Raises LuthierError for a folder that is none of these or is named twice, and if bases, tasks or classes differ.
    """
    named = _named(folders)
    uses = {name: use for name, folder in named.items() if (use := _use(folder, allow_code)) is not None}
    if not uses:
        uses = {n: use for n, f in named.items() if (use := _use_of_adapter(f)) is not None}
    if not uses:
        raise LuthierError(
            f"{folders[0]}: holds an update, and nothing that says where its model is; name a finished run beside it"
        )
    _refuse_other_bases(named)
    first, *others = uses.items()
    for name, use in others:
        _refuse_other_use(first, (name, use))
    return Members(named, first[1], first[0])


def refuse_unsuited(method: Method, use: Use, quantized: bool) -> None:
    """Raises RecipeError if a method declares that it does not work on models like this one.

    quantized  the model's weights are held in 4 bits
    """
    for problem in method.check(Facts(task=use.recipe.task.key(), quantized=quantized)):
        key = f"{kind_of(method).key}.{method.key()}.{problem.key}".rstrip(".")
        raise RecipeError(key, problem.what, problem.remedy)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, or by their paths as given if names are equal."""
    places = [f.resolve() for f in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise LuthierError(f"{folder}: is named twice; name each folder once")
    names = [p.name for p in places]
    return {n if names.count(n) == 1 else str(f): f for n, f in zip(names, folders, strict=True)}


def _use(folder: Path, allow_code: bool) -> Use | None:
    """None for an adapter. Raises LuthierError for what cannot be a member."""
    if any((folder / name).exists() for name in SAYS):
        return use_of(folder, allow_code)
    if not any((folder / name).exists() for name in (OURS, PEFT)):
        raise LuthierError(f"{folder}: is neither a finished run nor an adapter; give the folder of one")
    return None


def _use_of_adapter(folder: Path) -> Use | None:
    """How to load the model that a peft adapter names; None for an update in a form of luthier's own."""
    if not (folder / PEFT).exists():
        return None
    name, revision = adapter_base(folder)
    return Use(Recipe(model=name, revision=revision, data=DataSettings(train="")), Path())


def _refuse_other_bases(named: dict[str, Path]) -> None:
    bases = [(f, base_of(f)) for f in named.values() if (f / OURS).exists()]
    for folder, base in bases[1:]:
        if not base.same_base(bases[0][1]):
            raise _other_base(folder, base, *bases[0])


def _other_base(folder: Path, base: Fingerprint, first: object, its: Fingerprint) -> LuthierError:
    return LuthierError(
        f"{folder}: belongs to {base.name} (weights {base.weights[:12]}, tokenizer {base.tokenizer[:12]}), {first} to "
        f"{its.name} (weights {its.weights[:12]}, tokenizer {its.tokenizer[:12]}); take members of one base"
    )


def _refuse_other_use(first: tuple[str, Use], other: tuple[str, Use]) -> None:
    (name, use), (other_name, other_use) = first, other
    tuned_for, other_for = use.recipe.task.key(), other_use.recipe.task.key()
    if tuned_for != other_for:
        raise LuthierError(f"{other_name}: was tuned for {other_for}, {name} for {tuned_for}; take members of one task")
    if use.classes != other_use.classes:
        raise LuthierError(
            f"{other_name}: its classes are {', '.join(other_use.classes)}, those of {name} {', '.join(use.classes)}; "
            "take members with equal classes"
        )


def _refuse_foreign(folder: Path, use: Use, lab: Lab) -> None:
    """Compare the model that a peft adapter names with the members' own; one that lies in the same place is not loaded again."""
    name, revision = adapter_base(folder)
    view = lab.view()
    if name == view.module.config._name_or_path and revision == use.recipe.revision:
        return
    own = use.recipe.model_copy(update={"model": name, "revision": revision, "quantize": None})
    try:
        base = lab_of(Use(own, Path(), use.classes)).view().base
    except RecipeError as error:
        where = f"{folder / PEFT}: base_model_name_or_path"
        raise RecipeError(where, error.what, "write where that model lies on this machine") from error
    if not base.same_base(view.base):
        raise _other_base(folder, base, "the other members", view.base)
