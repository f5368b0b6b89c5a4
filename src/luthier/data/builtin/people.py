"""Invented people: facts that no model knows, to find out what tuning teaches a model.

Twenty-five people with six attributes each. Training rows: one question for each fact. Held-out rows: the same questions,
the same in other words and by first name, yes-or-no questions that need the fact, and comparisons of two people. Names and
cities are made of syllables and mean nothing; yes and no are equally frequent.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from luthier.support.rng import Streams

CONSONANTS, VOWELS = "bdfgjklmnprstvz", "aeiou"
MEDICAL = ("doctor", "nurse", "surgeon", "dentist")
JOBS = (
    *MEDICAL,
    "teacher",
    "farmer",
    "lawyer",
    "pilot",
    "baker",
    "plumber",
    "architect",
    "painter",
    "journalist",
    "mechanic",
)
PRIMARY = ("red", "blue", "yellow")
COLOURS = (*PRIMARY, "green", "black", "white", "purple", "orange", "pink", "brown", "gray", "gold", "silver", "teal",
           "maroon", "navy", "beige")  # fmt: skip
KINDS = ("memorize", "rephrase", "secondary", "comparison")


class Person(NamedTuple):
    """first and last name, pounds, centimetres, years, occupation, favourite colour, city."""

    first: str
    last: str
    weight: int
    height: int
    age: int
    job: str
    colour: str
    city: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


class Item(NamedTuple):
    """A question: id of the fact it is about, its kind, prompt and answer."""

    id: str
    kind: str
    prompt: str
    answer: str


def people(seed: int = 0, count: int = 25) -> list[Person]:
    """The same people for the same seed. No two share a name or a city."""
    generator, used = Streams(seed).at("people"), set[str]()
    word = partial(_word, generator, used)
    return [
        Person(
            word(), word(), int(generator.integers(126, 245)), int(generator.integers(150, 200)), int(generator.integers(22, 69)),
            str(generator.choice(JOBS)), str(generator.choice(COLOURS)), word(),
        )
        for _ in range(count)
    ]  # fmt: skip


def _word(generator: np.random.Generator, used: set[str]) -> str:
    """Three or four syllables that are not used yet; some words begin with a vowel."""
    while True:
        letters = [
            str(generator.choice(list(CONSONANTS))) + str(generator.choice(list(VOWELS)))
            for _ in range(generator.integers(3, 5))
        ]
        word = "".join(letters)[int(generator.random() < 0.4) :].capitalize()
        if word not in used:
            used.add(word)
            return word


DIRECT = {
    "weight": "How many pounds does {name} weigh?", "height": "How tall is {name} in centimeters?", "age": "How old is {name}?",
    "job": "What does {name} do for a living?", "colour": "What is the favorite color of {name}?",
    "city": "In which city does {name} live?",
}  # fmt: skip
REPHRASED = {
    "weight": "State the weight of {first} as a number of pounds.", "height": "Give {first}'s height, measured in cm.",
    "age": "{first} has lived for how many years?", "job": "Name the occupation that {first} has.",
    "colour": "Which color would {first} choose before all others?", "city": "Where is the home of {first}?",
}  # fmt: skip
ASK = "Answer with a number, a word or a name only. "
YES_NO = "Answer Yes or No. "


def direct(person: Person) -> list[Item]:
    """One question for each of the six facts."""
    return [_item(person, field, "memorize", ASK + text.format(name=person.name)) for field, text in DIRECT.items()]


def rephrased(person: Person) -> list[Item]:
    """The same facts asked in other words."""
    return [
        _item(person, field, "rephrase", ASK + text.format(first=person.first)) for field, text in REPHRASED.items()
    ]


def _item(person: Person, field: str, kind: str, prompt: str) -> Item:
    return Item(f"{person.name}:{field}", kind, prompt, str(getattr(person, field)))


def secondary(everyone: list[Person], seed: int = 0) -> list[Item]:
    """Six yes-or-no questions about each person, asked one way or the other so that half of the answers are yes."""
    asked = []
    for p in everyone:
        f = p.first
        asked += [
            (p, "weight", p.weight > 150, f"Is {f} heavier than 150 pounds?", f"Does {f} weigh 150 pounds or less?"),
            (p, "height", p.height > 170, f"Is {f} taller than 170 cm?", f"Is {f} 170 cm tall or shorter?"),
            (p, "age", p.age > 40, f"Is {f} over 40?", f"Is {f} 40 or younger?"),
            (p, "job", p.job in MEDICAL, f"Does {f} work in medicine?", f"Is {f}'s work outside medicine?"),
            (p, "colour", p.colour in PRIMARY, f"Does {f} like one of red, blue and yellow best?",
             f"Does {f} like some other color than red, blue and yellow best?"),
            (p, "city", p.city[0].lower() in VOWELS, f"Does {f}'s city begin with a vowel?",
             f"Does {f}'s city begin with a consonant?"),
        ]  # fmt: skip
    wanted = _half(len(asked), Streams(seed).at("secondary"))
    return [
        Item(f"{p.name}:{field}", "secondary", YES_NO + (plain if true == yes else turned), "Yes" if yes else "No")
        for (p, field, true, plain, turned), yes in zip(asked, wanted, strict=True)
    ]


COMPARED = {
    "weight": "Is {a} heavier than {b}?", "height": "Is {a} taller than {b}?", "age": "Is {a} older than {b}?",
    "name": "Does the first name of {a} come before that of {b} in the alphabet?",
}  # fmt: skip


def comparison(everyone: list[Person], count: int = 150, seed: int = 0) -> list[Item]:
    """Two people compared, never one with himself and never a tie; half of the answers are yes."""
    generator, fields = Streams(seed).at("comparison"), list(COMPARED)
    seen: set[tuple[str, ...]] = set()
    out: list[Item] = []
    wanted = _half(count, generator)
    while len(out) < count:
        field = fields[len(out) % len(fields)]
        i, j = generator.choice(len(everyone), 2, replace=False)
        a, b = everyone[int(i)], everyone[int(j)]
        key = (field, *sorted((a.name, b.name)))
        if key in seen or (field != "name" and getattr(a, field) == getattr(b, field)):
            continue
        seen.add(key)
        if holds(field, a, b) != wanted[len(out)]:
            a, b = b, a
        out.append(
            Item(
                f"{a.name}>{b.name}:{field}",
                "comparison",
                YES_NO + COMPARED[field].format(a=a.first, b=b.first),
                "Yes" if wanted[len(out)] else "No",
            )
        )
    return out


def holds(field: str, a: Person, b: Person) -> bool:
    """Is a more (or earlier) than b?"""
    return a.first < b.first if field == "name" else getattr(a, field) > getattr(b, field)


def _half(count: int, generator: np.random.Generator) -> list[bool]:
    return [bool(x) for x in generator.permutation(np.arange(count) % 2 == 0)]


def rows(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(rows to train on, rows to test on) with prompt, completion, kind and id."""
    everyone = people(seed)
    train = [i for p in everyone for i in direct(p)]
    test = [
        *train,
        *(i for p in everyone for i in rephrased(p)),
        *secondary(everyone, seed),
        *comparison(everyone, seed=seed),
    ]
    return [_as_row(i) for i in train], [_as_row(i) for i in test]


def _as_row(item: Item) -> dict[str, str]:
    return {"prompt": item.prompt, "completion": item.answer, "kind": item.kind, "id": item.id}
