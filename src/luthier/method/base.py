"""The base class of methods: fields that are recipe keys, a source, and declared traits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict


class Source(NamedTuple):
    """Where a method comes from."""

    title: str
    year: int
    reference: str  # arXiv id, DOI or URL
    equation: str = ""  # the part of the source that the code follows


class Layout(StrEnum):
    """How a batch reaches the model."""

    FLAT = "flat"
    PADDED = "padded"


class Claim(StrEnum):
    """What only one method in a recipe can have. A recipe with two methods that claim the same is refused."""

    WEIGHT = "weight"
    """It changes base weights."""
    INPUTS_EMBEDS = "inputs_embeds"
    """It changes embeddings before the first block."""
    KV_PREFIX = "kv_prefix"
    """It puts keys and values before those of the text."""
    TOKEN_MASK = "token_mask"
    """It decides which tokens count in the loss."""
    VOCAB = "vocab"
    """It changes the vocabulary."""
    LOOP = "loop"
    """It decides how a step is taken."""


class Need(StrEnum):
    """What a method uses; each is checked, in the recipe or where the method is built into a loop."""

    BASE_VIEW = "base_view"
    """The base model, beside the model that is trained."""
    CLOSURE = "closure"
    """An optimiser step that evaluates losses: a constant learning rate, no clipping."""
    GRAD = "grad"
    """Gradients of a window before its step."""
    JVP = "jvp"
    """Forward-mode derivatives, which packed weights do not have."""
    ONE_PROCESS = "one_process"
    """It does not run over several processes."""
    PLAIN_WEIGHTS = "plain_weights"
    """Weights that can be read and written, so the base may not be quantised."""
    POOL = "pool"
    """Rows without labels."""
    TOTAL_STEPS = "total_steps"
    """The number of all steps, before the first."""


class Traits(NamedTuple):
    """What a method declares about itself; `check`, the docs and the contract suite read it.

    claims   what no other method may have, by the names of Claim; needs: what it uses, by the names of Need
    linear   its updates can be added and scaled in weight space
    """

    tasks: frozenset[str] = frozenset({"causal-lm", "classification", "masked-lm", "token-classification"})
    layouts: frozenset[str] = frozenset(Layout)
    claims: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    linear: bool = False

    def mistakes(self) -> list[str]:
        """A sentence for each unknown name."""
        known = {"layouts": Layout, "claims": Claim, "needs": Need}
        return [
            f"traits.{field} holds {name!r}; there are {', '.join(names)}"
            for field, names in known.items()
            for name in sorted(getattr(self, field) - frozenset(names))
        ]


@dataclass(frozen=True)
class Facts:
    """What is known about a run before any weight is loaded."""

    task: str = "causal-lm"
    layout: str | None = None
    total_steps: int | None = None
    batch_size: int = 1
    num_rows: int | None = None
    model_config: Any = None
    settings: Any = None  # TrainSettings
    num_processes: int = 1
    others: tuple[Method, ...] = ()
    quantized: bool = False
    anatomy: Any = None  # model.anatomy.Anatomy, once there is one
    redraws: bool = False  # rows differ in every epoch (masks)
    kept: frozenset[str] | None = None  # fields of rows that reach the objective


class Problem(NamedTuple):
    """A reason why a recipe cannot run: the field, the fault with its value, the remedy."""

    key: str
    what: str
    remedy: str = ""


class Method(BaseModel):
    """A published technique. Its fields are its recipe keys; its docstring is its page."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    traits: ClassVar[Traits] = Traits()
    source: ClassVar[Source | None] = None
    packages: ClassVar[Mapping[str, str]] = {}  # module that it imports -> the extra of luthier that installs it
    paths: ClassVar[tuple[str, ...]] = ()  # fields that name files or folders
    recipe_lines: ClassVar[
        tuple[str, ...]
    ] = ()  # of a recipe to start from, below its model; () if naming the method is enough

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError for unknown traits, because a typo would declare nothing."""
        for mistake in cls.traits.mistakes():
            raise TypeError(f"{cls.__module__}.{cls.__qualname__}: {mistake}")

    @classmethod
    def key(cls) -> str:
        """The name in a recipe: that of the module, with hyphens."""
        return cls.__module__.rpartition(".")[2].strip("_").replace("_", "-")

    def beside(self, folder: Path | None) -> Self:
        """The method with the files that it names taken from this folder, if they are there."""
        named = {n: getattr(self, n) for n in self.paths}
        there = {n: folder / v for n, v in named.items() if folder is not None and v and (folder / v).exists()}
        return self.model_copy(update={n: str(path.resolve()) for n, path in there.items()}) if there else self

    @property
    def trains_beside(self) -> bool:
        """Whether it brings modules of its own that train beside the model."""
        return False

    def check(self, facts: Facts) -> list[Problem]:
        """Problems that can be seen without weights."""
        problems = []
        for module, extra in self.packages.items():
            if find_spec(module) is None:
                what = f"{self.key()} needs the package {module}, which is not installed"
                problems.append(Problem("", what, f"pip install 'luthier[{extra}]'"))
        if facts.task not in self.traits.tasks:
            known = ", ".join(sorted(self.traits.tasks))
            problems.append(Problem("task", f"{self.key()} does not work on {facts.task}", f"it works on {known}"))
        if facts.layout is not None and facts.layout not in self.traits.layouts:
            problems.append(Problem("layout", f"{self.key()} cannot use the {facts.layout} layout"))
        if facts.quantized and Need.PLAIN_WEIGHTS in self.traits.needs:
            what = f"{self.key()} reads or writes the weights themselves, and this model's are packed in 4 or 8 bits"
            remedy = "take plain weights (without quantize), or choose lora, peft, adapter or dept"
            problems.append(Problem("quantize", what, remedy))
        if facts.quantized and Need.JVP in self.traits.needs:
            what = f"{self.key()} takes forward-mode derivatives, which packed weights do not have"
            problems.append(Problem("quantize", what, "remove quantize"))
        if facts.num_processes > 1 and Need.ONE_PROCESS in self.traits.needs:
            what = f"{self.key()} runs in one process, but there are {facts.num_processes}"
            problems.append(Problem("num_processes", what, "start it without torchrun"))
        return problems
