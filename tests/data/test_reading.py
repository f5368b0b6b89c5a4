"""Which shape a row has, and what it is asked to answer: one order for reading, rendering and curators."""

import pytest

from luthier.curation.base import text_of
from luthier.data.reading import answers_of, shape_in
from luthier.data.rendering import Renderer
from luthier.data.spans import still_there
from luthier.data.store import Row
from luthier.testing.models import byte_tokenizer

TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
PAIR, PLAIN = {"prompt": "p", "completion": "q"}, {"text": "t"}


@pytest.mark.parametrize(
    ("values", "shape", "answers", "words"),
    [
        ({"messages": TALK, **PAIR, **PLAIN}, "messages", ["b", "d"], "a b c d"),
        ({**PAIR, **PLAIN, "label": 1}, "prompt and completion", ["q"], "p q"),
        ({**PLAIN, "label": 1, "prompt": "p"}, "text and label", ["t"], "t"),
        ({**PLAIN, "completion": "q"}, "text", ["t"], "t"),
        ({"messages": TALK[:1]}, "messages", [], "a"),
        ({"prompt": "p"}, None, [], "p"),
    ],
)
def test_a_row_of_several_shapes_has_the_first_everywhere(values, shape, answers, words):
    assert shape_in(values) == shape and answers_of(values) == answers and text_of(Row("f:1", values)) == words
    renderer = Renderer(byte_tokenizer(), plain="messages" not in values)
    if answers:
        trained = [s.text for s in renderer.segments(values) if s.supervised]
        assert renderer.answer(values) == answers[-1] and answers[-1] in trained[-1]


def test_a_task_has_an_order_of_its_own():
    both = {**PAIR, **PLAIN}
    assert shape_in(both, ("text",)) == "text" and answers_of(both, ("text",)) == ["t"]
    assert shape_in(PAIR, ("text",)) is None and answers_of(PAIR, ("text",)) == []


@pytest.mark.parametrize(
    ("after", "given", "fit"),
    [
        ("one two", [(0, 3, "x")], True),
        ("one", [(0, 3, "x")], True),
        ("onE two", [(0, 3, "x")], False),
        ("one Two", [(0, 3, "x")], True),
        ("one Two", [(4, 5, "x"), (0, 3, "x")], False),
        ("else", [], True),
    ],
)
def test_marks_hold_while_the_answer_is_the_same_up_to_the_last(after, given, fit):
    assert still_there("one two", after, given) is fit
