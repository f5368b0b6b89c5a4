"""What every published technique shares: fields that are recipe keys, a source, and declared traits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict


class Source(NamedTuple):
    """Where a method comes from."""

    title: str
    year: int
    reference: str  # arXiv id, DOI or URL
    equation: str = ""  # the part of the source that the code follows


class Traits(NamedTuple):
    """What a method declares about itself; `check`, the docs and the contract suite read it.

    claims   what it must own alone: "weight" (it moves base weights), "inputs_embeds", "kv_prefix", "token_mask",
             "vocab", "loop"
    needs    what it uses: "hidden", "grad", "jvp", "closure", "generation", "base_view", "frozen_mlp", "pool",
             "plain_weights" (no quantised base)
    linear   its Update adds and scales in weight space
    """

    tasks: frozenset[str] = frozenset({"causal-lm", "classification"})
    layouts: frozenset[str] = frozenset({"flat", "padded"})
    claims: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    linear: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of a run before any weight is loaded."""

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

    @classmethod
    def key(cls) -> str:
        """The name in a recipe: that of the module, with hyphens."""
        return cls.__module__.rpartition(".")[2].strip("_").replace("_", "-")

    def check(self, facts: Facts) -> list[Problem]:
        """Problems that can be seen without weights."""
        problems = []
        if facts.task not in self.traits.tasks:
            known = ", ".join(sorted(self.traits.tasks))
            problems.append(Problem("task", f"{self.key()} does not work on {facts.task}", f"it works on {known}"))
        if facts.layout is not None and facts.layout not in self.traits.layouts:
            problems.append(Problem("layout", f"{self.key()} cannot use the {facts.layout} layout"))
        if facts.quantized and "plain_weights" in self.traits.needs:
            what = f"{self.key()} reads or writes the weights themselves, which quantize packs"
            problems.append(Problem("quantize", what, "remove quantize, or choose lora, peft, adapter or dept"))
        if facts.num_processes > 1 and "one_process" in self.traits.needs:
            problems.append(
                Problem("num_processes", f"{self.key()} runs in one process, here are {facts.num_processes}")
            )
        return problems
