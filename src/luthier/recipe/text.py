"""From YAML and the command line to a recipe; every refusal in one sentence with line, key, value and remedy."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from luthier import manifest
from luthier.collaboration.protocol import Collaboration
from luthier.collaboration.translators.base import Translator
from luthier.compute.base import Compute
from luthier.curation.base import Curator
from luthier.errors import RecipeError
from luthier.evaluation.base import Evaluator
from luthier.method import Method
from luthier.objectives.base import Objective
from luthier.pipelines.base import Pipeline
from luthier.recipe.settings import Recipe
from luthier.tuners.base import Tuner

MAX_BYTES = 1_000_000
BASES: dict[str, type[Method]] = {
    "tuner": Tuner, "objective": Objective, "compute": Compute, "pipeline": Pipeline, "curate": Curator,
    "evaluate": Evaluator, "collaborate": Collaboration, "translate": Translator,
}  # fmt: skip
SECRETS = ("*token", "*api_key*", "*password*", "*secret*")
NOT_SECRET = frozenset({"keep_tokens", "max_new_tokens"})
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


class _Lines:
    """Line numbers by key path, and what to call the source."""

    def __init__(self, name: str, lines: Mapping[tuple[str, ...], int], overridden: frozenset[tuple[str, ...]]) -> None:
        self.name, self.lines, self.overridden = name, lines, overridden

    def where(self, path: tuple[str, ...]) -> str:
        key = ".".join(path) or "recipe"
        if any(path[: len(o)] == o for o in self.overridden):
            return f"command line: {key}"
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        return f"{self.name}:{line}: {key}" if line is not None else f"{self.name}: {key}"


def load(text: str, name: str = "recipe", overrides: Sequence[str] = (), code: Path | None = None) -> Recipe:
    """A recipe from YAML text and `a.b=value` overrides. Raises RecipeError.

    code  a folder whose Python modules the recipe may name (module:Class); None refuses all code
    """
    values, lines = parse(text, name)
    changed = apply_overrides(values, overrides)
    return build(values, _Lines(name, lines, changed), code)


def load_file(path: Path, overrides: Sequence[str] = (), code: Path | None = None) -> Recipe:
    """A recipe from a file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(str(path), f"is larger than {MAX_BYTES} bytes", "a recipe is a short file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), "is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    return load(text, str(path), overrides, code)


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """(plain values, line of each key path). No tags, no anchors, no repeated keys."""
    yaml = YAML(typ="rt")
    try:
        tree = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise RecipeError(
            f"{name}{line}", f"is not YAML ({error.problem})", "look at this line and the one before"
        ) from error
    except (YAMLError, ValueError, RecursionError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise RecipeError(
            name, f"is not YAML ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(tree, CommentedMap):
        raise RecipeError(name, "holds no keys", "write at least model: and data:")
    lines: dict[tuple[str, ...], int] = {}
    return _plain(tree, (), lines, name), lines


def _plain(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str) -> Any:
    if len(path) > 20:
        raise RecipeError(name, "is nested more than 20 deep")
    tag = getattr(node, "tag", None)
    if tag is not None and tag.value is not None and not str(tag.value).startswith("tag:yaml.org"):
        raise RecipeError(
            f"{name}: {'.'.join(path)}", f"carries the tag {tag.value}", "a recipe holds plain values only"
        )
    anchor = getattr(node, "anchor", None)
    if anchor is not None and anchor.value is not None:
        raise RecipeError(f"{name}: {'.'.join(path)}", f"carries the anchor &{anchor.value}", "write the value out")
    if isinstance(node, CommentedMap):
        out: dict[str, Any] = {}
        for key, value in node.items():
            if not isinstance(key, str):
                raise RecipeError(f"{name}:{node.lc.key(key)[0] + 1}", f"the key {key!r} is not text", "quote it")
            lines[(*path, key)] = node.lc.key(key)[0] + 1
            out[key] = _plain(value, (*path, key), lines, name)
        return out
    if isinstance(node, CommentedSeq):
        return [_plain(v, (*path, str(i)), lines, name) for i, v in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):  # ruamel's own number and text classes
        if isinstance(node, kind):
            return kind(node)
    raise RecipeError(f"{name}: {'.'.join(path)}", f"holds a {type(node).__name__}", "a recipe holds plain values only")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> frozenset[tuple[str, ...]]:
    """`a.b=value` sets (parsed as YAML 1.2), `~a.b` removes; returns the paths touched."""
    touched = set()
    for item in overrides:
        remove = item.startswith("~")
        key, equals, text = item.removeprefix("~").partition("=")
        path = tuple(key.split("."))
        if not all(path) or (not equals and not remove):
            raise RecipeError("command line", f"{item!r} is no override", "write key.sub=value, or ~key to remove one")
        at = values
        for part in path[:-1]:
            if isinstance(at.get(part), str):  # tuner: lora, then tuner.lora.rank=8
                at[part] = {at[part]: {}}
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise RecipeError(f"command line: {key}", f"{part} holds no keys")
        if remove:
            at.pop(path[-1], None)
        else:
            at[path[-1]] = _value(text, key)
        touched.add(path)
    return frozenset(touched)


def _value(text: str, key: str) -> Any:
    try:
        return _plain(YAML(typ="rt").load(text), (), {}, f"command line: {key}") if text.strip() else text
    except YAMLError as error:
        raise RecipeError(f"command line: {key}", f"{text!r} is not YAML", "quote it") from error


def build(values: Mapping[str, Any], lines: _Lines, code: Path | None = None) -> Recipe:
    """Check every key and value, methods first. Raises RecipeError."""
    out = dict(values)
    _no_secrets(out, (), lines)
    _build_methods(out, (), ("tuner", "objective", "compute", "pipeline", "collaborate"), lines, code)
    for kind in manifest.LISTS:
        if (listed := out.get(kind)) is not None:
            listed = listed if isinstance(listed, list) else [listed]
            out[kind] = [_method(kind, item, lines, (kind, str(i)), code) for i, item in enumerate(listed)]
    recipe: Recipe = _validated(Recipe, out, (), lines, list(Recipe.model_fields))
    if recipe.trust_remote_code and code is None:
        raise RecipeError(
            lines.where(("trust_remote_code",)), "would run the model's own code", "add --allow-code if you trust it"
        )
    for i, evaluator in enumerate(recipe.evaluate):
        if evaluator.brings_code and code is None:
            where = lines.where(("evaluate", str(i)))
            raise RecipeError(where, "would run Python of its tasks", "add --allow-code if you trust it")
    try:
        recipe.check_methods()
        recipe.check_unread()
    except RecipeError as error:
        raise RecipeError(lines.where(tuple(error.where.split("."))), error.what, error.remedy) from None
    return recipe


def _build_methods(
    values: dict[str, Any], path: tuple[str, ...], kinds: Sequence[str], lines: _Lines, code: Path | None
) -> None:
    """Put instances in place of names."""
    for kind in kinds:
        if values.get(kind) is not None:
            values[kind] = _method(kind, values[kind], lines, (*path, kind), code)


def method(kind: str, value: Any, name: str) -> Any:
    """A method from its name, {name: {fields}} or an instance. Raises RecipeError; never imports code it does not know.

    name  of what it stands in, for errors
    """
    return _method(kind, value, _Lines(name, {}, frozenset()), (kind,), None)


def _no_secrets(values: Any, path: tuple[str, ...], lines: _Lines) -> None:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key not in NOT_SECRET and any(fnmatch.fnmatch(key.lower(), p) for p in SECRETS):
                raise RecipeError(lines.where((*path, key)), "looks like a secret", "set it in the environment instead")
            _no_secrets(value, (*path, key), lines)


def _method(kind: str, value: Any, lines: _Lines, path: tuple[str, ...], code: Path | None) -> Any:
    """ "lora", {lora: {rank: 8}}, "module:Class" or an instance -> an instance."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(
            lines.where(path),
            f"is {value!r}",
            f"write {kind}: NAME, or {kind}: {{NAME: {{field: value}}}}",
        )
    ((name, fields),) = value.items()
    if fields is not None and not isinstance(fields, Mapping):
        raise RecipeError(lines.where((*path, name)), f"holds {fields!r}", "write its fields as keys")
    cls: Any = _foreign(kind, name, lines.where((*path, name)), code) if ":" in name else None
    if cls is None:
        if name not in manifest.names(kind):
            raise RecipeError(
                lines.where((*path, name)), f"there is no {kind} {name!r}", _nearest(name, manifest.names(kind))
            )
        cls = manifest.find(kind, name)
        _of_kind(cls, kind, lines.where((*path, name)))
    fields = dict(fields or {})
    if kind == "pipeline" and isinstance(fields.get("stages"), list):  # methods within a method
        fields["stages"] = [dict(s) if isinstance(s, Mapping) else s for s in fields["stages"]]
        for i, stage in enumerate(fields["stages"]):
            if isinstance(stage, dict):
                _build_methods(stage, (*path, name, "stages", str(i)), ("tuner", "objective"), lines, code)
    if kind == "collaborate" and fields.get("translator") is not None:
        fields["translator"] = _method("translate", fields["translator"], lines, (*path, name, "translator"), code)
    return _validated(cls, fields, (*path, name), lines, list(cls.model_fields))


def _foreign(kind: str, name: str, where: str, code: Path | None) -> Any:
    """A method of somebody else's: module:Class, from the recipe's folder or the environment."""
    if code is None:
        raise RecipeError(where, "names code, which a recipe may not bring", "add --allow-code if you trust it")
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
    if not (isinstance(cls, type) and issubclass(cls, BASES[kind])):
        raise RecipeError(where, f"is no {BASES[kind].__name__}", f"derive it from luthier's {BASES[kind].__name__}")


def _validated(cls: Any, values: dict[str, Any], path: tuple[str, ...], lines: _Lines, known: list[str]) -> Any:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        # A misspelt key explains a missing one, so it is told first.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        where = tuple(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        at = lines.where((*path, *where))
        if first["type"] == "extra_forbidden":
            within = known if len(where) == 1 else list(_nested_fields(cls, where[:-1]))
            raise RecipeError(at, "there is no such key", _nearest(where[-1], within)) from None
        if first["type"] == "missing":
            raise RecipeError(at, "is missing", "add it") from None
        shown = json.dumps(first.get("input"), default=str)
        message = first["msg"][0].lower() + first["msg"][1:]
        raise RecipeError(at, f"{shown[:80]}: {message}") from None


def _nested_fields(cls: Any, where: tuple[str, ...]) -> Sequence[str]:
    for part in where:
        annotation = cls.model_fields[part].annotation if part in getattr(cls, "model_fields", {}) else None
        cls = annotation
    return list(getattr(cls, "model_fields", {}))


def _nearest(name: str, known: Sequence[str]) -> str:
    if name in OLD_SPELLINGS:
        return f"its name here is {OLD_SPELLINGS[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
