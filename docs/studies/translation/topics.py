"""Clients differ in what they write about: each has a mixture of six kinds of text of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from texts import code, rows, stretch

from luthier.model.local import pieces
from luthier.rng import Streams

WIDTH = 128  # characters of a row
LEFT_OUT = "restaurants"  # of the shadows, in one test
SEEN = ("code", "articles", "plays")  # by the models, before


@cache
def sources() -> dict[str, str]:
    """Half a million to four million characters each."""
    return {
        "code": code(),
        "articles": "\n\n".join(r["text"] for r in rows("wikitext2")),
        "plays": "\n\n".join(r["text"] for r in rows("tiny_shakespeare")),
        "maths": "\n\n".join(f"{r['question']}\n{r['solution']}" for r in rows("gsm8k")),
        "restaurants": "\n".join(r["text"] for r in rows("e2e_nlg")),
        "medicine": "\n\n".join("\n".join(r["context"]) for r in rows("pubmedqa")),
    }


def client(streams: Streams, concentration: float, of_left_out: bool = False) -> dict[str, float]:
    """Shares of the six kinds."""
    names = sorted(sources())
    shares = streams.at("mixture").dirichlet([concentration] * len(names)).tolist()
    if of_left_out:
        return {n: 0.3 * p + 0.7 * (n == LEFT_OUT) for n, p in zip(names, shares, strict=True)}
    return dict(zip(names, shares, strict=True))


def leans(who: dict[str, float]) -> bool:
    """Whether a client is dominated by the kind that is left out."""
    return who[LEFT_OUT] > 0.4


def drawn(which: str, who: dict[str, float], count: int, streams: Streams) -> list[dict[str, Any]]:
    return pieces({n: stretch(which, t) for n, t in sources().items()}, who, count, WIDTH, streams)


def everybody(which: str, count: int, streams: Streams) -> list[dict[str, Any]]:
    """Rows of all kinds alike."""
    return drawn(which, dict.fromkeys(sources(), 1.0), count, streams)


def school(count: int, streams: Streams) -> list[dict[str, Any]]:
    """What the models have read before: three kinds, and a tenth as much of each of the others."""
    return drawn("school", {n: 1.0 if n in SEEN else 0.1 for n in sources()}, count, streams)
