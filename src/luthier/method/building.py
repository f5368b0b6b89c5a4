"""Build a method from a name and fields. Every error names the place, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from luthier.method import registry
from luthier.method.base import Method
from luthier.method.kinds import KINDS
from luthier.support.errors import RecipeError

FORM = "form:"  # begins the tags of values that a key accepts in two forms
OLD_SPELLINGS = {
    "model_name_or_path": "model", "base_model": "model", "dataset": "data.train", "train_file": "data.train",
    "cutoff_len": "data.max_length", "sequence_len": "data.max_length", "max_seq_length": "data.max_length",
    "max_length": "data.max_length", "num_train_epochs": "epochs", "num_epochs": "epochs", "lora_r": "tuner.lora.rank",
    "lora_alpha": "tuner.lora.alpha", "warmup_ratio": "warmup_fraction", "warmup_steps": "warmup_fraction",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "tokens_per_forward",
    "micro_batch_size": "tokens_per_forward", "lr": "learning_rate", "scheduler": "lr_scheduler_type",
    "overwrite_output_dir": "the option --fresh", "logging_dir": "output_dir", "r": "rank", "lora_target": "tuner.lora.targets",
    "target_modules": "targets", "bf16": "dtype", "fp16": "dtype", "eval_file": "data.eval",
}  # fmt: skip


class Lines:
    """Line numbers by key path, and the name of the source."""

    def __init__(self, name: str, lines: Mapping[tuple[str, ...], int], overridden: frozenset[tuple[str, ...]]) -> None:
        self.name, self.lines, self.overridden = name, lines, overridden

    def where(self, path: tuple[str, ...]) -> str:
        """The place of a key: its file and line, or the command line. An empty path is the whole file."""
        key = ".".join(path)
        if any(path[: len(o)] == o for o in self.overridden):
            return f"command line: {key}"
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        place = self.name if line is None else f"{self.name}:{line}"
        return f"{place}: {key}" if key else place


def build_methods(
    values: dict[str, Any], path: tuple[str, ...], kinds: Sequence[str], lines: Lines, code: Path | None
) -> None:
    """Replace names by instances."""
    for kind in kinds:
        if values.get(kind) is not None:
            values[kind] = build_method(kind, values[kind], lines, (*path, kind), code)


def method(kind: str, value: Any, name: str) -> Any:
    """A method from its name, {name: {fields}} or an instance. Raises RecipeError; never imports unknown code.

    name  where the value comes from, for errors
    """
    return build_method(kind, value, Lines(name, {}, frozenset()), (kind,), None)


def build_method(kind: str, value: Any, lines: Lines, path: tuple[str, ...], code: Path | None) -> Any:
    """An instance from a name ("lora"), a name with fields ({lora: {rank: 8}}), "module:Class", or an instance."""
    if isinstance(value, Method):
        return value
    name, fields = named(kind, value, lines, path)
    cls: Any = _foreign(kind, name, lines.where((*path, name)), code) if ":" in name else None
    if cls is None:
        cls = registry.find(kind, name)
        _of_kind(cls, kind, lines.where((*path, name)))
    if kind == "pipeline" and isinstance(fields.get("stages"), list):  # methods within a method
        fields["stages"] = [dict(s) if isinstance(s, Mapping) else s for s in fields["stages"]]
        for i, stage in enumerate(fields["stages"]):
            if isinstance(stage, dict):
                build_methods(stage, (*path, name, "stages", str(i)), ("tuner", "objective"), lines, code)
    if kind == "collaborate" and fields.get("translator") is not None:
        fields["translator"] = build_method("translate", fields["translator"], lines, (*path, name, "translator"), code)
    return validated(cls, fields, (*path, name), lines)


def named(kind: str, value: Any, lines: Lines, path: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(name, fields) of a method, as a recipe writes it. Imports no method.

    Raises RecipeError for another form, or a name that no method of luthier or of a package has. A name with a colon is code.
    """
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        remedy = f"write {kind}: NAME, or {kind}: {{NAME: {{field: value}}}}"
        raise RecipeError(lines.where(path), f"is {value!r}", remedy)
    ((name, fields),) = value.items()
    where = lines.where((*path, name))
    if fields is not None and not isinstance(fields, Mapping):
        raise RecipeError(where, f"holds {fields!r}", "write its fields as keys")
    if ":" not in name and name not in registry.names(kind):
        raise RecipeError(where, f"there is no {KINDS[kind].what} called {name!r}", _known(kind, name))
    return name, dict(fields or {})


