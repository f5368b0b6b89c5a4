"""The road not taken: the same seams on a subclass of transformers' Trainer. Kept so that the decision can be measured.

`python benchmarks/loop_decision.py` compares it with luthier.training.loop; docs/architecture.md has the numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier.objectives.base import Clock, Window
from luthier.training.loop import Loop, Wrapped
from luthier.tuners.base import Stats


class Windows(IterableDataset):
    """One item an optimiser step: Trainer's own batching knows neither flat batches nor windows."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __iter__(self) -> Iterator[Window]:
        for step in range(self.loop.total_steps):
            yield self.loop.window(step)


class Hooks(TrainerCallback):
    """After the optimiser's step: write trained values back."""

    def __init__(self, trainer: SeamTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loop = self.trainer.loop
        loop.trainable.after_step(Clock(state.global_step + 1, loop.total_steps))


class SeamTrainer(Trainer):
    """Every override that the seams need. The borrowed `Loop` gives data order, probe and denominators, no stepping."""

    def __init__(self, loop: Loop, folder: str, **arguments: Any) -> None:
        self.loop = loop
        args = TrainingArguments(
            output_dir=folder, max_steps=loop.total_steps, use_cpu=True, report_to="none", logging_strategy="no",
            save_strategy=arguments.pop("save_strategy", "no"), disable_tqdm=True, gradient_accumulation_steps=1,
            max_grad_norm=loop.settings.max_grad_norm, remove_unused_columns=False, logging_nan_inf_filter=False, **arguments,
        )  # fmt: skip
        wrapped = Wrapped(loop.view, loop.objective, loop.extra)
        wrapped.config = loop.view.module.config
        super().__init__(
            model=wrapped, args=args, train_dataset=Windows(loop), optimizers=(loop.optimizer, loop.scheduler)
        )
        self.add_callback(Hooks(self))
        self.losses: list[float] = []

    def get_train_dataloader(self) -> Any:
        # Not prepared by accelerate: it would slice windows over ranks.
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        total = self.loop.total_steps
        return 1, total, total, total, 1, total, total

    def num_examples(self, dataloader: Any) -> int:
        return self.loop.total_steps

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        return None

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> None:
        return None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def training_step(self, model: nn.Module, inputs: Window, num_items_in_batch: Any = None) -> Tensor:
        loop = self.loop
        loop.progress.step = self.state.global_step
        loop.trainable.before_window(inputs, loop.probe)
        with torch.no_grad():
            window, local = loop.objective.plan(inputs, loop.probe)
        denominators = loop._reduce(local)
        if loop.trainable.steps_by_closure:
            model.eval()

            def closure() -> float:
                with torch.no_grad():
                    return loop._losses(window, denominators, backward=False)[0]

            # Trainer calls optimizer.step() without arguments: a closure must be smuggled in.
            raw = getattr(self.optimizer, "optimizer", self.optimizer)
            raw.pending_closure = closure
            self.losses.append(float("nan"))
            return torch.zeros(())
        model.train()
        loop.wrapped = model
        value, _ = loop._losses(window, denominators, backward=True)
        loop.trainable.after_backward()
        self.losses.append(value)
        return torch.tensor(value)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        # Trainer clips model.parameters(); float32 masters are not among them, nor may a closure's weights be.
        if self.loop.trainable.steps_by_closure:
            return None
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(params, self.args.max_grad_norm)
        if not self.loop.trainable.before_step(Stats(self.losses[-1], float(norm))):
            for p in params:  # the only way to skip a step here
                p.grad = None
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from pathlib import Path

        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.loop.trainable.state_dict().items()}
        save_file(tensors, folder / "trainable.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from pathlib import Path

        from safetensors.torch import load_file

        self.loop.trainable.load_state_dict(load_file(Path(resume_from_checkpoint) / "trainable.safetensors"))


def train(loop: Loop, folder: str | None = None, **arguments: Any) -> SeamTrainer:
    """Run a loop's stage on Trainer instead."""
    if loop.trainable.steps_by_closure:
        plain = loop.optimizer.step
        loop.optimizer.step = lambda closure=None: plain(closure or loop.optimizer.pending_closure)  # type: ignore[attr-defined, method-assign]
    with tempfile.TemporaryDirectory() as temporary:
        trainer = SeamTrainer(loop, folder or temporary, **arguments)
        trainer.train()
    return trainer


__all__ = ["SeamTrainer", "train"]
