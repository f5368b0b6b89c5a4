"""The JSON Schema of a recipe, with all methods: `python -m luthier.recipe.schema` writes schema.json beside this file.

Reading the stored schema needs no torch. Editors use it, and a recipe's keys are looked up in it before anything is imported.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from luthier.method import registry
from luthier.method.kinds import LISTED, TABLE, Kind

FILE = Path(__file__).with_name("schema.json")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
REF = "#/$defs/"
CODE = {
    "pattern": ":",
    "description": "module:Class, with --allow-code",
}  # names of methods that are no part of luthier


@cache
def stored() -> dict[str, Any]:
    """The schema with the methods of luthier. Do not change it."""
    schema: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return schema


def recipe_schema() -> dict[str, Any]:
    """The schema with the methods of luthier and of installed packages, whose modules this imports."""
    return build() if registry.plugins() else stored()


def build() -> dict[str, Any]:
    """Make the schema from the classes. A method is {name: {fields}} or a name."""
    from luthier.recipe.whole import Recipe

    schema = Recipe.model_json_schema()
    defs, properties = schema.setdefault("$defs", {}), schema["properties"]
    for kind in TABLE:
        options = _options(kind, defs)
        if kind.in_recipe or kind.within is not None:
            defs[kind.base] = {"anyOf": options}  # also where a method or a stage holds one
        if kind.key in properties:
            one = {"$ref": REF + kind.base}
            several = {"anyOf": [one, {"type": "array", "items": one}, {"type": "null"}]}
            described = {"description": properties[kind.key].get("description", "")}
            properties[kind.key] = {
                **(several if kind.key in LISTED else {"anyOf": [one, {"type": "null"}]}),
                **described,
            }
        if kind.within is not None:
            holder, field = kind.within
            for name, method in defs.items():
                if name.startswith(f"{holder}.") and field in method["properties"]:
                    about = method["properties"][field].get("description", "")
                    method["properties"][field] = {"$ref": REF + kind.base, "description": about}
    titled = {"$schema": DRAFT, "title": "A recipe of luthier", **{k: v for k, v in schema.items() if k != "title"}}
    return {k: _without_defaults(v) for k, v in titled.items()}


def _without_defaults(node: Any) -> Any:
    """Leave out `additionalProperties: true`, which says nothing: pydantic writes it from 2.11 on, and not before."""
    if isinstance(node, list):
        return [_without_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    said = {k: v for k, v in node.items() if (k, v) != ("additionalProperties", True)}
    return {k: _without_defaults(v) for k, v in said.items()}


def _options(kind: Kind, defs: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms in which a recipe may name a method of this kind. Their fields go into `defs`."""
    names = registry.names(kind.key)
    options: list[dict[str, Any]] = [{"type": "string", "enum": names}, {"type": "string", **CODE}]
    for name in names:
        fields = registry.find(kind.key, name).model_json_schema()  # type: ignore[attr-defined]
        for inner, schema in fields.pop("$defs", {}).items():
            defs.setdefault(inner, schema)
        defs[f"{kind.key}.{name}"] = fields
        one = {"anyOf": [{"$ref": f"{REF}{kind.key}.{name}"}, {"type": "null"}]}
        options.append({"type": "object", "properties": {name: one}, "required": [name], "additionalProperties": False})
    foreign = {"type": "object", "patternProperties": {CODE["pattern"]: {}}, "minProperties": 1, "maxProperties": 1}
    return [*options, {**foreign, "additionalProperties": False}]


def main() -> None:
    """Write the schema."""
    FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