def _foreign(kind: str, name: str, where: str, code: Path | None) -> Any:
    """A method from outside luthier: module:Class, from the recipe's folder or the environment."""
    if code is None:
        raise RecipeError(
            where, "names code, which a recipe may not run by default", "add --allow-code if you trust it"
        )
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(code.resolve()))
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(where, f"cannot be imported ({error})", "write module:Class") from error
    finally:
        sys.path.pop(0)
    _of_kind(cls, kind, where)
    return cls


def _of_kind(cls: Any, kind: str, where: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, KINDS[kind].base_class)):
        raise RecipeError(
            where, f"does not derive from {KINDS[kind].base}", f"derive it from luthier's {KINDS[kind].base}"
        )


def validated(cls: Any, values: Mapping[str, Any], path: tuple[str, ...], lines: Lines) -> Any:
    """An instance of a model. Raises RecipeError with the place of the first fault.

    path  the key of these values in the file
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        # A misspelt key explains a missing one, so it is reported first.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        where = tuple(str(p) for p in first["loc"] if not str(p).startswith((FORM, "function-")))
        at = lines.where((*path, *where))
        raise RecipeError(at, *_told(cls, first, where)) from None


def _told(cls: Any, error: Any, where: tuple[str, ...]) -> tuple[str, str]:
    """(what is wrong, what to do) for an error of pydantic at a key."""
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        return no_such_key(where[-1], _nested_fields(cls, where[:-1]))
    if error["type"] == "missing":
        return MISSING
    if error["type"] in ("model_type", "model_attributes_type"):
        return not_keys(given, where[-1] if where else "", _nested_fields(cls, where))
    if error["type"] == "literal_error" and isinstance(given, str):
        expected = error["ctx"]["expected"]  # "'a', 'b' or 'c'", or numbers: "1"
        return not_one_of(given, re.findall(r"'([^']*)'", expected) or [expected])
    shown = json.dumps(given, default=str)
    return f"{shown[:80]}: {error['msg'][0].lower()}{error['msg'][1:]}", ""


MISSING = ("is missing", "add it")


def no_such_key(key: str, known: Sequence[str]) -> tuple[str, str]:
    """(what is wrong, what to do) for a key that there is not."""
    return "there is no such key", nearest(key, known)


def not_one_of(value: str, known: Sequence[str]) -> tuple[str, str]:
    """(what is wrong, what to do) for a text that is none of those which a key accepts."""
    close = closest(value, known)
    words = " or ".join(filter(None, [", ".join(known[:-1]), known[-1]]))
    return f"is {value!r}; it can be {words}", f"did you mean {close}?" if close else "choose one"


def not_keys(value: Any, key: str, fields: Sequence[str]) -> tuple[str, str]:
    """(what is wrong, what to do) for a plain value where keys belong."""
    first = f"{{{fields[0]}: {value if isinstance(value, (str, int, float)) else '...'}}}" if fields else "{...}"
    return f"is {value!r}, where keys belong", f"write {first}" if not key or key.isdigit() else f"write {key}: {first}"


def _nested_fields(cls: Any, where: tuple[str, ...]) -> Sequence[str]:
    for part in where:
        if not part.isdigit():  # an item of a list is what the list holds
            cls = _model_in(cls.model_fields[part].annotation) if part in getattr(cls, "model_fields", {}) else None
    return list(getattr(cls, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """The model that a field holds, alone, in a list or as one of several forms; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def _known(kind: str, name: str) -> str:
    """What to do about a name that no method of a kind has."""
    if registry.is_new(kind, name):
        return "its class is in EXPORTS but not in the list of methods; run make docs"
    return nearest(name, registry.names(kind))


def nearest(name: str, known: Sequence[str]) -> str:
    """What to do about a name that there is not: the one that was meant, or all that there are."""
    if name in OLD_SPELLINGS:
        return f"its name here is {OLD_SPELLINGS[name]}"
    close = closest(name, known)
    return f"did you mean {close}?" if close else f"known are {', '.join(sorted(known))}"


def closest(name: str, known: Sequence[str]) -> str | None:
    """The name that is most like this one, whatever its case and its hyphens; None if none is."""
    plain = {_plain(k): k for k in known}
    return next((plain[k] for k in difflib.get_close_matches(_plain(name), list(plain), n=1)), None)


def _plain(name: str) -> str:
    return name.casefold().replace("_", "-")
