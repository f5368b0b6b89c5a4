"""Read a recipe from YAML and the command line. Every error is one sentence with line, key, value and remedy.

Keys, names and plain values are checked first, without torch, so that a typo is found at once.
"""

from __future__ import annotations

import fnmatch
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from luthier.method.building import Lines, build_method, build_methods, validated
from luthier.method.kinds import LISTED, SINGLE
from luthier.recipe import spelling
from luthier.support.errors import RecipeError

if TYPE_CHECKING:
    from luthier.recipe.whole import Recipe

MAX_BYTES = 1_000_000
SECRETS = ("*token", "*api_key*", "*password*", "*secret*")


def load(
    text: str, name: str = "recipe", overrides: Sequence[str] = (), code: Path | None = None, base: Path | None = None
) -> Recipe:
    """A recipe from YAML text and `a.b=value` overrides. Raises RecipeError.

    code  the folder whose Python modules the recipe may name (module:Class); None refuses all code
    base  the folder that paths in the recipe are relative to; None: the working directory
    """
    values, lines = parse(text, name)
    changed = apply_overrides(values, overrides)
    return build(values, Lines(name, lines, changed), code, base)


def load_file(path: Path, overrides: Sequence[str] = (), code: Path | None = None) -> Recipe:
    """A recipe from a file. Raises RecipeError."""
    return load(read_text(path), str(path), overrides, code, folder_of(path))


def folder_of(path: Path) -> Path:
    """The folder that paths in a recipe's file are relative to: its own.

    A run's folder holds a copy of the recipe, `recipe.yaml`; its paths are still relative to where the recipe came from.
    """
    run = path.with_name("run.json")
    if path.name != "recipe.yaml" or not run.is_file():
        return path.parent
    try:
        return Path(json.loads(run.read_text(encoding="utf-8"))["recipe_folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(str(run), "does not say where the recipe came from", f"move {path.name} elsewhere") from error


def read_text(path: Path) -> str:
    """The text of a recipe's file, or of another short YAML file. Raises RecipeError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(str(path), f"is larger than {MAX_BYTES} bytes", "write a short file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), "is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read ({error.strerror})", "check the path") from error


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML text, which `parse` reads."""
    text = io.StringIO()
    YAML().dump(dict(values), text)
    return text.getvalue()


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """(plain values, line of each key path). Tags, anchors and repeated keys are refused."""
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
    """`a.b=value` sets a key (parsed as YAML 1.2), `~a.b` removes it. Returns the changed paths."""
    touched = set()
    for item in overrides:
        remove = item.startswith("~")
        key, equals, text = item.removeprefix("~").partition("=")
        path = tuple(key.split("."))
        if not all(path) or (not equals and not remove):
            raise RecipeError(
                "command line", f"{item!r} is not an override", "write key.sub=value, or ~key to remove one"
            )
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


def build(values: Mapping[str, Any], lines: Lines, code: Path | None = None, base: Path | None = None) -> Recipe:
    """Check all keys and values. Raises RecipeError."""
    out = dict(values)
    _no_secrets(out, (), lines)
    spelling.check(out, lines)
    from luthier.recipe.whole import Recipe  # brings torch

    build_methods(out, (), SINGLE, lines, code)
    for kind in LISTED:
        if (listed := out.get(kind)) is not None:
            listed = listed if isinstance(listed, list) else [listed]
            built = (build_method(kind, item, lines, (kind, str(i)), code) for i, item in enumerate(listed))
            out[kind] = [method.beside(base) for method in built]
    recipe: Recipe = validated(Recipe, out, (), lines)
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


def _no_secrets(values: Any, path: tuple[str, ...], lines: Lines) -> None:
    """Raises RecipeError for a key, at any depth, whose value should not be written into a run's folder."""
    if isinstance(values, list):
        values = {str(i): value for i, value in enumerate(values)}
    if isinstance(values, Mapping):
        for key, value in values.items():
            if any(fnmatch.fnmatch(key.lower(), p) for p in SECRETS):
                raise RecipeError(lines.where((*path, key)), "looks like a secret", "set it in the environment instead")
            _no_secrets(value, (*path, key), lines)
