"""The plan of a comparison: arms over one recipe, a budget, a search for each arm's learning rate, seeds."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from luthier import recipe as recipes
from luthier.method.building import FORM, Lines, validated
from luthier.recipe import Recipe
from luthier.recipe.text import apply_overrides, parse, read_text
from luthier.support.errors import RecipeError
from luthier.support.files import beside

UNITS = ("flops", "tokens", "seconds", "bytes")
_STRICT = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Budget(BaseModel):
    """What every run of every arm may cost. Set exactly one."""

    model_config = _STRICT

    flops: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Floating-point operations of training, selection and curation, by the ledger's formulas."""
    tokens: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Tokens of the rows that an arm gets, whether it trains on them or leaves them out."""
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Wall-clock time of training. Arms then run one at a time."""
    bytes: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Largest size of an update. Steps stay as in each recipe, and an arm with a larger update is refused."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(getattr(self, u) is not None for u in UNITS) != 1:
            raise ValueError(f"write exactly one of {', '.join(UNITS)}")
        return self

    @property
    def unit(self) -> str:
        return next(u for u in UNITS if getattr(self, u) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))


class Search(BaseModel):
    """The same small search for a learning rate in every arm. Its cost is reported."""

    model_config = _STRICT

    trials: int = Field(4, ge=1)
    """Learning rates tried. The recipe's own is the first; the next ones follow the falling loss."""
    factor: float = Field(3.0, gt=1)
    """Factor between neighbouring learning rates."""
    share: float = Field(0.25, gt=0, le=1)
    """Share of a run's budget for each trial."""
    rows: int = Field(100, ge=10)
    """Rows that are cut from the training rows of all arms to score trials."""
    data: str | None = None
    """A file of rows to score trials on, instead of rows cut from training."""
    measure: str | None = None
    """The measure that chooses the learning rate; by default the comparison's primary measure."""


class Foreign(BaseModel):
    """An arm that another program trains, on the same rows. The same code scores it."""

    model_config = _STRICT

    command: str
    """The command to run. {model} {train} {output} {seed} {learning_rate} {steps} {batch_size} {seconds} are filled in. It must
    leave a model or a peft adapter in {output}."""
    like: str | None = None
    """An arm of luthier; the command gets the same number of steps, and the same FLOPs a step are reported. Required unless the
    budget is in seconds."""
    learning_rate: float = Field(1e-4, gt=0)
    """Where the search starts."""


def _form(arm: Any) -> str:
    """The form of an arm: one with a command is trained by another program."""
    foreign = isinstance(arm, Foreign) or (isinstance(arm, Mapping) and "command" in arm)
    return f"{FORM}command" if foreign else f"{FORM}keys"


AnyArm = Annotated[
    Annotated[dict[str, Any], Tag(f"{FORM}keys")] | Annotated[Foreign, Tag(f"{FORM}command")], Discriminator(_form)
]


class Comparison(BaseModel):
    """Arms, and how they are judged."""

    model_config = _STRICT

    luthier: Literal[1] = 1
    """Version of these keys."""
    recipe: dict[str, Any]
    """What the arms share: a recipe, or the path of one."""
    arms: dict[str, AnyArm]
    """Name -> keys of the recipe that differ ("a.b" for nested keys), or a command."""
    baseline: str | None = None
    """The arm that others are compared with; the first by default."""
    budget: Budget | None = None
    """Budget of one run; by default the FLOPs that the baseline's recipe costs."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each arm runs once with each seed; equal seeds mean an equal order of rows."""
    primary: str = "loss"
    """The measure that decides."""
    margin: float = Field(0.0, ge=0)
    """How much better than the baseline an arm must be to count."""
    search: Search | None = Search()
    """null: every arm trains at its recipe's learning rate."""

    @property
    def base_arm(self) -> str:
        return self.baseline or next(iter(self.arms))


def load(path: Path) -> tuple[Comparison, Path]:
    """Read a comparison from a file. Returns it with the folder that its paths are relative to. Raises RecipeError."""
    values, lines = parse(read_text(path), str(path))
    if isinstance(values.get("recipe"), str):
        inner = path.parent / values["recipe"]
        values["recipe"] = parse(read_text(inner), str(inner))[0]
        if inner.parent.resolve() != path.parent.resolve():
            values["recipe"] = moved(values["recipe"], inner.parent.resolve())
    if isinstance(values.get("seeds"), int):
        values["seeds"] = list(range(values["seeds"]))
    return checked(values, str(path), lines), path.parent


