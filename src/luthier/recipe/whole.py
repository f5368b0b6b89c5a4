"""The recipe as a typed object: its plain keys and its methods, and which of them cannot be combined."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializeAsAny

from luthier.collaboration.base import Collaboration
from luthier.compute.base import Compute
from luthier.curation.base import Curator, chain_of
from luthier.data.codec import Chain
from luthier.data.columns import RESERVED
from luthier.data.reading import has_splits
from luthier.decoding.base import Decoder
from luthier.decoding.greedy import Greedy
from luthier.evaluation.base import Evaluator
from luthier.method import Facts, Method
from luthier.method.kinds import LISTED
from luthier.method.registry import find, written
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Pace, Pipeline
from luthier.recipe.settings import RunSettings, set_in
from luthier.step.settings import TrainSettings
from luthier.support.errors import RecipeError
from luthier.tasks.base import Task
from luthier.tasks.causal_lm import CausalLm
from luthier.tuners.base import Tuner
from luthier.tuners.lora import Lora


class Recipe(RunSettings):
    """The settings of a run."""

    task: SerializeAsAny[Task] = CausalLm()
    """What a row is."""
    tuner: SerializeAsAny[Tuner] = Lora()
    """Which weights are trained."""
    objective: SerializeAsAny[Objective] = Sft()
    """The loss of each token."""
    curate: list[SerializeAsAny[Curator]] = Field(default_factory=list)
    """Steps that choose, weigh, rewrite, split or add rows, in order."""
    compute: SerializeAsAny[Compute] | None = None
    """A method that computes fewer tokens in the forward pass."""
    pipeline: SerializeAsAny[Pipeline] | None = None
    """Several stages instead of one, each with its own tuner and objective."""
    pace: Pace = Pace()
    """How long and how fast the pipeline's stages train, beside what it says: {length: 0.1} for a try."""
    collaborate: SerializeAsAny[Collaboration] | None = None
    """A protocol between parties, for `luthier collaborate`."""
    decode: SerializeAsAny[Decoder] = Greedy()
    """How answers are generated, in evaluation and in use."""
    evaluate: list[SerializeAsAny[Evaluator]] = Field(default_factory=list)
    """What is measured before and after tuning, besides what is always measured: the loss, and classes or forgetting."""

    def methods(self) -> dict[str, Method]:
        """The methods of this recipe, by key. The stages of a pipeline have their own."""
        if self.pipeline is not None:
            return {"pipeline": self.pipeline}
        parts: dict[str, Method] = {"tuner": self.tuner, "objective": self.objective}
        more = {"compute": self.compute, "collaborate": self.collaborate}
        return {**parts, **{k: m for k, m in more.items() if m is not None}}

    @property
    def codec(self) -> Chain:
        """The codecs of the recipe's curators: they change the form of questions, and change answers back."""
        return chain_of(self.curate)

    def evaluators(self) -> list[Evaluator]:
        """The evaluators that always measure, and those of the recipe."""
        always: list[Evaluator] = [find("evaluate", name)() for name in self.task.always]
        return [*(a for a in always if not any(type(e) is type(a) for e in self.evaluate)), *self.evaluate]

    def listed(self) -> dict[str, Method]:
        """The methods of keys that hold lists, by key and place."""
        return {f"{key}.{i}": m for key in LISTED for i, m in enumerate(getattr(self, key))}

    def facts(self, **more: Any) -> Facts:
        """What methods may know before weights are loaded."""
        others = tuple(self.methods().values())
        known = {"quantized": self.quantize is not None, **more}
        return Facts(
            task=self.task.key(), batch_size=self.batch_size, settings=self, others=others, redraws=self.task.redraws,
            kept=frozenset(self.data.carried.fields), **known,
        )  # fmt: skip

    def check_methods(self, facts: Facts | None = None) -> None:
        """Raises RecipeError for the first combination that cannot work."""
        facts = facts or self.facts()
        owners: dict[str, str] = {}
        for key, method in {"task": self.task, **self.methods(), **self.listed()}.items():
            for problem in method.check(facts):
                raise RecipeError(f"{key}.{method.key()}.{problem.key}".rstrip("."), problem.what, problem.remedy)
            for claim in method.traits.claims:
                if claim in owners:
                    raise RecipeError(
                        key,
                        f"{method.key()} and {owners[claim]} both need {claim}, which only one method can have",
                        "choose one",
                    )
                owners[claim] = method.key()
        head = facts.anatomy is None or facts.anatomy.task_head
        if self.pipeline is None and not self.tuner.changes_model and not head:
            what = "changes nothing of this model, so the run would end with the base model"
            raise RecipeError(
                f"tuner.{self.tuner.key()}", what, "choose another tuner, or use it in a stage of a pipeline"
            )

    def check_unread(self) -> None:
        """Raises RecipeError for a key that was set but that this run would not read."""
        data = set_in(self.data)
        self._check_measures()
        if self.pipeline is not None:
            stages = {"tuner", "objective", "compute", *TrainSettings.model_fields} - {"seed", "tokens_per_forward"}
            inside = {key for stage in getattr(self.pipeline, "stages", ()) for key in type(stage).model_fields}
            for key in sorted(set_in(self) & stages):
                remedy = "set it in the stages" if key in inside else "remove it"
                raise RecipeError(key, f"is not read beside pipeline {self.pipeline.key()}", remedy)
        for key, what, remedy in self.unread():
            raise RecipeError(key, what, remedy)
        self._check_fields()
        held_in, share = self.data.eval, isinstance(self.data.eval, float)
        splits = [any(has_splits(s.path) for s in self.data.sources), isinstance(held_in, str) and has_splits(held_in)]
        single, held = isinstance(self.data.train, str), held_in is not None
        unread_pool = self.data.pool and not self.task.pool_shapes
        rows = ("has no rows to evaluate on", "set data.eval")
        of_several, held_by = "is for Hub data sets and folders", self.data.eval_by is not None
        asks = self.pipeline is not None and "pool" in self.pipeline.traits.needs
        rules = [
            ("data.pool", asks and not self.data.pool, "is missing, and the pipeline labels its rows", "name rows"),
            ("eval_steps", self.eval_steps and not held, *rows),
            ("evaluate", not held and not all(e.own_rows for e in self.evaluate), *rows),
            ("start", self.start and self.pipeline is not None, "is not read beside a pipeline", "set model to it"),
            ("start", self.start and self.collaborate is not None, "is not read beside collaborate", "set model to it"),
            ("pace", self.pace != Pace() and self.pipeline is None, "is read by pipelines only", "set max_steps"),
            ("data.pool", self.data.pool and self.pipeline is None, "is read by pipelines only", "set pipeline"),
            ("data.pool", unread_pool, f"is not read by task {self.task.key()}", "remove it"),
            ("data.temperature", "temperature" in data and single, "mixes several sources", "list them in data.train"),
            ("data.train_split", "train_split" in data and not splits[0], of_several, "remove it"),
            ("data.eval_split", "eval_split" in data and not splits[1], of_several, "remove it"),
            ("data.eval_by", held_by and not share, "is read with a share in data.eval only", "write data.eval: 0.1"),
            ("revision", self.revision and self.model.count("/") != 1, "is for Hub models", "remove it"),
        ]
        for key, wrong, what, remedy in rules:
            if wrong:
                raise RecipeError(str(key), str(what), str(remedy))

    def _check_fields(self) -> None:
        """Raises RecipeError for fields of rows that cannot be kept, or that no key keeps."""
        fields = self.data.carried.fields
        if taken := set(fields) & set(RESERVED):
            key = "spans" if self.data.spans in taken else "keep"
            raise RecipeError(f"data.{key}", f"{min(taken)} has a meaning of its own", "rename it with data.columns")
        if len(set(fields)) != len(fields):
            raise RecipeError("data.keep", f"{list(fields)} names a field twice", "name each once, in keep or in spans")
        if unknown := set(self.data.fill) - set(fields):
            raise RecipeError("data.fill", f"{min(unknown)} is not kept", "name it in data.keep or data.spans")

    def _check_measures(self) -> None:
        """Raises RecipeError if two evaluators have measures with the same name."""
        owner: dict[str, str] = {}
        for i, evaluator in enumerate(self.evaluate):
            for name in evaluator.names():
                if name in owner:
                    raise RecipeError(
                        f"evaluate.{i}", f"{evaluator.key()} measures {name}, as {owner[name]} does", "keep one"
                    )
                owner[name] = evaluator.key()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, methods as {name: {fields}}: the contents of a run's `recipe.yaml`."""
        return {name: written(getattr(self, name)) for name in type(self).model_fields}
