"""Entities of tag schemes, counted by hand; measures are ratios over all rows."""

import numpy as np
import pytest

from luthier.data.batch import IGNORE
from luthier.evaluation.base import Exam
from luthier.evaluation.measures import interval
from luthier.evaluation.tagging import Tagging, entities, has_scheme
from luthier.step.lab import RowScore


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),  # another type begins
        ("O I-PER I-PER", {("PER", 1, 3)}),  # IOB1, or a mark that was missed
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-A I-A E-A S-B O", {("A", 0, 3), ("B", 3, 4)}),  # BIOES
        ("B-A E-A I-A", {("A", 0, 2), ("A", 2, 3)}),  # after an end, a new one
        ("U-A B-A L-A L-A", {("A", 0, 1), ("A", 1, 3), ("A", 3, 4)}),  # BILOU
        ("E-A O S-A S-A", {("A", 0, 1), ("A", 2, 3), ("A", 3, 4)}),
        ("B-X-Y I-X-Y", {("X-Y", 0, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_of_tags(tags, wanted):
    assert entities(tags.split()) == wanted


def test_a_scheme_marks_every_tag_but_o():
    assert has_scheme(["O", "B-PER", "I-PER"]) and has_scheme(["S-A", "O"])
    assert not any(map(has_scheme, (["NOUN", "VERB"], ["O", "PER"], ["O"], ["B-PER", "X"], [])))


class View:
    classes = ("B-P", "I-P", "O")


def exam(*pairs):
    """An exam of rows whose (chosen, right) classes are these."""
    found = Exam(View(), None, None, [{"key": f"f:{i}", "labels": [IGNORE]} for i, _ in enumerate(pairs)])
    found.scored = [RowScore(1.0, len(w), tuple(b), tuple(w)) for b, w in pairs]
    return found


def test_measures_are_over_all_words_and_all_entities():
    # Said: one entity right, one with a wrong end, one that is not there. There: two, and one that was not found.
    rows = exam(([0, 1, 2, 0], [0, 1, 2, 2]), ([0, 2], [0, 1]), ([2, 2, 2], [2, 0, 2]))
    measures = {m.name: m for m in Tagging().evaluate(rows)}
    assert tuple(measures) == Tagging().names()
    wanted = {"tag_accuracy": 6 / 9, "entity_precision": 1 / 3, "entity_recall": 1 / 3, "entity_f1": 2 / 6}
    assert {n: m.value for n, m in measures.items()} == pytest.approx(wanted)
    assert all(interval(m) is not None and m.higher and len(m.keys) == 3 for m in measures.values())
    np.testing.assert_array_equal(measures["entity_precision"].stats, [[1, 2], [0, 1], [0, 0]])
    np.testing.assert_array_equal(measures["entity_recall"].stats, [[1, 1], [0, 1], [0, 1]])


def test_tags_without_a_scheme_have_an_accuracy_only(monkeypatch):
    monkeypatch.setattr(View, "classes", ("NOUN", "VERB", "DET"))
    assert [m.name for m in Tagging().evaluate(exam(([0, 1], [0, 2])))] == ["tag_accuracy"]
    assert Tagging().evaluate(exam()) == []
