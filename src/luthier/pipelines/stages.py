"""The stages that a recipe lists, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, SerializeAsAny, model_validator

from luthier.method import Facts, Problem
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Apply, Pipeline, Train
from luthier.step.outcome import Outcome
from luthier.step.settings import TrainSettings
from luthier.tuners.base import Tuner
from luthier.tuners.lora import Lora


class Stage(TrainSettings):
    """One stage: its name, methods and settings."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Folder and reference of the stage."""
    tuner: SerializeAsAny[Tuner] = Lora()
    """Which weights are trained."""
    objective: SerializeAsAny[Objective] = Sft()
    """The loss of each token."""
    start: str = "base"
    """"base", or an earlier stage whose result this stage starts from."""
    carry: str | None = None
    """An earlier stage whose extra modules (heads) are used again."""


class Stages(Pipeline):
    """Train in the stages that the recipe lists. The update of the last one is the result.

    A stage that starts from an earlier one continues from its trained state if the tuner is the same. With another tuner,
    it trains with the earlier update in the weights, and its result holds both. A tuner that draws its weights (hft) draws
    again for each of its stages. `carry` passes on modules that an objective trained beside the model.
    Cost: the sum of its stages.
    """

    recipe_lines: ClassVar[tuple[str, ...]] = (
        "data: {train: builtin:requests, eval: builtin:requests}",
        "pipeline:",
        "  stages:",
        "    stages:",
        "      - {name: first, tuner: full, learning_rate: 1e-5, epochs: 0.5}",
        "      - {name: second, start: first, tuner: lora, learning_rate: 1e-3}",
    )

    stages: list[Stage] = Field(min_length=1, examples=[[{"name": "first"}]])
    """The stages, in order."""

    @model_validator(mode="after")
    def _refer_back(self) -> Stages:
        seen: dict[str, Stage] = {}
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called {stage.name}")
            for key, ref in (("start", stage.start), ("carry", stage.carry)):
                if ref not in (None, "base") and ref not in seen:
                    raise ValueError(f"{key} of {stage.name} names {ref!r}, which is no earlier stage")
            seen[stage.name] = stage
        if "base" in seen:
            raise ValueError("a stage is called base, which means the base model in start; rename it")
        return self

    def check(self, facts: Facts) -> list[Problem]:
        """What the stages' own methods say."""
        found, seen = super().check(facts), {s.name: s for s in self.stages}
        for i, stage in enumerate(self.stages):
            mine = replace(facts, settings=stage, batch_size=stage.batch_size, others=(stage.tuner, stage.objective))
            for key in ("tuner", "objective"):
                for p in getattr(stage, key).check(mine):
                    found.append(Problem(f"stages.{i}.{key}.{p.key}".rstrip("."), p.what, p.remedy))
            found += [Problem(f"stages.{i}.{key}", what, remedy) for key, what, remedy in stage.unread()]
            if stage.carry is not None and not seen[stage.carry].objective.trains_beside:
                what = f"{stage.carry!r} trains no modules beside the model, so there is nothing to carry"
                found.append(Problem(f"stages.{i}.carry", what, "remove it, or name another stage"))
            if facts.quantized and _another(stage, seen) and stage.tuner.changes_model and _learnt(stage.start, seen):
                what = f"{stage.name} goes on from another tuner's update, which cannot be written into packed weights"
                found.append(Problem(f"stages.{i}.start", what, "keep the tuner, start from base, or remove quantize"))
        head = facts.anatomy is None or facts.anatomy.task_head
        if not head and not _learnt(self.stages[-1].name, seen):
            what = "the last stage changes nothing of the model, so the run would end with the base model"
            found.append(Problem(f"stages.{len(self.stages) - 1}.tuner", what, "choose another tuner"))
        return found

    def next(self, done: Mapping[str, Outcome]) -> Train | Apply | None:
        stage = next((s for s in self.stages if s.name not in done), None)
        if stage is None:
            return None
        earlier = self.stages[: self.stages.index(stage)]
        tuner = stage.tuner.in_stage(sum(type(s.tuner) is type(stage.tuner) for s in earlier))
        fields: dict[str, Any] = {n: getattr(stage, n) for n in TrainSettings.model_fields}
        return Train(
            stage.name, tuner, stage.objective, start=stage.start, settings=TrainSettings(**fields), carry=stage.carry
        )  # fmt: skip


def _another(stage: Stage, seen: Mapping[str, Stage]) -> bool:
    """True if the stage continues from what another tuner learnt."""
    return stage.start != "base" and seen[stage.start].tuner != stage.tuner


def _learnt(name: str, seen: Mapping[str, Stage]) -> bool:
    """True if this stage, or one that it continues from, changed the model."""
    return name != "base" and (seen[name].tuner.changes_model or _learnt(seen[name].start, seen))
