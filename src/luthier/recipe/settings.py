"""The recipe as a typed object: its keys, and which of them cannot be combined."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, SerializeAsAny, Tag

from luthier.collaboration.base import Collaboration
from luthier.compute.base import Compute
from luthier.curation.base import Curator, chain_of
from luthier.data.codec import Chain
from luthier.data.columns import RESERVED, Carried
from luthier.data.reading import has_splits
from luthier.decoding.base import Decoder
from luthier.decoding.greedy import Greedy
from luthier.evaluation.base import Evaluator
from luthier.method import Facts, Method
from luthier.method.building import FORM
from luthier.method.kinds import LISTED
from luthier.method.registry import find, written
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Pace, Pipeline
from luthier.step.settings import TrainSettings
from luthier.support.errors import RecipeError
from luthier.tasks.base import Task
from luthier.tasks.causal_lm import CausalLm
from luthier.tuners.base import Tuner
from luthier.tuners.lora import Lora


class RowSource(BaseModel):
    """One of several sources of training rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str
    """A file, a Hub id or a built-in set, as in data.train."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often its rows are drawn, compared with a source of weight 1."""
    columns: dict[str, str] | None = None
    """luthier's name -> the file's name; null: data.columns."""
    split: str | None = None
    """Split of a Hub data set, or of a folder with several; null: data.train_split."""
    limit: int | None = Field(None, ge=1)
    """Use only its first rows; null: data.limit."""


def _form(value: Any) -> str:
    return f"{FORM}several" if isinstance(value, (list, tuple)) else f"{FORM}one"


# The form of a value decides how it is checked, so that an error is about this form only.
Sources = Annotated[
    Annotated[str, Tag(f"{FORM}one")] | Annotated[tuple[RowSource, ...], Field(min_length=1), Tag(f"{FORM}several")],
    Discriminator(_form),
]  # fmt: skip


def _held_form(value: Any) -> str:
    return f"{FORM}share" if isinstance(value, (int, float)) else f"{FORM}source"


Held = Annotated[
    Annotated[str | None, Tag(f"{FORM}source")]
    | Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), Tag(f"{FORM}share")],
    Discriminator(_held_form),
]  # fmt: skip


class DataSettings(BaseModel):
    """Which rows are used, and how they become tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: Sources
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; text files may be packed as .gz or .zst), a folder, a glob, a Hub id
    (org/name:configuration), or builtin:requests; or a list of sources: [{path: a.jsonl, weight: 2}, {path: b.jsonl}]. Paths are
    relative to the recipe's folder."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How several sources are mixed: the share of a source is proportional to (weight * rows)^(1 / temperature)."""
    keep: tuple[str, ...] = ()
    """Fields of the training rows that reach the objective: numbers (weight), lists of numbers (soft), texts by the row's key."""
    spans: str | None = None
    """A field of the training rows with [[start, end, label], ...] in characters of the answer, which becomes spans of tokens."""
    fill: dict[str, Any] = Field(default_factory=dict)
    """Kept field -> its value in rows that lack it; without one such a row is refused."""
    eval: Held = None
    """Held-out rows, of the same kind: a file or another source; or a share of the training rows that is set apart: 0.1."""
    eval_by: str | None = Field(None, examples=["document"])
    """With a share in `eval`: a field of the rows; rows with equal values of it stay together, in training or held out."""
    pool: str | None = None
    """Rows without labels, for pipelines that make their own."""
    columns: dict[str, str] = Field(default_factory=dict)
    """luthier's name -> the file's name, or a path within a field: {prompt: question, completion: answers.text.0}. The names of
    turns too: {messages: dialogue, messages.role: speaker, messages.content: line}."""
    system: str | None = None
    """A system message for rows that have none, in training and in use."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """"auto": the model's chat template if it has one; "plain": plain text."""
    template_options: dict[str, Any] = Field(default_factory=dict, examples=[{"enable_thinking": False}])
    """Variables of the chat template; a model that is served elsewhere needs the same ones."""
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens; null: the model's limit."""
    on_long: Literal["refuse", "drop", "trim_prompt", "trim_end"] = "refuse"
    """What to do about longer rows."""
    on_unsupervised: Literal["refuse", "drop"] = "refuse"
    """What to do about rows without any supervised token."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What to do about rows that cannot be read: stop at the first, or leave them out, counted and listed."""
    train_split: str = "train"
    """Split that is trained on, of a Hub data set or of a folder with several."""
    eval_split: str = "test"
    """Split that is held out, of a Hub data set or of a folder with several."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows (of each source), to try something."""

    @property
    def carried(self) -> Carried:
        """The fields of training rows that are kept."""
        return Carried(self.keep, self.spans, self.fill)

    @property
    def sources(self) -> tuple[RowSource, ...]:
        """The sources of training rows, with the settings of `data` filled in."""
        listed = (RowSource(path=self.train),) if isinstance(self.train, str) else self.train
        return tuple(
            s.model_copy(
                update={
                    "columns": self.columns if s.columns is None else s.columns,
                    "split": s.split or self.train_split, "limit": s.limit or self.limit,
                }
            )
            for s in listed
        )  # fmt: skip


