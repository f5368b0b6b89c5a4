"""Curators of a user's: one that rewrites and splits, and two with codecs; as source, since a recipe names them by module."""

from typing import Any

LINES = '''
from luthier.curation.base import Curator


class Lines(Curator):
    """Answers in capitals; rows of several lines as one row a line. Cost: none."""

    idempotent = True

    def curate(self, table, lab):
        capitals = [{**r.values, "completion": r.values["completion"].upper()} for r in table.rows]
        new = [c if c != r.values else None for c, r in zip(capitals, table.rows, strict=True)]
        table = table.rewrite(new, "in capitals")
        lines = [r.values["completion"].splitlines() for r in table.rows]
        parts = [
            [{**r.values, "completion": x} for x in found] if len(found) > 1 else None
            for r, found in zip(table.rows, lines, strict=True)
        ]
        return table.split(parts, "one row a line")
'''
BACKWARDS = '''
from luthier.curation.base import Curator


class Reversed:
    """Answers back to front; questions with a mark."""

    def encode(self, values):
        out = {**values, "prompt": "!" + values["prompt"]}
        return {**out, "completion": values["completion"][::-1]} if "completion" in values else out

    def decode(self, values, answer):
        return answer[::-1]


class Backwards(Curator):
    """Trains on answers back to front. Cost: none."""

    @property
    def codec(self):
        return Reversed()

    def curate(self, table, lab):
        return table.rewrite([self.codec.encode(r.values) for r in table.rows], "reversed")


class Twice(Backwards):
    """The same once more, with another mark. Cost: none."""

    @property
    def codec(self):
        return Second()


class Second:
    """Doubles every letter."""

    def encode(self, values):
        out = {**values, "prompt": "?" + values["prompt"]}
        return {**out, "completion": "".join(2 * c for c in values["completion"])} if "completion" in values else out

    def decode(self, values, answer):
        assert values["prompt"].startswith("!"), "it gets the row as it was given it"
        return answer[::2]
'''


def made(source: str, name: str) -> dict[str, Any]:
    """What a module of this name would hold."""
    space: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), space)
    return space
