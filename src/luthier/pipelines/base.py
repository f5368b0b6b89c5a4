"""The base class of pipelines. A pipeline is a pure function of the outcomes so far, so it can replay after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.method import Method
from luthier.model.view import ModelView
from luthier.objectives.base import Objective
from luthier.step.lab import Lab
from luthier.step.progress import Progress
from luthier.step.settings import TrainSettings
from luthier.training.loop import Loop, Rows
from luthier.tuners.base import Trainable, Tuner, with_head
from luthier.update import Update


@dataclass(frozen=True)
class Train:
    """Train on rows.

    start  "base", or the name of an earlier stage: its trained state if the tuner is the same, else its Update,
    put into the weights
    data   name of a set of rows in the lab, or of an earlier Apply stage
    carry  name of an earlier stage whose extra modules (heads) are used again
    """

    name: str
    tuner: Tuner
    objective: Objective
    data: str = "train"
    start: str = "base"
    settings: TrainSettings = field(default_factory=TrainSettings)
    carry: str | None = None


@dataclass(frozen=True)
class Apply:
    """A stage without training: label a pool, merge, choose a mask. The pipeline's own `apply` carries it out."""

    name: str
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a stage: a trained state, or rows.

    update  the whole difference to the base, with what the stage started from
    under   the update that was in place while the stage trained; its state does not hold it
    """

    name: str
    stage: Train | Apply
    update: Update | None = None
    under: Update | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] | None = None
    rows: Rows | None = None
    progress: Progress | None = None


class Pipeline(Method):
    """Decides which stage comes next."""

    def next(self, done: Mapping[str, Outcome]) -> Train | Apply | None:
        """The next stage after these outcomes, or None at the end. It must depend on nothing else."""
        raise NotImplementedError

    def apply(self, stage: Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome]) -> Rows:
        """Carry out an Apply stage."""
        raise NotImplementedError


@contextmanager
def started(
    view: ModelView, stage: Train, lab: Lab, done: Mapping[str, Outcome], total_steps: int
) -> Iterator[tuple[Trainable, Update | None]]:
    """The stage's trainable on the model it starts from, and the update under it. The base is restored afterwards."""
    with ExitStack() as stack:
        before = None if stage.start == "base" else done[stage.start]
        same = before is not None and isinstance(before.stage, Train) and before.stage.tuner == stage.tuner
        under = None if before is None else before.under if same else before.update
        if under is not None:
            stack.enter_context(under.in_place(view))
        trainable = with_head(stage.tuner.attach(view, lab, total_steps), view.anatomy.task_head)
        stack.callback(trainable.detach)
        if before is not None and same:
            trainable.go_on(dict(before.state))
        yield trainable, under


def run_pipeline(
    pipeline: Pipeline, view: ModelView, lab: Lab, folder: Path | None = None, *, deadline: float | None = None,
    before_stage: Callable[[Train | Apply], None] = lambda _: None, **loop: Any,
) -> dict[str, Outcome]:  # fmt: skip
    """Run all stages in order. Returns the outcomes by name; the last one is the result.

    Each stage saves checkpoints in a folder with its name, also at its end. A killed pipeline replays: finished stages are
    loaded, and the interrupted one continues.
    """
    done: dict[str, Outcome] = {}
    while (stage := pipeline.next(done)) is not None:
        before_stage(stage)
        done[stage.name] = run_stage(pipeline, stage, view, lab, done, folder, deadline, **loop)
    return done


def run_stage(
    pipeline: Pipeline, stage: Train | Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome],
    folder: Path | None = None, deadline: float | None = None, **loop: Any,
) -> Outcome:  # fmt: skip
    """One stage."""
    if isinstance(stage, Apply):
        return Outcome(stage.name, stage, rows=pipeline.apply(stage, view, lab, done))
    source = done[stage.data].rows if stage.data in done else lab.rows(stage.data)
    assert source is not None
    carried = done[stage.carry].beside if stage.carry else None
    total = Loop.length(source, stage.settings)
    place = None if folder is None else folder / stage.name
    with started(view, stage, lab, done, total) as (trainable, under):
        run = Loop(
            view, source, trainable, stage.objective, stage.settings, lab=lab, folder=place, carried=carried, **loop
        )
        progress = run.run(deadline)
        if progress.step > progress.saved_step:
            run.save()
        state = {k: v.detach().cpu().clone() for k, v in trainable.state_dict().items()}
        beside = None if run.extra is None else {k: v.detach().cpu().clone() for k, v in run.extra.state_dict().items()}
        own = trainable.update()
        whole = own if under is None else under.then(own)
        return Outcome(stage.name, stage, whole, under, state, beside, None, progress)
