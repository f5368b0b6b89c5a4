"""The keys of a recipe that hold plain values: rows, model, optimisation. Loads no torch, so that a typo is found at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from luthier.method.building import FORM
from luthier.step.settings import TrainSettings

if TYPE_CHECKING:
    from luthier.data.columns import Carried


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
    """A file (.jsonl, .json, .csv, .tsv, .conll, .parquet, .arrow; text files may be packed as .gz or .zst), a folder, a glob, a
    Hub id (org/name:configuration), or builtin:requests; or a list of sources: [{path: a.jsonl, weight: 2}, {path: b.jsonl}].
    Paths are relative to the recipe's folder."""
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
        from luthier.data.columns import Carried  # brings numpy and pyarrow

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


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Trackers = Annotated[tuple[str, ...], BeforeValidator(_several, json_schema_input_type=str | tuple[str, ...])]


class RunSettings(TrainSettings):
    """The keys of a recipe that hold no method."""

    luthier: Literal[1] = 1
    """Version of the recipe's keys."""
    model: str
    """A folder, a .gguf file, a Hub id (org/name, org/name@revision), or builtin:smollm2-135m."""
    revision: str | None = None
    """Revision of a Hub model: a branch, a tag or a commit."""
    trust_remote_code: bool = False
    """Run the model's own Python code; also needs --allow-code on the command line."""
    start: str | None = None
    """An adapter of the model to go on from: a folder of peft's or of a finished run, or a Hub id (org/name, perhaps @revision).
    The result holds both."""
    data: DataSettings
    """Training rows, held-out rows, and how they are read."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of frozen weights; "auto": as in the file."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen linear layers in 4 bits (bitsandbytes), for tuners that do not change the weights."""
    output_dir: str | None = None
    """Folder of the run; null: runs/<recipe>-<time>."""
    report_to: Trackers = ()
    """Trackers, under Trainer's names: one, several, or none."""


def set_in(model: BaseModel) -> set[str]:
    """Names of the fields that differ from their defaults."""
    fields = type(model).model_fields.items()
    return {n for n, f in fields if getattr(model, n) != f.get_default(call_default_factory=True)}
