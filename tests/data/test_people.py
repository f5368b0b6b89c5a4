"""The invented people: the sheet's checks 1 and 2 of finetunebench."""

import re

from luthier.data.builtin.people import (
    COMPARED,
    DIRECT,
    KINDS,
    MEDICAL,
    PRIMARY,
    comparison,
    direct,
    holds,
    people,
    rephrased,
    rows,
    secondary,
)
from luthier.evaluation.forgetting import built_in

EVERYONE = people(0)
BY_NAME = {p.name: p for p in EVERYONE}


def test_1_people_and_facts():
    assert len(EVERYONE) == 25 and EVERYONE == people(0) != people(1)
    names = [w for p in EVERYONE for w in (p.first, p.last, p.city)]
    assert len(set(names)) == 75
    known = {w.lower() for r in built_in("general") for w in re.findall(r"\w+", r["text"])}
    assert not {n.lower() for n in names} & known, "names mean nothing"
    for p in EVERYONE:
        assert 126 <= p.weight <= 244 and 150 <= p.height <= 199 and 22 <= p.age <= 68
        assert len(direct(p)) == len(rephrased(p)) == 6
    train, test = rows(0)
    assert len(train) == 150 and {k: sum(r["kind"] == k for r in test) for k in KINDS} == dict.fromkeys(KINDS, 150)


def test_1_every_derived_answer_follows_from_the_facts():
    for item in secondary(EVERYONE):
        name, field = item.id.split(":")
        p, text = BY_NAME[name], item.prompt
        truth = {
            "weight": p.weight > 150, "height": p.height > 170, "age": p.age > 40, "job": p.job in MEDICAL,
            "colour": p.colour in PRIMARY, "city": p.city[0].lower() in "aeiou",
        }[field]  # fmt: skip
        turned = any(w in text for w in ("or less", "or shorter", "or younger", "outside", "other color", "consonant"))
        assert item.answer == ("Yes" if truth != turned else "No"), item


def test_1_comparisons_turn_with_the_people_and_hold_no_tie():
    for item in comparison(EVERYONE):
        pair, field = item.id.split(":")
        a, b = (BY_NAME[n] for n in pair.split(">"))
        assert a != b and holds(field, a, b) != holds(field, b, a)
        assert (
            item.answer == ("Yes" if holds(field, a, b) else "No")
            and COMPARED[field].format(a=a.first, b=b.first) in item.prompt
        )


def test_1_yes_and_no_come_equally_often():
    for items in (secondary(EVERYONE), comparison(EVERYONE)):
        assert sum(i.answer == "Yes" for i in items) == 75


def test_2_nothing_leaks():
    train, test = rows(0)
    trained = {r["prompt"] for r in train}
    assert not trained & {r["prompt"] for r in test if r["kind"] != "memorize"}
    grams = lambda t: {tuple(w[i : i + 6]) for w in [t.split()] for i in range(len(w) - 5)}  # noqa: E731
    for p in EVERYONE:
        for one, other in zip(direct(p), rephrased(p), strict=True):
            bare = [i.prompt.replace(p.name, "X").replace(p.first, "X").split(". ", 1)[1] for i in (one, other)]
            assert not grams(bare[0]) & grams(bare[1])
    assert set(DIRECT) == {i.id.split(":")[1] for i in direct(EVERYONE[0])}
