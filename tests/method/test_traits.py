"""Traits are names that something knows and reads: a typo is an error where the class is written."""

import re
from pathlib import Path

import pytest

import luthier
from luthier.method import Traits
from luthier.method.base import Need
from luthier.method.kinds import KINDS, TABLE, kind_of
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft

ROOT = Path(luthier.__file__).parent


@pytest.mark.parametrize(
    ("traits", "says"),
    [
        (Traits(needs=frozenset({"closur"})), "traits.needs holds 'closur'; there are base_view, closure"),
        (Traits(claims=frozenset({"weights"})), "traits.claims holds 'weights'"),
        (Traits(layouts=frozenset({"flat", "ragged"})), "traits.layouts holds 'ragged'; there are flat, padded"),
    ],
)
def test_a_typo_is_refused_where_the_class_is_written(traits, says):
    with pytest.raises(TypeError, match=re.escape(says)):
        type("Wrong", (Objective,), {"traits": traits, "__annotations__": {}, "__module__": "mine"})


@pytest.mark.parametrize("need", list(Need))
def test_every_need_is_read_by_something(need):
    """By check, the recipe, the loop's closure, the docs that tell how to use a method, or the suite."""
    read = re.compile(rf'Need\.{need.name}\b|"{need}" (not )?in|needs & {{[^}}]*"{need}"')
    places = [p for p in ROOT.rglob("*.py") if p.name != "base.py" or p.parent.name == "method"]
    assert any(read.search(p.read_text(encoding="utf-8")) for p in places), need


def test_the_table_of_kinds_holds_what_the_rooms_hold():
    bases = {k.base_class for k in TABLE}
    assert len(bases) == len(TABLE) == len(KINDS)
    assert kind_of(Sft()).key == "objective"
    with pytest.raises(TypeError, match="derives from none of"):
        kind_of(object())
    for kind in TABLE:
        room = ROOT.joinpath(*kind.package.split(".")[1:])
        assert (room / "base.py").exists() and (room / "__init__.py").exists()
    offers = [p.parent for p in ROOT.rglob("base.py") if "EXPORTS" in (p.parent / "__init__.py").read_text()]
    rooms = {p.relative_to(ROOT).as_posix() for p in offers}
    assert rooms == {k.package.removeprefix("luthier.").replace(".", "/") for k in TABLE}, (
        "every room of methods is in the table"
    )
