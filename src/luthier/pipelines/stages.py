"""Stages written out in the recipe, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, SerializeAsAny, model_validator

from luthier.method import Facts, Problem
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Apply, Outcome, Pipeline, Train
from luthier.step.settings import TrainSettings
from luthier.tuners.base import Tuner
from luthier.tuners.lora import Lora


class Stage(TrainSettings):
    """One stage: its name, methods, and settings of its own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Folder and reference of the stage."""
    tuner: SerializeAsAny[Tuner] = Lora()
    """Which weights move."""
    objective: SerializeAsAny[Objective] = Sft()
    """What each token teaches."""
    start: str = "base"
    """The base, or an earlier stage whose result this one starts from."""
    carry: str | None = None
    """An earlier stage whose modules beside the model (heads) are taken over."""


class Stages(Pipeline):
    """Train in the stages that the recipe lists; the last one's update is the result.

    A stage that starts from an earlier one goes on with its trained state where the tuner is the same. Where it is
    another, it trains on a base with the earlier update in the weights, and its result holds both. `carry` hands on what
    an objective trained beside the model.
    Cost: the sum of its stages.
    """

    stages: list[Stage] = Field(min_length=1)
    """In order."""

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
        return self

    def check(self, facts: Facts) -> list[Problem]:
        """What the stages' own methods say."""
        found = super().check(facts)
        for i, stage in enumerate(self.stages):
            mine = replace(facts, settings=stage, batch_size=stage.batch_size, others=(stage.tuner, stage.objective))
            for key in ("tuner", "objective"):
                for p in getattr(stage, key).check(mine):
                    found.append(Problem(f"stages.{i}.{key}.{p.key}", p.what, p.remedy))
        return found

    def next(self, done: Mapping[str, Outcome]) -> Train | Apply | None:
        stage = next((s for s in self.stages if s.name not in done), None)
        if stage is None:
            return None
        fields: dict[str, Any] = {n: getattr(stage, n) for n in TrainSettings.model_fields}
        return Train(
            stage.name, stage.tuner, stage.objective, start=stage.start, settings=TrainSettings(**fields), carry=stage.carry
        )  # fmt: skip
