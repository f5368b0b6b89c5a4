"""LiST: a teacher that is trained on a few labelled rows labels a pool; new students learn from it, in several rounds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from luthier.data.batch import collate
from luthier.method import Source, Traits
from luthier.model.view import ModelView, evaluating
from luthier.objectives.base import Forward
from luthier.objectives.distill import Distill
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Apply, Pipeline, Train
from luthier.step.lab import Lab
from luthier.step.outcome import Outcome, RenderedRows
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.tuners.adapter import Adapter

log = logging.getLogger(__name__)
COLLAPSED = 0.95  # above this share of the pool in one class, luthier warns that the teacher has collapsed


class List(Pipeline):
    """Self-training with adapters: label, train a new student on weighted soft labels, finish on the labelled rows.

    Rows of the lab: "labelled" (with their class) and "unlabelled". A row of the pool that is also labelled is left out, with a
    message. In the source, classes are words in the gap of a sentence (the task's `prompt` and `words`); a new head works
    too, but needs more labels.
    Every student starts from the base with newly drawn adapters; otherwise the teacher's errors would be reinforced.
    Departs from the source: training on the labelled rows is a stage with its own optimiser and decay; the model's head stays
    frozen; the teacher's labels are computed once for each round, which is exact because it is frozen.
    Cost: rounds x unlabelled_steps extra steps; the re-weighted 40% of them take about twice a plain step.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"classification"}), needs=frozenset({"jvp", "pool"}))
    source: ClassVar[Source] = Source(
        "LiST: Lite Prompted Self-training Makes Parameter-efficient Few-shot Learners",
        2021,
        "arXiv:2110.06274",
        "official code",
    )

    rounds: int = Field(3, ge=1)
    """Number of students, trained one after another (M)."""
    unlabelled_steps: int = Field(1000, ge=1)
    """Steps of a student on the pool (N_u)."""
    unlabelled_batch: int = Field(16, ge=1)
    """Rows in such a step."""
    labelled_epochs: float = Field(50.0, gt=0)
    """Passes over the labelled rows, for the first teacher and at the end of each student."""
    labelled_batch: int = Field(4, ge=1)
    """Rows in such a step."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate of every stage."""
    rank: int = Field(128, ge=1)
    """Rank of the adapters."""
    init_std: float = Field(0.0002, ge=0)
    """Standard deviation of the adapters at the start."""
    warmup_share: float = Field(0.6, ge=0, le=1)
    """Share of a student's steps before rows are weighted."""
    reweight: bool = True
    """Weigh rows by how much they help on the labelled rows."""
    seed: int = 0
    """Seed for all draws."""

    def next(self, done: Mapping[str, Outcome]) -> Train | Apply | None:
        if "teacher" not in done:
            return self._labelled("teacher", "base", 0)
        for m in range(1, self.rounds + 1):
            teacher = "teacher" if m == 1 else f"round-{m - 1}"
            if f"labels-{m}" not in done:
                return Apply(f"labels-{m}", (teacher,), like="unlabelled")
            if f"student-{m}" not in done:
                return self._student(m)
            if f"round-{m}" not in done:
                return self._labelled(f"round-{m}", f"student-{m}", m)
        return None

    def _adapter(self, m: int) -> Adapter:
        return Adapter(rank=self.rank, init_std=self.init_std, seed=self.seed * 1000 + m)

    def _labelled(self, name: str, start: str, m: int) -> Train:
        settings = TrainSettings(
            learning_rate=self.learning_rate,
            epochs=self.labelled_epochs,
            batch_size=self.labelled_batch,
            warmup_fraction=0.0,
            seed=self.seed + m,
        )
        return Train(name, self._adapter(m), Sft(), data="labelled", start=start, settings=settings)

    def _student(self, m: int) -> Train:
        settings = TrainSettings(
            learning_rate=self.learning_rate,
            max_steps=self.unlabelled_steps,
            batch_size=self.unlabelled_batch,
            warmup_fraction=0.0,
            seed=self.seed + m,
        )
        objective = Distill(warmup_share=self.warmup_share, reweight=self.reweight)
        return Train(f"student-{m}", self._adapter(m), objective, data=f"labels-{m}", settings=settings)

    @torch.no_grad()
    def apply(self, stage: Apply, view: ModelView, lab: Lab, done: Mapping[str, Outcome]) -> Outcome:
        """The pool with the teacher's soft labels, without rows that are labelled already."""
        pool, teacher = lab.rows("unlabelled"), done[stage.inputs[0]]
        if not pool:
            raise LuthierError("pipeline.list: the pool of unlabelled rows is empty")
        known = {tuple(row["ids"]) for row in lab.rows("labelled")}
        assert teacher.update is not None
        out = []
        with teacher.update.bind(view), evaluating(view.module):
            for row in pool:
                if tuple(row["ids"]) in known:
                    continue
                soft = Forward(collate([row]).to(view.device), view).logits().softmax(-1)[0].cpu()
                extra = {k: v for k, v in row.get("row", {}).items() if k != "label"}
                out.append({**row, "row": {**extra, "soft": soft}})
        self._tell(stage, out, len(pool))
        return Outcome(stage.name, rows=out)

    def _tell(self, stage: Apply, labelled: RenderedRows, given: int) -> None:
        """Warn if the pool is of little use. Raises LuthierError if nothing is left of it."""
        if not labelled:
            raise LuthierError(f"pipeline.list: all {given} rows of the pool are among the labelled rows")
        if left_out := given - len(labelled):
            log.warning("%s: %d rows of the pool are labelled rows as well and are left out", stage.name, left_out)
        if len(labelled) < self.unlabelled_batch:
            log.warning(
                "%s: the pool has %d rows, less than a batch of %d", stage.name, len(labelled), self.unlabelled_batch
            )
        (most, count), *_ = Counter(int(row["row"]["soft"].argmax()) for row in labelled).most_common(1)
        if count > COLLAPSED * len(labelled):
            log.warning("%s: the teacher gives class %d to %d of %d rows", stage.name, most, count, len(labelled))
