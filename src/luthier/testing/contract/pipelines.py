"""What every pipeline keeps: it depends on outcomes alone, ends, replays after a kill, and reports what its stages refuse."""

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
from luthier.pipelines.base import Apply, Outcome, Pipeline, Train, run_pipeline
from luthier.step.lab import Lab
from luthier.testing.contract.examples import Example, worn
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import Interrupted

MOST = 100  # stages after which a pipeline counts as endless
FOLDER = re.compile(r"[a-z0-9][a-z0-9._-]*")  # names that every file system takes as they are


@dataclass(frozen=True)
class Whole:
    """A pipeline that ran without a break: outcomes by stage, and the model as it was before and is after."""

    done: dict[str, Outcome]
    before: dict[str, Any]
    after: dict[str, Any]


def pipeline_lab(pipeline: Example) -> Lab:
    """Rows by the names that stages ask for."""
    return Lab({"train": pipeline.rows or rows_of(), **{n: list(r) for n, r in pipeline.pools.items()}})


@cache
def whole(pipeline: Example) -> Whole:
    """Run from end to end, once for all tests."""
    assert isinstance(pipeline.method, Pipeline)
    view = view_of()
    view.module.train()
    before = worn(view)
    done = run_pipeline(pipeline.method, view, pipeline_lab(pipeline))
    return Whole(done, before, worn(view))


def prefixes(done: Mapping[str, Outcome]) -> Iterator[dict[str, Outcome]]:
    """What was done before the first stage, before the second, and so on; at last all of it."""
    names = list(done)
    for n in range(len(names) + 1):
        yield {name: done[name] for name in names[:n]}


def bits(outcome: Outcome) -> dict[str, Any]:
    """All that a stage left, in a form that compares to the bit."""
    update = None if outcome.update is None else outcome.update.digest()
    under = None if outcome.under is None else outcome.under.digest()
    state = {k: _plain(v) for k, v in (outcome.state or {}).items()}
    beside = {k: _plain(v) for k, v in (outcome.beside or {}).items()}
    rows = None if outcome.rows is None else [_plain(r) for r in outcome.rows]
    return {"stage": outcome.stage, "update": update, "under": under, "state": state, "beside": beside, "rows": rows}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def test_the_next_stage_depends_on_outcomes_alone(pipeline: Example) -> None:
    """Asked twice, by an equal pipeline, with outcomes in another order that it cannot write to: the same stage."""
    assert isinstance(pipeline.method, Pipeline)
    ran = whole(pipeline)
    for done, stage in zip(prefixes(ran.done), [*(o.stage for o in ran.done.values()), None], strict=True):
        turned = MappingProxyType(dict(reversed(done.items())))
        equal = pipeline.method.model_copy(deep=True)
        assert stage == pipeline.method.next(done) == pipeline.method.next(turned) == equal.next(done)


def test_a_pipeline_ends_and_its_stages_have_names_of_their_own(pipeline: Example) -> None:
    done = whole(pipeline).done
    assert 0 < len(done) <= MOST
    for name, outcome in done.items():
        assert name == outcome.stage.name and FOLDER.fullmatch(name) and name != "base", (
            "a stage's name is its folder's"
        )
    assert len({name.casefold() for name in done}) == len(done)
    last = list(done.values())[-1]
    assert isinstance(last.stage, Train) and last.update is not None, "the last stage's update is the result"


def test_stages_refer_to_earlier_ones_and_to_rows_that_there_are(pipeline: Example) -> None:
    ran, lab = whole(pipeline), pipeline_lab(pipeline)
    for done, outcome in zip(prefixes(ran.done), ran.done.values(), strict=False):
        stage = outcome.stage
        if isinstance(stage, Apply):
            assert set(stage.inputs) <= done.keys() and outcome.rows
            continue
        assert stage.start == "base" or isinstance(done[stage.start].stage, Train)
        assert stage.carry is None or isinstance(done[stage.carry].stage, Train)
        assert stage.data in lab.sets or done[stage.data].rows, "rows come from the lab or from a stage that makes some"


def test_a_pipeline_leaves_the_base_as_it_was(pipeline: Example) -> None:
    ran = whole(pipeline)
    assert ran.before == ran.after


def test_a_pipeline_stopped_before_and_within_each_stage_ends_as_one_that_ran_through(
    pipeline: Example, tmp_path: Path
) -> None:
    assert isinstance(pipeline.method, Pipeline)
    expected, lab = whole(pipeline), pipeline_lab(pipeline)
    for name, outcome in expected.done.items():
        view = view_of()
        view.module.train()

        def stop(stage: Train | Apply, name: str = name) -> None:
            if stage.name == name:
                raise Interrupted(name)

        with pytest.raises(Interrupted):
            run_pipeline(pipeline.method, view, lab, tmp_path, before_stage=stop)
        assert worn(view) == expected.before, "also after a stop the base is as it was"
        if isinstance(outcome.stage, Train):
            with pytest.raises(Interrupted):
                run_pipeline(pipeline.method, view, lab, tmp_path, stop=_once())
            assert worn(view) == expected.before
    again = run_pipeline(pipeline.method, view_of(), lab, tmp_path)
    assert list(again) == list(expected.done)
    for name, outcome in again.items():
        assert bits(outcome) == bits(expected.done[name]), name


def _once() -> Callable[[], bool]:
    """Asked before each step that is left to do: stops before the second. Stages that are finished do not ask."""
    asked = iter([False, True])
    return lambda: next(asked)


def test_what_a_stages_methods_refuse_the_pipeline_reports_beforehand(pipeline: Example) -> None:
    """Without a model, a row or a stage that has run: `check` says it before work begins."""
    assert isinstance(pipeline.method, Pipeline)
    stages = [o.stage for o in whole(pipeline).done.values() if isinstance(o.stage, Train)]
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


__all__ = [n for n in dir() if n.startswith("test_")]
