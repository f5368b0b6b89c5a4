"""Tests that every method of every kind must pass."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from luthier import recipe
from luthier.method import Facts, Method
from luthier.method import registry as manifest
from luthier.method.base import Need
from luthier.method.kinds import KINDS, LISTED
from luthier.support.errors import RecipeError
from luthier.testing.contract.examples import CONSTANT, Example


def test_page_and_documented_fields(example: Example) -> None:
    doc = inspect.getdoc(type(example.method))
    assert doc and "Cost:" in doc, "the docstring is the method's page: write a line that begins with Cost:"
    for field, info in type(example.method).model_fields.items():
        assert info.description, f"{field} has no documentation: write a docstring below it"


def test_every_field_is_read(example: Example) -> None:
    cls = type(example.method)
    read = [attributes(c.__module__) for c in cls.__mro__ if issubclass(c, Method)]
    unread = set(cls.model_fields).difference(*read)
    assert not unread, f"no code reads {', '.join(sorted(unread))}"


@cache
def attributes(module: str) -> frozenset[str]:
    """The names of all attributes that the source of a module uses."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return frozenset(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def test_recipe_round_trip(example: Example) -> None:
    method = example.method
    if example.kind != "pipeline":  # the methods in a pipeline are built by the recipe, below
        assert same(type(method)(**json.loads(method.model_dump_json())), method)
    if KINDS[example.kind].command is not None:
        return
    loaded = recipe.load(recipe_with(example, method.model_dump(mode="json", exclude_defaults=True)), code=Path())
    assert same(found_in(loaded, example), method)
    assert recipe.load(json.dumps(loaded.as_dict()), code=Path()) == loaded


def same(a: Method, b: Method) -> bool:
    """True for equal classes and fields; private state of a method does not count."""
    return type(a) is type(b) and a.model_dump() == b.model_dump()


def test_a_wrong_field_names_its_key(example: Example) -> None:
    with pytest.raises(ValueError, match="no_such_field"):
        type(example.method).model_validate({"no_such_field": 1})
    if KINDS[example.kind].command is not None:  # a recipe has no key for it
        return
    with pytest.raises(RecipeError) as refused:
        recipe.load(recipe_with(example, {"no_such_field": 1}), code=Path())
    place = f"{example.kind}.0" if example.kind in LISTED else example.kind
    place = "collaborate.grad-transformer.translator" if example.kind == "translate" else place
    assert f"{place}.{example.name}.no_such_field: there is no such key" in str(refused.value)


def recipe_with(example: Example, fields: Mapping[str, Any]) -> str:
    """A recipe that names this method with these fields."""
    traits, one = type(example.method).traits, {example.name: dict(fields)}
    tree: dict[str, Any] = {"model": "a/b", "data": {"train": "x.jsonl", "eval": "x.jsonl"}}
    start = YAML(typ="safe", pure=True).load("\n".join(type(example.method).recipe_lines)) or {}
    tree |= {k: v for k, v in start.items() if k not in (example.kind, "pipeline")}  # what the method needs beside it
    if "pool" in traits.needs:
        tree["data"]["pool"] = "y.jsonl"
    if Facts().task not in traits.tasks:
        tree["task"] = min(traits.tasks)
    if "closure" in traits.needs:
        tree |= CONSTANT
    if example.kind == "translate":  # a field of a protocol
        tree["collaborate"] = {"grad-transformer": {"translator": one}}
    else:
        tree[example.kind] = [one] if example.kind in LISTED else one
    return json.dumps(tree)


def found_in(loaded: Any, example: Example) -> Any:
    """The method in a recipe that `recipe_with` made."""
    if example.kind == "translate":
        return loaded.collaborate.translator
    found = getattr(loaded, example.kind)
    return found[0] if example.kind in LISTED else found


def test_refusals_are_those_the_traits_declare(example: Example) -> None:
    traits, method = type(example.method).traits, example.method
    for task in (*manifest.names("task"), "audio"):
        assert refused(method, "task", task=task) == (task not in traits.tasks)
    for layout in ("flat", "padded"):
        assert refused(method, "layout", layout=layout) == (layout not in traits.layouts)
    assert refused(method, "num_processes", num_processes=2) == ("one_process" in traits.needs)
    assert refused(method, "quantize", quantized=True) == bool(traits.needs & {Need.PLAIN_WEIGHTS, Need.JVP})


def refused(method: Method, key: str, **facts: Any) -> bool:
    """True if `check` reports a problem with this key."""
    return any(p.key == key for p in method.check(Facts(batch_size=4, **facts)))


__all__ = [
    "test_a_wrong_field_names_its_key",
    "test_every_field_is_read",
    "test_page_and_documented_fields",
    "test_recipe_round_trip",
    "test_refusals_are_those_the_traits_declare",
]
