"""Function calls: name, arguments, order, and the leaderboard's lists of accepted values."""

import pytest

from luthier.evaluation import FunctionCalls
from luthier.evaluation.function_calls import Call, calls_of, judge
from luthier.support.errors import LuthierError

PLAY, STOP = Call("play", {"song": "Blue", "loud": 2}), Call("stop", {})


def calls(*items):
    return [Call(n, a) for n, a in items]


@pytest.mark.parametrize(
    ("said", "wanted", "expected"),
    [
        ([PLAY, STOP], [PLAY, STOP], (1, 1, 1, True)),
        ([STOP, PLAY], [PLAY, STOP], (1, 1, 0, False)),  # order
        ([PLAY], [PLAY, STOP], (0.5, 0.5, 1, False)),  # one is missing
        ([PLAY, STOP, STOP], [PLAY, STOP], (1, 1, 1, False)),  # one too many
        (calls(("play", {"song": "Red", "loud": 2})), [PLAY], (1, 0, 1, False)),  # a wrong value
        (calls(("play", {"song": "Blue"})), [PLAY], (1, 0, 1, False)),  # an argument left out
        (calls(("play", {"song": "Blue", "loud": 2, "x": 1})), [PLAY], (1, 0, 1, False)),  # one made up
        (calls(("pause", {})), [PLAY], (0, 0, 0, False)),
        (calls(("play", {"song": " Blue", "loud": 2.0})), [PLAY], (1, 1, 1, True)),
        (calls(("play", {"song": "Blue", "loud": True})), [PLAY], (1, 0, 1, False)),
        (None, [PLAY], (0, 0, 0, False)),
        ([], [], (1, 1, 1, True)),
        ([STOP], [], (1, 1, 1, False)),
    ],
)
def test_judging_by_hand(said, wanted, expected):
    assert judge(said, wanted) == expected


def test_a_call_that_agrees_is_not_taken_by_another_of_its_name():
    a, b = Call("add", {"x": 1}), Call("add", {"x": 2})
    assert judge([b, a], [a, b], ordered=False) == (1, 1, 0, True)


def test_accepted_values_and_arguments_that_may_be_left_out():
    wanted = [Call("f", {"city": ["Rome", "Roma"], "unit": ["C", ""]})]
    for arguments, right in (({"city": "Roma"}, True), ({"city": "Rome", "unit": "F"}, False), ({"unit": "C"}, False)):
        assert judge([Call("f", arguments)], wanted, listed=True).right is right


def test_texts_that_hold_calls():
    assert calls_of('{"name": "f", "arguments": {"x": 1}}', "name", "arguments") == [Call("f", {"x": 1})]
    assert calls_of('[{"name": "f", "arguments": "{\\"x\\": 1}"}]', "name", "arguments") == [Call("f", {"x": 1})]
    assert calls_of('{"action": "f", "x": 1}', "action", None) == [Call("f", {"x": 1})]
    for text in (
        "f(1)",
        "[1]",
        '{"name": 3}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "{"}',
        "[" * 9999,
    ):
        assert calls_of(text, "name", "arguments") is None


def test_evaluated_over_rows(exam_of):
    rows = [{"prompt": "a", "completion": '{"action": "f", "x": 1}'}, {"prompt": "b", "completion": '{"action": "g"}'}]
    exam = exam_of(rows, {"a": '{"action": "f", "x": 2}', "b": '{"action": "g"}'})
    measures = FunctionCalls(name_key="action", arguments_key=None).evaluate(exam)
    assert {m.name: m.value for m in measures} == {
        "call_right": 0.5,
        "call_name": 1,
        "call_arguments": 0.5,
        "call_order": 1,
    }


def test_a_wanted_answer_that_is_no_call_is_named(exam_of):
    with pytest.raises(LuthierError, match=r"f\.jsonl:1: the wanted answer 'hello' is not a call in JSON"):
        FunctionCalls().evaluate(exam_of([{"prompt": "a", "completion": "hello"}], {"a": "x"}))
    for accepted in ([1], [{"f": {"x": 5}}], [{"f": [1]}], {"f": {"x": [5]}}, None):
        exam = exam_of([{"prompt": "a", "completion": "x", "ok": accepted}], {"a": "x"})
        with pytest.raises(LuthierError, match=r"f\.jsonl:1: ok is not a list of"):
            FunctionCalls(accepted_column="ok").evaluate(exam)
