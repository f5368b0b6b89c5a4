"""Tagging: accuracy of the tags, and precision, recall and F1 of whole entities."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, ratio
from luthier.method import Source, Traits

SCHEME = re.compile(r"[BIMELSU]-.+")
CLOSES = "ELSU"  # the last word of an entity, or its only one
WITHIN = "IMEL"  # a word after the first one


def has_scheme(names: Iterable[str]) -> bool:
    """Whether tags mark where entities begin and end: each is O, or a mark with a type, as in B-PER."""
    marked = [n for n in names if n != "O"]
    return bool(marked) and all(SCHEME.fullmatch(n) for n in marked)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in tags of BIO (IOB), BIOES or BILOU.

    As in conlleval, a word within an entity that has not begun begins one: I-PER after O, or after B-LOC.
    """
    found, start, kind = set(), -1, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        goes_on = start >= 0 and mark in WITHIN and own == kind
        if start >= 0 and not goes_on:
            found.add((kind, start, at))
            start = -1
        if mark != "O" and start < 0:
            start, kind = at, own
        if mark in CLOSES:
            found.add((kind, start, at + 1))
            start = -1
    return found


class Tagging(Evaluator):
    """Share of words whose most likely tag is the right one; precision, recall and F1 of entities, all types together.

    Always measured if the task is token-classification. An entity counts as found if its type, its first word and its last word
    are right, as in conlleval and seqeval. Entities are measured if every tag is O or has a mark of BIO, BIOES or BILOU (B-PER).
    Words that are cut off are not counted. Cost: none beyond the loss.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"token-classification"}))
    source: ClassVar[Source] = Source(
        "Introduction to the CoNLL-2003 Shared Task: Language-Independent Named Entity Recognition", 2003, "arXiv:cs/0306050",
        "section 2.4",
    )  # fmt: skip

    def names(self) -> tuple[str, ...]:
        return ("tag_accuracy", "entity_precision", "entity_recall", "entity_f1")

    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        keys, scored = exam.row_keys, exam.scored
        hits = [sum(b == w for b, w in zip(s.best, s.wanted, strict=True)) for s in scored]
        out = [ratio("tag_accuracy", hits, [s.over for s in scored], keys, unit="share, over words")]
        names = exam.view.classes
        if not has_scheme(names):
            return out
        pairs = [[entities([names[i] for i in part]) for part in (s.best, s.wanted)] for s in scored]
        said, there = (np.array([len(p[i]) for p in pairs]) for i in (0, 1))
        both = np.array([len(p[0] & p[1]) for p in pairs])
        return [
            *out,
            ratio("entity_precision", both, said, keys, unit="share, over entities that the model names"),
            ratio("entity_recall", both, there, keys, unit="share, over entities of the rows"),
            ratio("entity_f1", 2 * both, said + there, keys, unit="F1"),
        ]
