"""The base class of pipelines. A pipeline is a pure function of the outcomes so far, so it can replay after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from luthier.method import Method
from luthier.model.view import ModelView, as_found
from luthier.objectives.base import Objective
from luthier.step.lab import Lab, Ledger
from luthier.step.outcome import Outcome, RenderedRows
from luthier.step.progress import Progress
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.training.loop import Loop
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
    """A stage without training: label a pool, merge, choose a mask. The pipeline's own `apply` does it.

    inputs  names of earlier stages
    like    the set of rows that those it makes come from: plans count with as many
    """

    name: str
    inputs: tuple[str, ...] = ()
    like: str = "train"


class Pace(BaseModel):
    """Changes the length and the learning rate of every stage of a pipeline."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    length: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor for the number of steps of each stage; each takes at least one."""
    learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor for the learning rate of each stage."""
    max_steps: int | None = Field(None, ge=1)
    """No stage takes more steps than this."""

    def steps(self, own: int) -> int:
        """Steps of a stage whose own number is `own`."""
        scaled = max(1, round(own * self.length))
        return scaled if self.max_steps is None else min(scaled, self.max_steps)

    def of(self, stage: Train, rows: RenderedRows, save_memory: bool = False) -> Train:
        """The stage at this pace, over these rows."""
        own = stage.settings
        changed: dict[str, Any] = {}
        if self != OWN_PACE:
            changed["max_steps"] = self.steps(Loop.length(rows, own))
            changed["learning_rate"] = own.learning_rate * self.learning_rate
        if own.gradient_checkpointing == "auto":
            changed["gradient_checkpointing"] = save_memory
        return replace(stage, settings=own.model_copy(update=changed))


OWN_PACE = Pace()


class Pipeline(Method):
    """Decides which stage comes next."""

    def next(self, done: Mapping[str, Outcome]) -> Train | Apply | None:
        """The next stage after these outcomes, or None at the end. It must depend on nothing else.

        Plans call it with outcomes that have only a name and rows, so it must accept those.
        """
        raise NotImplementedError  # the seam: every pipeline has its own

    def apply(self, stage: Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome]) -> Outcome:
        """Carry out an Apply stage. Returns what it made: rows, an update of the base, a mask, metrics."""
        raise NotImplementedError  # the seam: every pipeline with an Apply stage has its own


@contextmanager
def started(
    view: ModelView, stage: Train, lab: Lab, done: Mapping[str, Outcome], total_steps: int
) -> Iterator[tuple[Trainable, Update | None]]:
    """The stage's trainable on the model it starts from, and the update under it. The base is restored afterwards."""
    with ExitStack() as stack:
        before = None if stage.start == "base" else done[stage.start]
        same = before is not None and before.tuner == stage.tuner
        under = None if before is None else before.under if same else before.update
        if under is not None:
            stack.enter_context(under.in_place(view))
        trainable = with_head(stage.tuner.attach(view, lab, total_steps), view.anatomy.task_head)
        stack.callback(trainable.detach)
        if before is not None and same:
            trainable.continue_from(dict(before.state))
        yield trainable, under


def planned(pipeline: Pipeline, sets: Mapping[str, RenderedRows]) -> list[tuple[Train, str]]:
    """Every training stage in order, with the set that its rows come from, before anything is trained."""
    done: dict[str, Outcome] = {}
    came: dict[str, str] = {}
    out = []
    while (stage := pipeline.next(done)) is not None:
        if isinstance(stage, Apply):
            came[stage.name] = stage.like
            done[stage.name] = Outcome(stage.name, rows=sets[stage.like])
        else:
            out.append((stage, came.get(stage.data, stage.data)))
            done[stage.name] = Outcome(stage.name, tuner=stage.tuner)
    return out


def rows_of(stage: Train, lab: Lab, done: Mapping[str, Outcome]) -> RenderedRows:
    """The rows that a stage trains on. Raises LuthierError where an earlier stage made none."""
    if stage.data not in done:
        return lab.rows(stage.data)
    rows = done[stage.data].rows
    if rows is None:
        raise LuthierError(f"{stage.name}: trains on the rows of {stage.data}, which made none")
    return rows


def run_pipeline(
    pipeline: Pipeline, view: ModelView, lab: Lab, folder: Path | None = None, *, deadline: float | None = None,
    before_stage: Callable[[Train | Apply], None] = lambda _: None, pace: Pace = OWN_PACE, save_memory: bool = False, **loop: Any,
) -> dict[str, Outcome]:  # fmt: skip
    """Run all stages in order. Returns the outcomes by name; the last one is the result.

    save_memory  what gradient_checkpointing "auto" means in its stages
    loop         more arguments of each stage's Loop
    Each stage saves checkpoints in a folder with its name, also at its end. A killed pipeline replays: finished stages are
    loaded, and the interrupted one continues.
    """
    done: dict[str, Outcome] = {}
    while (stage := pipeline.next(done)) is not None:
        before_stage(stage)
        done[stage.name] = run_stage(pipeline, stage, view, lab, done, folder, deadline, pace, save_memory, **loop)
    return done


def run_stage(
    pipeline: Pipeline, stage: Train | Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome],
    folder: Path | None = None, deadline: float | None = None, pace: Pace = OWN_PACE, save_memory: bool = False, **loop: Any,
) -> Outcome:  # fmt: skip
    """Run one stage; arguments as in `run_pipeline`. The outcome's progress says what it cost."""
    inside = replace(lab, done=done)
    if isinstance(stage, Apply):
        return applied(pipeline, stage, view, inside, done)
    source = rows_of(stage, lab, done)
    stage = pace.of(stage, source, save_memory)
    total = Loop.length(source, stage.settings)
    place = None if folder is None else folder / stage.name
    carried = done[stage.carry].beside if stage.carry else None
    with as_found(view), started(view, stage, inside, done, total) as (trainable, under):
        run = Loop(
            view, source, trainable, stage.objective, stage.settings, lab=inside, folder=place, carried=carried, **loop
        )
        progress = run.run(deadline)
        if progress.step > progress.saved_step:
            run.save()
        return trained(stage, trainable, under, run)


def trained(stage: Train, trainable: Trainable, under: Update | None, run: Loop) -> Outcome:
    """What a loop that has ended leaves to later stages."""
    own = trainable.update()
    return Outcome(
        stage.name,
        update=own if under is None else under.then(own),
        tuner=stage.tuner,
        state=_copied(trainable.state_dict()),
        under=under,
        beside=None if run.extra is None else _copied(run.extra.state_dict()),
        progress=run.progress,
    )


def applied(pipeline: Pipeline, stage: Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome]) -> Outcome:
    """Run an Apply stage. The outcome's progress says what it cost: its own forward passes, and nested runs."""
    ledger = Ledger()
    with as_found(view), ledger.measuring(stage.name, view):
        out = pipeline.apply(stage, view, replace(lab, ledger=ledger), done)
    took = Progress(seconds=ledger.seconds[stage.name], flops={"apply": sum(ledger.flops.values())})
    return replace(out, name=stage.name, progress=took)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in state.items()}
