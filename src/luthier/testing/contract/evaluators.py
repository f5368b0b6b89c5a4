"""Tests of every evaluator: its measures are those that it names, and better for a better model; it changes nothing."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import AGGREGATES, Measure
from luthier.method import Facts
from luthier.support import sandbox
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import Example, snapshot
from luthier.testing.contract.subjects import SHAPED, Subject, Values, exam_of, maker_of, subject, task_named


def tasks_of(evaluate: Example) -> list[str]:
    """The tasks that it works on."""
    return sorted(evaluate.method.traits.tasks)


def rows_for(evaluate: Example, task: str) -> Values:
    """The rows that it asks about: the example's own, or the usual ones of the task."""
    return SHAPED[task_named(task).shapes[0]] if evaluate.rows is None else evaluate.rows


def asked(evaluate: Example, task: str) -> Subject:
    """A model that knows the rows, and one that does not."""
    kind = task_named(task)
    return subject(maker_of(evaluate, kind), kind, evaluate.learns or rows_for(evaluate, task))


def measured(evaluate: Example, exam: Exam) -> dict[str, Measure]:
    """Measures by name. Skips the test if this machine lacks a package that `check` names, or a sandbox."""
    method = evaluate.method
    assert isinstance(method, Evaluator)
    if missing := method.check(Facts(task=exam.task.key())):
        pytest.skip(missing[0].what)  # an extra is not installed, and `check` refuses the recipe with this sentence
    try:
        found = method.evaluate(exam)
    except LuthierError as error:
        if (why := sandbox.unavailable()) is not None:
            pytest.skip(f"{error} ({why})")  # no sandbox works here; any other error is a failure
        raise
    assert len({m.name for m in found}) == len(found), "each measure has its own name"
    return {m.name: m for m in found}


@cache
def known(evaluate: Example, task: str) -> dict[str, Measure]:
    """The measures of the model that knows the rows, once for all tests."""
    return measured(evaluate, exam_of(asked(evaluate, task).view(), task_named(task), rows_for(evaluate, task)))


def test_an_evaluator_gives_the_measures_that_it_names(evaluate: Example) -> None:
    assert isinstance(evaluate.method, Evaluator)
    named = evaluate.method.names()
    given: set[str] = set()
    for task in tasks_of(evaluate):
        found = known(evaluate, task)
        given |= found.keys()
        for m in found.values():
            assert len(m.keys) == len(set(m.keys)) == len(m.stats) > 0 and np.isfinite(m.stats).all()
            assert m.aggregate in AGGREGATES and m.unit is not None and math.isfinite(m.value)
            assert Measure.from_dict(json.loads(json.dumps(m.as_dict()))).value == m.value
            assert not m.judges or set(m.stats[:, 0]) <= {0.0, 1.0}
    assert given == set(named) and len(set(named)) == len(named)


def test_a_measure_of_a_row_depends_on_that_row_alone(evaluate: Example) -> None:
    """In reverse order, and with one row in each forward pass, rows have the same values."""
    for task in tasks_of(evaluate):
        first, view = known(evaluate, task), asked(evaluate, task).view()
        reverse = measured(
            evaluate, exam_of(view, task_named(task), rows_for(evaluate, task), tokens_per_forward=1, order=-1)
        )
        assert first.keys() == reverse.keys()
        for name, m in first.items():
            mine, theirs = (dict(zip(x.keys, x.stats, strict=True)) for x in (m, reverse[name]))
            assert mine.keys() == theirs.keys(), f"{name}: the example must ask all of its rows"
            for key, stats in mine.items():
                np.testing.assert_allclose(theirs[key], stats, rtol=1e-4, atol=1e-4, err_msg=f"{name} of {key}")


def test_an_evaluator_changes_nothing(evaluate: Example) -> None:
    """Weights, gradients, hooks, modes and the global generators are as before; a second evaluation finds the same."""
    for task in tasks_of(evaluate):
        view = asked(evaluate, task).view()
        view.module.train()
        view.trunk.eval()  # a part may have another mode than the whole
        before, drawn, first = snapshot(view), _generators(), known(evaluate, task)
        again = measured(evaluate, exam_of(view, task_named(task), rows_for(evaluate, task)))
        assert snapshot(view) == before
        assert _generators() == drawn
        assert {n: m.as_dict() for n, m in again.items()} == {n: m.as_dict() for n, m in first.items()}


def _generators() -> tuple[bytes, bytes, int]:
    """The states of the global generators."""
    numpy: Any = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), np.asarray(numpy[1]).tobytes(), hash(random.getstate())


def test_a_better_model_has_better_measures(evaluate: Example) -> None:
    """For the model that knows the rows by heart, no measure is worse than for its opposite, and one is better."""
    for task in tasks_of(evaluate):
        view = asked(evaluate, task).view("wrong")
        wrong = measured(evaluate, exam_of(view, task_named(task), rows_for(evaluate, task)))
        gains = {n: (m.value - wrong[n].value) * (1 if m.higher else -1) for n, m in known(evaluate, task).items()}
        assert min(gains.values()) >= -1e-9 and max(gains.values()) > 1e-3, gains


def test_without_rows_nothing_is_measured(evaluate: Example) -> None:
    """The evaluator refuses with a sentence, or gives no measure."""
    assert isinstance(evaluate.method, Evaluator)
    if evaluate.method.own_rows:
        return
    for task in tasks_of(evaluate):
        exam = exam_of(asked(evaluate, task).view(), task_named(task), ())
        try:
            found = evaluate.method.evaluate(exam)
        except LuthierError as error:
            assert " " in str(error) and "row" in str(error)
        else:
            assert found == []


__all__ = [
    "test_a_better_model_has_better_measures",
    "test_a_measure_of_a_row_depends_on_that_row_alone",
    "test_an_evaluator_changes_nothing",
    "test_an_evaluator_gives_the_measures_that_it_names",
    "test_without_rows_nothing_is_measured",
]
