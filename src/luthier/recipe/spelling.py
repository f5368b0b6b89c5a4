"""Keys, names of methods and plain values of a recipe, checked against stored lists: no torch is imported for a typo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.method.building import MISSING, Lines, named, no_such_key, not_keys, not_one_of, validated
from luthier.method.kinds import KINDS, LISTED
from luthier.recipe.schema import REF, stored
from luthier.recipe.settings import RunSettings
from luthier.support.errors import RecipeError

Path = tuple[str, ...]
KIND_OF = {kind.base: key for key, kind in KINDS.items()}  # name of a base class in the schema -> kind


def check(values: Mapping[str, Any], lines: Lines) -> None:
    """Raises RecipeError for an unknown key or name at any depth, for a missing key, and for wrong plain values."""
    known = stored()["properties"]
    for key in values:
        if key not in known:
            raise RecipeError(lines.where((key,)), *no_such_key(key, list(known)))
    validated(RunSettings, {k: v for k, v in values.items() if k in RunSettings.model_fields}, (), lines)
    for key in (k for k in values if k not in RunSettings.model_fields):
        if key in LISTED:
            listed = values[key] if isinstance(values[key], list) else [values[key]]
            for i, value in enumerate(listed):
                _method(key, value, (key, str(i)), lines)
        elif key in KINDS:
            _method(key, values[key], (key,), lines)
        else:
            _value(values[key], known[key], (key,), lines)


def _method(kind: str, value: Any, path: Path, lines: Lines) -> None:
    """Look at a method's name and fields. Methods from elsewhere are looked at once they are imported."""
    if not isinstance(value, (str, Mapping)) and (value is None or hasattr(value, "model_fields")):
        return  # nothing, or a method already
    name, fields = named(kind, value, lines, path)
    schema = stored()["$defs"].get(f"{kind}.{name}")
    if schema is not None:
        _keys(fields, schema, (*path, name), lines)


def _keys(values: Mapping[str, Any], schema: Mapping[str, Any], path: Path, lines: Lines) -> None:
    """Look at the keys of an object, and at what they hold."""
    known = schema.get("properties", {})
    if schema.get("additionalProperties") is False:
        for key in values:
            if key not in known:  # a misspelt key explains a missing one
                raise RecipeError(lines.where((*path, key)), *no_such_key(key, list(known)))
    for key in schema.get("required", ()):
        if key not in values:
            raise RecipeError(lines.where((*path, key)), *MISSING)
    for key, value in values.items():
        if key in known:
            _value(value, known[key], (*path, key), lines)


def _value(value: Any, schema: Mapping[str, Any], path: Path, lines: Lines) -> None:
    """Look into a value. What the schema leaves open is left to the class."""
    forms = list(_forms(schema))
    kind = next((f["kind"] for f in forms if "kind" in f), None)
    if kind is not None:
        return _method(kind, value, path, lines)
    objects = [f for f in forms if f.get("type") == "object"]
    lists = [f for f in forms if f.get("type") == "array" and isinstance(f.get("items"), dict)]
    if isinstance(value, Mapping) and len(objects) == 1:
        _keys(value, objects[0], path, lines)
    elif isinstance(value, list) and len(lists) == 1:
        for i, item in enumerate(value):
            _value(item, lists[0]["items"], (*path, str(i)), lines)
    elif isinstance(value, str):
        _text(value, forms, path, lines)
    return None


def _text(value: str, forms: list[Mapping[str, Any]], path: Path, lines: Lines) -> None:
    """Look at a text where only some texts, or only keys, belong."""
    words = [str(w) for f in forms for w in f.get("enum", [f["const"]] if "const" in f else [])]
    others = [f for f in forms if not f.keys() & {"enum", "const"} and f.get("type") != "null"]
    if words and not others and value not in words:
        raise RecipeError(lines.where(path), *not_one_of(value, words))
    if forms and all(f.get("type") == "object" and "properties" in f for f in forms):
        raise RecipeError(lines.where(path), *not_keys(value, path[-1], list(forms[0]["properties"])))


def _forms(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the forms that a value may have; {"kind": key} for a method."""
    name = schema.get("$ref", "").removeprefix(REF)
    if name in KIND_OF:
        yield {"kind": KIND_OF[name]}
    elif name:
        yield from _forms(stored()["$defs"][name])
    elif "anyOf" in schema or "oneOf" in schema:
        for form in schema.get("anyOf") or schema["oneOf"]:
            yield from _forms(form)
    else:
        yield schema