def moved(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe from another folder. Names of files and folders in it become paths that begin with this folder."""

    def here(name: Any) -> Any:
        return beside(folder, name) if isinstance(name, str) else name

    out, data = dict(recipe), dict(recipe.get("data") or {})
    for key in {"train", "eval", "pool"} & set(data):
        data[key] = here(data[key])
    if isinstance(data.get("train"), list):
        data["train"] = [{**s, "path": here(s.get("path"))} if isinstance(s, dict) else s for s in data["train"]]
    out |= {"model": here(out["model"])} if "model" in out else {}
    return {**out, "data": data}


def checked(values: Mapping[str, Any], name: str, lines: Mapping[tuple[str, ...], int] | None = None) -> Comparison:
    """A comparison from plain values. Raises RecipeError with the line and key of the first fault."""
    plan: Comparison = validated(Comparison, values, (), Lines(name, lines or {}, frozenset()))
    _consistent(plan, name)
    return plan


def _consistent(plan: Comparison, name: str) -> None:
    if len(plan.arms) < 1 or not plan.seeds:
        raise RecipeError(f"{name}: arms", "nothing to compare", "write at least one arm and one seed")
    if len(set(plan.seeds)) != len(plan.seeds):
        raise RecipeError(f"{name}: seeds", f"{list(plan.seeds)} holds a seed twice", "write each once")
    if plan.base_arm not in plan.arms:
        raise RecipeError(
            f"{name}: baseline", f"there is no arm {plan.base_arm!r}", f"known are {', '.join(plan.arms)}"
        )
    slugs = [slug(a) for a in plan.arms]
    if len(set(slugs)) != len(slugs):
        raise RecipeError(f"{name}: arms", "two names are the same folder", "rename one")
    unit = "flops" if plan.budget is None else plan.budget.unit
    for arm, keys in plan.arms.items():
        if not isinstance(keys, Foreign):
            continue
        if keys.like is None and unit != "seconds":
            what = f"nothing says what a step of the command costs in {unit}"
            raise RecipeError(
                f"{name}: arms.{arm}", what, "name an arm of luthier in like:, or give the budget in seconds"
            )
        if keys.like is not None and not isinstance(plan.arms.get(keys.like), dict):
            raise RecipeError(f"{name}: arms.{arm}.like", f"{keys.like!r} names no arm of this comparison", "name one")
    if isinstance(plan.arms[plan.base_arm], Foreign) and plan.budget is None:
        raise RecipeError(f"{name}: budget", "a command's own cost is not known", "write a budget")


def varied(base: Mapping[str, Any], vary: Sequence[str], **more: Any) -> Comparison:
    """`--vary a.b=x,y`: one arm for each value. Several --vary give all combinations.

    A method that the recipe names with fields keeps them in the arm of its name.
    """
    axes = []
    for item in vary:
        key, equals, text = item.partition("=")
        if not equals:
            raise RecipeError("command line", f"--vary {item!r} names no values", "write --vary key=value,value")
        values = parse(f"v: [{text}]", "command line: --vary")[0]["v"]
        axes.append([(key, _own(base, key, v)) for v in values])
    called = [_names([v for _, v in axis]) for axis in axes]
    arms = {
        " ".join(names): dict(combination)
        for names, combination in zip(itertools.product(*called), itertools.product(*axes), strict=True)
    }
    return checked({"recipe": dict(base), "arms": arms, **more}, "command line")


def _own(base: Mapping[str, Any], key: str, value: Any) -> Any:
    """The recipe's own value of this key, with its fields, if `value` is only the method's name."""
    at: Any = base
    for part in key.split("."):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at if isinstance(at, Mapping) and isinstance(value, str) and list(at) == [value] else value


def _names(values: list[Any]) -> list[str]:
    """The names of methods if these differ, else the names with their fields."""
    short = [next(iter(v)) if isinstance(v, Mapping) and len(v) == 1 else _called(v) for v in values]
    return short if len(set(short)) == len(short) else [_called(v) for v in values]


def _called(value: Any) -> str:
    """An arm's name: a method's name with its fields, or the value."""
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, fields),) = value.items()
        return " ".join([str(name), *(f"{k}={v}" for k, v in (fields or {}).items())])
    if isinstance(value, list):
        return "+".join(_called(v) for v in value) or "none"
    return str(value)


def slug(name: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.") or "arm"


def recipe_of(plan: Comparison, arm: str, code: Path | None = None, base: Path | None = None) -> Recipe:
    """The arm's recipe; for an arm with a command the shared recipe. Raises RecipeError with the arm's name.

    base  the folder that paths in the recipe are relative to; None: the working directory
    """
    keys = plan.arms[arm]
    values = copy.deepcopy(plan.recipe)
    if not isinstance(keys, Foreign):
        apply_overrides(values, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    return recipes.load(json.dumps(values), f"arm {arm}", code=code, base=base)


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed. The seeds of its methods, and of the stages of its pipeline, rise by the same number."""
    changed: dict[str, Any] = {"seed": seed}
    for key, method in recipe.methods().items():
        if key in Recipe.model_fields:
            changed[key] = _reseeded(method, seed)
    return recipe.model_copy(update=changed)


def _reseeded(settings: BaseModel, by: int) -> Any:
    """Settings with `by` added to every seed in them, also in lists and in settings that they hold."""
    changed: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name == "seed":
            changed[name] = value + by
        elif isinstance(value, BaseModel):
            changed[name] = _reseeded(value, by)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, BaseModel) for v in value):
            changed[name] = type(value)(_reseeded(v, by) for v in value)
    return settings.model_copy(update=changed) if changed else settings