class Recipe(TrainSettings):
    """The settings of a run."""

    luthier: Literal[1] = 1
    """Version of the recipe's keys."""
    model: str
    """A folder, a .gguf file, a Hub id (org/name, org/name@revision), or builtin:smollm2-135m."""
    revision: str | None = None
    """Revision of a Hub model: a branch, a tag or a commit."""
    trust_remote_code: bool = False
    """Run the model's own Python code; also needs --allow-code on the command line."""
    task: SerializeAsAny[Task] = CausalLm()
    """What a row is."""
    data: DataSettings
    """Training rows, held-out rows, and how they are read."""
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
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of frozen weights; "auto": as in the file."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen linear layers in 4 bits (bitsandbytes), for tuners that do not change the weights."""
    output_dir: str | None = None
    """Folder of the run; null: runs/<recipe>-<time>."""
    report_to: tuple[str, ...] = ()
    """Trackers, under Trainer's names."""

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
        quantized = self.quantize is not None
        return Facts(
            task=self.task.key(), batch_size=self.batch_size, settings=self, others=others, quantized=quantized,
            redraws=self.task.redraws, **more,
        )  # fmt: skip

    def check_methods(self, facts: Facts | None = None) -> None:
        """Raises RecipeError for the first combination that cannot work."""
        facts = facts or self.facts()
        owners: dict[str, str] = {}
        for key, method in {"task": self.task, **self.methods(), **self.listed()}.items():
            for problem in method.check(facts):
                raise RecipeError(f"{key}.{method.key()}.{problem.key}", problem.what, problem.remedy)
            for claim in method.traits.claims:
                if claim in owners:
                    raise RecipeError(
                        key,
                        f"{method.key()} and {owners[claim]} both need {claim}, which only one method can have",
                        "choose one",
                    )
                owners[claim] = method.key()

    def check_unread(self) -> None:
        """Raises RecipeError for a key that was set but that this run would not read."""
        data = set_in(self.data)
        self._check_measures()
        if self.pipeline is not None:
            stages = {"tuner", "objective", "compute", *TrainSettings.model_fields} - {"seed", "tokens_per_forward"}
            for key in sorted(set_in(self) & stages):
                raise RecipeError(key, f"is not read beside pipeline {self.pipeline.key()}", "set it in the stages")
        self._check_fields()
        held_in = self.data.eval if isinstance(self.data.eval, str) else ""
        splits = [any(has_splits(s.path) for s in self.data.sources), bool(held_in) and has_splits(held_in)]
        single, held, share = (
            isinstance(self.data.train, str),
            self.data.eval is not None,
            isinstance(self.data.eval, float),
        )
        unread_pool = self.data.pool and not self.task.pool_shapes
        during = ("needs evaluations during training", "set eval_steps")
        rows = ("has no rows to evaluate on", "set data.eval")
        asks = self.pipeline is not None and "pool" in self.pipeline.traits.needs
        rules = [
            ("data.pool", asks and not self.data.pool, "is missing, and the pipeline labels its rows", "name rows"),
            ("epochs", {"epochs", "max_steps"} <= set_in(self), "is not read beside max_steps", "set one of the two"),
            ("eval_steps", self.eval_steps and not held, *rows),
            ("early_stopping_patience", self.early_stopping_patience and not self.eval_steps, *during),
            ("load_best", not self.load_best and not self.eval_steps, *during),
            ("evaluate", not held and not all(e.own_rows for e in self.evaluate), *rows),
            ("pace", self.pace != Pace() and self.pipeline is None, "is read by pipelines only", "set max_steps"),
            ("data.pool", self.data.pool and self.pipeline is None, "is read by pipelines only", "set pipeline"),
            ("data.pool", unread_pool, f"is not read by task {self.task.key()}", "remove it"),
            ("data.temperature", "temperature" in data and single, "mixes several sources", "list them in data.train"),
            (
                "data.train_split",
                "train_split" in data and not splits[0],
                "is for Hub data sets and folders",
                "remove it",
            ),
            (
                "data.eval_split",
                "eval_split" in data and not splits[1],
                "is for Hub data sets and folders",
                "remove it",
            ),
            (
                "data.eval_by",
                self.data.eval_by and not share,
                "is read with a share in data.eval only",
                "write eval: 0.1",
            ),
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


def set_in(model: BaseModel) -> set[str]:
    """Names of the fields that differ from their defaults."""
    fields = type(model).model_fields.items()
    return {n for n, f in fields if getattr(model, n) != f.get_default(call_default_factory=True)}
