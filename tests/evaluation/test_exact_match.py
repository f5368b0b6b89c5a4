"""Exact match, and what every evaluator of answers shares: prompts asked once, several right answers."""

import pytest

from luthier.evaluation import ExactMatch, Rouge
from luthier.evaluation.base import examine
from luthier.support.errors import LuthierError

ROWS = [
    {"prompt": "a", "completion": "1"},
    {"prompt": "b", "completion": "2"},
    {"prompt": "a", "completion": "one"},
    {"prompt": "c", "completion": "3"},
]


def test_rows_that_ask_the_same_are_one_question_with_several_right_answers(exam_of):
    exam = exam_of(ROWS, {"a": "one", "b": "two", "c": "3 "})
    (measure,) = ExactMatch().evaluate(exam)
    assert measure.keys == ("1", "2", "4") and measure.stats[:, 0].tolist() == [1, 0, 1] and measure.judges


def test_equal_last_turns_after_different_ones_are_different_questions(exam_of):
    chat = lambda first, last: {"messages": [  # noqa: E731
        {"role": "user", "content": first}, {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "go on"}, {"role": "assistant", "content": last}]}  # fmt: skip
    exam = exam_of([chat("count", "2"), chat("spell", "b"), chat("count", "two")])
    assert [q.references for q in exam.questions(9)] == [("2", "two"), ("b",)]
    with pytest.raises(LuthierError, match="1: has no prompt to answer"):
        exam_of([{"text": "only words"}]).questions(1)


def test_only_so_many_questions_are_asked(exam_of):
    exam = exam_of(ROWS, {"a": "1", "b": "2"})
    assert ExactMatch(rows=2).evaluate(exam)[0].value == 1 and set(exam.asked) == {"1", "2"}


def test_two_evaluators_ask_once(exam_of):
    exam, calls = exam_of(ROWS, {"a": "1", "b": "2", "c": "3"}), []
    generated = exam.generated
    exam.generated = lambda p, n: calls.append(len(p)) or generated(p, n)
    results = examine(exam, [ExactMatch(), ExactMatch(match="number"), Rouge()])
    assert calls == [3]
    assert {"exact_match", "number_match", "rougeL", "stopped", "answer_tokens"} <= set(results.measures)
    assert [(s.key, s.wanted, s.right) for s in results.samples] == [
        ("1", "1", True),
        ("2", "2", True),
        ("4", "3", True),
    ]


def test_results_survive_their_plain_form(exam_of):
    results = examine(exam_of(ROWS, {"a": "1", "b": "x", "c": "3"}), [ExactMatch()])
    again = type(results).from_dict(results.as_dict())
    assert again.samples == results.samples and again.brief() == results.brief()


def test_a_text_of_stop_ends_an_answer(exam_of):
    exam = exam_of(ROWS, {"a": "1\n\nmore", "b": "2 END", "c": "3"})
    results = examine(exam, [ExactMatch(stop=("END", "\n\n"))])
    assert results.measures["exact_match"].value == 1
    assert [s.answer for s in results.samples] == ["1", "2 ", "3"]
    assert examine(exam, [ExactMatch()]).measures["exact_match"].stats[:, 0].tolist() == [0, 0, 1]
