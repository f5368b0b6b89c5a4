"""What the contract suite works with: examples of methods, and tiny loops, rows and batches for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedModel

from luthier.data.batch import IGNORE, Batch
from luthier.method import Method
from luthier.method import registry as manifest
from luthier.method.kinds import kind_of
from luthier.model.view import ModelView
from luthier.objectives.base import Objective
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, tiny, view_of
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.adapter import Adapter
from luthier.tuners.base import Trainable, Tuner
from luthier.tuners.lora import Lora

STEPS = 6
SETTINGS = TrainSettings(max_steps=STEPS, batch_size=4, learning_rate=1e-2)
CONSTANT = {"lr_scheduler_type": "constant", "warmup_fraction": 0.0}  # settings that a closure needs


@dataclass(frozen=True, eq=False)
class Example:
    """A small instance of a method, and what its tests need.

    rows    rendered rows, by default random ones with a supervised end; for a curator, an evaluator or a task: rows as in a file
    inputs  rows as a padded batch of transformers, for an objective that needs more than ids and labels
    pools   other rows, by the name that the method uses for them
    trains  False for a tuner that changes nothing of the model
    model   makes a tiny model and its tokenizer, if the usual ones do not fit an evaluator or a task
    learns  rows that make a model better at what an evaluator measures, if these are not the rows that it asks about
    tuner   what the clients of a protocol train
    """

    method: Method
    rows: Sequence[dict[str, Any]] | None = None
    inputs: Mapping[str, Tensor] | None = None
    pools: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    trains: bool = True
    model: Callable[[], tuple[PreTrainedModel, Any]] | None = None
    learns: Sequence[dict[str, Any]] | None = None
    tuner: Tuner | None = None

    @property
    def kind(self) -> str:
        """The recipe key."""
        return kind_of(self.method).key

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        return manifest.called(type(self.method))

    def fits(self, argument: str) -> bool:
        """True if tests with this argument run on this example."""
        if argument == "example":
            return True
        if argument == "plain_tuner":  # a tuner that works in any loop
            needs = self.method.traits.needs
            return self.kind == "tuner" and self.trains and not needs & {"grad", "closure"}
        return self.kind == argument


def as_examples(given: Sequence[Example | Method]) -> list[Example]:
    """The examples; a method alone becomes one."""
    return [e if isinstance(e, Example) else Example(e) for e in given]


def loop_of(
    tuner: Example, objective: Example, view: ModelView | None = None, folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False, **changes: Any,
) -> Loop:  # fmt: skip
    """A training loop over a tiny model."""
    view = view or view_of()
    closure = "closure" in tuner.method.traits.needs
    settings = SETTINGS.model_copy(update={**(CONSTANT if closure else {}), **changes})
    rows = objective.rows or rows_of((14, 12, 9, 11), answer=5)
    assert isinstance(tuner.method, Tuner) and isinstance(objective.method, Objective)
    trainable = tuner.method.attach(view, total_steps=settings.max_steps)
    lab = Lab(sets={n: list(r) for n, r in objective.pools.items()})
    return Loop(
        view, rows, trainable, objective.method, settings, lab=lab, folder=folder, stop=stop, data_hash="contract"
    )


NOTHING: tuple[Any, Any] = (None, None)  # window and probe, for tuners that ask for neither
PLAIN = Example(Sft())
SMALL = Example(Adapter(rank=2, init_std=0.05))
DROPPING = Example(Lora(rank=2, dropout=0.2))  # draws in every step


# These tests compare a GPU with the CPU, and so cannot run without one. Other tests train on the CPU.
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; other tests do the same on the CPU")


def losses(tuner: Example, objective: Example, device: str) -> list[float]:
    """Losses of a few steps in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # otherwise a process keeps its first device
    loop = loop_of(tuner, objective, ModelView.probed(tiny().eval().to(device)))
    return [float(loop.step()["loss"]) for _ in range(STEPS)]


def attached(tuner: Example, view: ModelView) -> Trainable:
    """The tuner on the model, after two steps if it trains anything."""
    if not tuner.trains:
        assert isinstance(tuner.method, Tuner)
        return tuner.method.attach(view)
    loop = loop_of(tuner, PLAIN, view)
    for _ in range(2):
        loop.step()
    return loop.trainable


@cache
def whole_run(tuner: Example, objective: Example) -> Loop:
    """A loop that has run without a break, once for all tests; only to be read."""
    loop = loop_of(tuner, objective)
    loop.run()
    return loop


def losses_of(loop: Loop) -> list[float | None]:
    """The loss of each step; None for a step that was skipped."""
    return [entry.get("loss") for entry in loop.progress.log]


def resumed_equals_whole(tuner: Example, objective: Example, folder: Path) -> None:
    """A run that is stopped after one and after two steps ends with the same bits as one without a break."""
    whole = whole_run(tuner, objective)
    for _ in range(2):
        asked: Iterator[int] = iter(range(100))
        with pytest.raises(Interrupted):
            loop_of(tuner, objective, folder=folder, stop=lambda asked=asked: next(asked) >= 1).run()  # type: ignore[misc]
    again = loop_of(tuner, objective, folder=folder)
    again.run()
    assert losses_of(again) == losses_of(whole)
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def view_in(dtype: torch.dtype) -> ModelView:
    """The tiny model in this precision."""
    view = view_of()
    torch.nn.Module.to(view.module, dtype)
    return view


@cache
def base_in(dtype: torch.dtype) -> ModelView:
    """The same, once for all tests; only to be read."""
    return view_in(dtype)


@torch.no_grad()  # with a gradient, attention takes another path, which rounds differently
def states(view: ModelView, batch: Batch) -> Tensor:
    """[T, D] the last hidden states."""
    return view.trace(batch).hidden[-1]


def snapshot(view: ModelView) -> dict[str, Any]:
    """Everything that a method could change on a model, for exact comparison: weights, gradients, modes, hooks."""
    out: dict[str, Any] = {
        "inputs": list(view.input_hooks), "phases": list(view.phases), "attached": list(view.attached),
        "attention": view.module.config._attn_implementation, "layout": view.layout,
    }  # fmt: skip
    for name, t in (*view.module.named_parameters(), *view.module.named_buffers()):
        held = t.detach().cpu().contiguous().view(torch.uint8) if t.ndim else t.item()
        content = held if isinstance(held, (int, float)) else hashlib.sha256(held.numpy().tobytes()).hexdigest()
        out[name] = (content, t.dtype, t.requires_grad, t.grad is None, len(t._backward_hooks or ()))
    for name, part in view.module.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        out[f"module {name}"] = (part.training, vars(part).get("forward"), type(part), [len(h) for h in hooks])
    return out


PADDED = {
    "input_ids": torch.arange(5, 41).view(4, 9),
    "attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0], [1] * 9]),
}
PADDED["labels"] = torch.where(
    (torch.arange(9) >= 4) & (PADDED["attention_mask"] == 1), PADDED["input_ids"], torch.tensor(IGNORE)
)


def padded_rows() -> list[dict[str, Any]]:
    """The rows of PADDED as luthier renders them."""
    out = []
    for k, mask in enumerate(PADDED["attention_mask"].bool()):
        ids, labels = PADDED["input_ids"][k][mask].tolist(), PADDED["labels"][k][mask].tolist()
        out.append({"ids": ids, "labels": labels, "key": str(k), "token": {"prompt": [1] * 4 + [0] * (len(ids) - 4)}})
    return out


class Four(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows for transformers' Trainer."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in PADDED.items()}
