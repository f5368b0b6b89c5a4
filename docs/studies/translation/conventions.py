"""Clients differ in house style: the same requests, reviews and posts, answered in words written each their own way.

No prompt tells the style, so a model that has seen all styles can only guess among them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from texts import rows, stretch

from luthier.support.rng import Streams

WIDTH = 72  # characters of a prompt
LEADS = ("", "label: ", "=> ", "A) ")
CASES = (str.lower, str.upper, str.title)
JOINTS = (" ", "_", "-")
WRAPS = ("{}", "[{}]", "<{}>", '"{}"')
ENDS = ("", ".", ";", " !")
STYLES: tuple[tuple[Any, ...], ...] = (LEADS, CASES, JOINTS, WRAPS, ENDS)  # 576 ways
LEFT_OUT = (3, 2)  # of the shadows, in one test: answers between <>


@cache
def asked() -> dict[str, list[tuple[str, str]]]:
    """(text, what is to be said of it) by source."""
    spaced = lambda name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # noqa: E731
    return {
        "reviews": [(r["text"], f"{r['label']} review") for r in rows("sst2")],
        "requests": [(r["text"], spaced(r["intent"])) for r in rows("snips")],
        "posts": [(r["text"], f"{r['label']} post") for r in rows("tweet_offensive")],
        "remarks": [(r["text"], f"{r['label']} remark") for r in rows("tweet_irony")],
    }


def client(streams: Streams, concentration: float, of_left_out: bool = False) -> dict[str, list[float]]:
    """The chances of each way of writing, by feature; a small concentration makes a house of firm habits."""
    generator = streams.at("style")
    style = [generator.dirichlet([concentration] * len(ways)).tolist() for ways in STYLES]
    if of_left_out:
        feature, way = LEFT_OUT
        style[feature] = [float(i == way) for i in range(len(STYLES[feature]))]
    return {"style": style}  # type: ignore[dict-item]


def leans(who: dict[str, Any]) -> bool:
    """Whether a client mostly writes in the way that is left out."""
    feature, way = LEFT_OUT
    return who["style"][feature][way] > 0.4


def drawn(which: str, who: dict[str, Any], count: int, streams: Streams) -> list[dict[str, Any]]:
    generator, names, out = streams.at("rows"), sorted(asked()), []
    for _ in range(count):
        pool = stretch(which, asked()[names[generator.integers(len(names))]])
        text, word = pool[int(generator.integers(len(pool)))]
        ways = [generator.choice(len(chances), p=chances) for chances in who["style"]]
        out.append({"prompt": f"{text[:WIDTH]}\n", "completion": written(word, ways)})
    return out


def written(word: str, ways: list[int]) -> str:
    lead, case, joint, wrap, end = (options[i] for options, i in zip(STYLES, ways, strict=True))
    return lead + wrap.format(joint.join(case(word).split())) + end


def everybody(which: str, count: int, streams: Streams) -> list[dict[str, Any]]:
    """Rows in all ways alike."""
    even = {"style": [[1 / len(ways)] * len(ways) for ways in STYLES]}
    return drawn(which, even, count, streams)


def school(count: int, streams: Streams) -> list[dict[str, Any]]:
    """What the models have read before."""
    return everybody("school", count, streams)
