"""Tests of every pipeline: it depends on outcomes alone, ends, replays after a kill, and reports what its stages refuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from torch import Tensor

from luthier.method import Facts
from luthier.method import registry as manifest
from luthier.pipelines.base import Apply, Pipeline, Train, planned, run_pipeline
from luthier.step.lab import Lab
from luthier.step.outcome import Outcome
from luthier.testing.contract.examples import Example, snapshot
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Interrupted

MOST = 100  # a pipeline with more stages counts as endless
FOLDER = re.compile(r"[a-z0-9][a-z0-9._-]*")  # names that every file system accepts


@dataclass(frozen=True)
class Whole:
    """A pipeline that ran without a break: its stages, their outcomes, and the state of the model before and after."""

    stages: list[Train | Apply]
    done: dict[str, Outcome]
    before: dict[str, Any]
    after: dict[str, Any]


def pipeline_lab(pipeline: Example) -> Lab:
    """Rows by the names that stages ask for."""
    return Lab({"train": pipeline.rows or rows_of(), **{n: list(r) for n, r in pipeline.pools.items()}})


@cache
def whole(pipeline: Example) -> Whole:
    """The pipeline, run to its end once for all tests."""
    assert isinstance(pipeline.method, Pipeline)
    view = view_of()
    view.module.train()
    before = snapshot(view)
    stages: list[Train | Apply] = []
    done = run_pipeline(pipeline.method, view, pipeline_lab(pipeline), before_stage=stages.append)
    return Whole(stages, done, before, snapshot(view))


def prefixes(done: Mapping[str, Outcome]) -> Iterator[dict[str, Outcome]]:
    """The outcomes before the first stage, before the second, and so on; at last all of them."""
    names = list(done)
    for n in range(len(names) + 1):
        yield {name: done[name] for name in names[:n]}


def bits(outcome: Outcome) -> dict[str, Any]:
    """Everything in an outcome, for exact comparison."""
    out = {name: _plain(getattr(outcome, name)) for name in ("rows", "mask", "metrics", "state", "beside")}
    updates = {name: getattr(outcome, name) for name in ("update", "under")}
    return {**out, **{name: None if u is None else u.digest() for name, u in updates.items()}, "tuner": outcome.tuner}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_the_next_stage_depends_on_outcomes_alone(pipeline: Example) -> None:
    """`next` gives the same stage again, for an equal pipeline, for read-only outcomes in another order, and for outcomes with
    only a name and rows, as in plans.
    """
    assert isinstance(pipeline.method, Pipeline)
    ran = whole(pipeline)
    for done, stage in zip(prefixes(ran.done), [*ran.stages, None], strict=True):
        reverse = MappingProxyType(dict(reversed(done.items())))
        equal, bare = pipeline.method.model_copy(deep=True), {n: Outcome(n, rows=o.rows) for n, o in done.items()}
        assert (
            stage == pipeline.method.next(done) == pipeline.method.next(reverse) == equal.next(done) == equal.next(bare)
        )
    plan = planned(pipeline.method, pipeline_lab(pipeline).sets)
    assert [stage for stage, _ in plan] == [s for s in ran.stages if isinstance(s, Train)], "the plan is what ran"


def test_a_pipeline_ends_and_its_stages_have_names_of_their_own(pipeline: Example) -> None:
    ran = whole(pipeline)
    assert 0 < len(ran.done) <= MOST and [s.name for s in ran.stages] == list(ran.done)
    for name, outcome in ran.done.items():
        assert name == outcome.name and FOLDER.fullmatch(name) and name != "base", "a stage's name is its folder's"
    assert len({name.casefold() for name in ran.done}) == len(ran.done)
    assert ran.done[ran.stages[-1].name].update is not None, "the last stage's update is the result"


def test_stages_refer_to_earlier_stages_and_to_rows_that_exist(pipeline: Example) -> None:
    ran, lab = whole(pipeline), pipeline_lab(pipeline)
    for done, stage in zip(prefixes(ran.done), ran.stages, strict=False):
        if isinstance(stage, Apply):
            made = ran.done[stage.name]
            assert set(stage.inputs) <= done.keys() and stage.like in lab.sets
            assert made.rows or made.update or made.mask or made.metrics, "a stage without training makes something"
            continue
        assert stage.start == "base" or done[stage.start].update is not None
        assert stage.carry is None or stage.carry in done
        assert stage.data in lab.sets or done[stage.data].rows, "rows come from the lab or from a stage that makes rows"


def test_a_pipeline_leaves_the_base_as_it_was(pipeline: Example) -> None:
    ran = whole(pipeline)
    assert ran.before == ran.after


def test_a_pipeline_stopped_before_and_within_each_stage_equals_one_without_a_break(
    pipeline: Example, tmp_path: Path
) -> None:
    assert isinstance(pipeline.method, Pipeline)
    expected, lab = whole(pipeline), pipeline_lab(pipeline)
    for stage in expected.stages:
        view = view_of()
        view.module.train()

        def stop(comes: Train | Apply, name: str = stage.name) -> None:
            if comes.name == name:
                raise Interrupted(name)

        with pytest.raises(Interrupted):
            run_pipeline(pipeline.method, view, lab, tmp_path, before_stage=stop)
        assert snapshot(view) == expected.before, "the base is unchanged after a stop too"
        if isinstance(stage, Train):
            with pytest.raises(Interrupted):
                run_pipeline(pipeline.method, view, lab, tmp_path, stop=_once())
            assert snapshot(view) == expected.before
    again = run_pipeline(pipeline.method, view_of(), lab, tmp_path)
    assert list(again) == list(expected.done)
    for name, outcome in again.items():
        assert bits(outcome) == bits(expected.done[name]), name


def _once() -> Callable[[], bool]:
    """A callback that is called before each step and stops before the second. Finished stages do not call it."""
    asked = iter([False, True])
    return lambda: next(asked)


def test_check_reports_what_the_methods_of_stages_refuse(pipeline: Example) -> None:
    """`check` needs no model, no rows and no finished stage."""
    assert isinstance(pipeline.method, Pipeline)
    stages = [s for s in whole(pipeline).stages if isinstance(s, Train)]
    tasks = sorted(pipeline.method.traits.tasks)
    wrong: list[dict[str, Any]] = [
        {},
        {"quantized": True},
        {"num_processes": 2},
        {"layout": "padded"},
        {"layout": "flat"},
    ]
    wrong += [{"task": name} for name in manifest.names("task")]
    for change in wrong:
        facts = replace(Facts(task=tasks[0]), **change)
        told = pipeline.method.check(facts)
        assert all(p.key and p.what for p in told)
        for stage in stages:
            own = replace(facts, settings=stage.settings, batch_size=stage.settings.batch_size,
                          others=(stage.tuner, stage.objective))  # fmt: skip
            for method in (stage.tuner, stage.objective):
                for problem in method.check(own):
                    assert any(p.key.split(".")[-1] == problem.key.split(".")[-1] for p in told), (change, problem)


__all__ = [
    "test_a_pipeline_ends_and_its_stages_have_names_of_their_own",
    "test_a_pipeline_leaves_the_base_as_it_was",
    "test_a_pipeline_stopped_before_and_within_each_stage_equals_one_without_a_break",
    "test_check_reports_what_the_methods_of_stages_refuse",
    "test_stages_refer_to_earlier_stages_and_to_rows_that_exist",
    "test_the_next_stage_depends_on_outcomes_alone",
]
