"""The training loop: one optimiser step for each window of micro-batches."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

from luthier.compute.base import Compute
from luthier.data.batch import IGNORE, Batch, collate
from luthier.data.store import TokenRows
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward, Objective, Window, count, mean_of
from luthier.step.lab import Lab
from luthier.step.order import Order, micro_batches
from luthier.step.outcome import RenderedRows
from luthier.step.probe import Probe
from luthier.step.progress import Progress
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.rng import Generators, Streams
from luthier.tasks.base import Draw
from luthier.training import checkpoint
from luthier.tuners.base import ParamGroup, Stats, Trainable, default_optimizer

STAGES = ("select", "plan", "train")  # stages of a step, in the ledger
NAN_STEPS = 10  # a run that skips steps without a finite loss stops after this many such steps in a row


class Wrapped(nn.Module):
    """The module that processes wrap. Its forward is the whole objective, so all gradients are reduced, whatever it calls."""

    def __init__(self, view: ModelView, objective: Objective, extra: nn.Module | None) -> None:
        super().__init__()
        self.module, self.extra = view.module, extra
        self._view, self._objective = view, objective

    def forward(self, batch: Batch, denominators: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self._objective.loss(Forward(batch, self._view, self.extra))
        total, parts = torch.zeros((), device=batch.ids.device), {}
        for name, term in terms.items():
            mean = mean_of(term, denominators)
            parts[name] = mean.detach()
            total = total + term.weight * mean
        return total, parts


class Interrupted(Exception):
    """The run was asked to stop. Its state is saved."""


class Loop:
    """Trains one stage.

    compute   a method that changes the forward pass, in all phases of this model from now on
    rows      rendered rows: mappings as `collate` takes them
    evaluate  returns the loss on held-out rows; called every eval_steps
    on_step   called after each step and each evaluation with (entry, progress, total steps)
    stop      asked between steps; True saves and raises Interrupted
    draw      from the task: makes an epoch's version of a row; None if rows are the same in all epochs
    """

    def __init__(
        self, view: ModelView, rows: RenderedRows, trainable: Trainable, objective: Objective, settings: TrainSettings, *,
        lab: Lab | None = None, folder: Path | None = None, evaluate: Callable[[], float] | None = None,
        on_step: Callable[[dict[str, float], Progress, int], None] | None = None, stop: Callable[[], bool] = lambda: False,
        carried: Mapping[str, Tensor] | None = None, compute: Compute | None = None, accelerator: Accelerator | None = None,
        data_hash: str = "", draw: Draw | None = None,
    ) -> None:  # fmt: skip
        if not rows:
            raise LuthierError("data.train: no row is left to train on; `luthier check` shows what was dropped")
        # A copy, so that state which an earlier run left in the same object is not used here.
        self.view, self.rows, self.trainable, self.objective, self.settings = (
            view, rows, trainable, objective.fresh(), settings
        )  # fmt: skip
        self.lab, self.folder, self.evaluate = lab or Lab(seed=settings.seed), folder, evaluate
        self.on_step, self.stop = on_step, stop
        self.accelerator = accelerator or Accelerator(cpu=view.device.type == "cpu")
        self.generators = Generators(Streams(settings.seed), "train", self.accelerator.process_index)
        with self.generators.drawing():
            self.extra = self.objective.extend(view, carried)
        self.data_hash, self.draw = data_hash, draw
        if compute is not None:
            view.phases.append(partial(compute.patch, view))
        self._supervised = False  # whether any row so far had a supervised token
        s = settings
        mixture = rows.mixture if isinstance(rows, TokenRows) else None
        self.order = Order(len(rows), s.batch_size, s.epochs, s.max_steps, s.seed, s.shuffle, mixture)
        attached = trainable.attach_seconds
        self.progress = Progress(
            seconds=attached, select_seconds=attached,
            flops={"select": trainable.attach_flops} if trainable.attach_flops else {},
        )  # fmt: skip
        self.probe = Probe(view, self.objective, self.extra, self._total)
        groups = trainable.groups()
        if self.extra is not None and (beside := [p for p in self.extra.parameters() if p.requires_grad]):
            groups = [*groups, ParamGroup(beside)]
        if not any(g.params for g in groups):
            raise LuthierError(
                f"nothing trains: {self.objective.key()} adds no trained modules to the frozen model; choose a tuner"
            )
        self.optimizer = trainable.optimizer(groups, self._default_optimizer)
        # Imported where training begins: it brings peft and bitsandbytes along, two seconds that other commands need not wait.
        from transformers import get_scheduler

        self.scheduler = get_scheduler(
            s.lr_scheduler_type, self.optimizer, round(s.warmup_fraction * self.order.total), self.order.total
        )
        if s.gradient_checkpointing is True:
            view.checkpoint_blocks()
        if s.torch_compile:
            for i in range(len(view.anatomy.blocks)):
                view.block(i).compile(dynamic=True)
        wrapped = Wrapped(view, self.objective, self.extra)
        if not s.torch_compile:  # a hook would split every compiled block
            view.meter.watch(wrapped)
        if self.accelerator.num_processes > 1:
            # If other weights train in each window, a backward pass does not reach all of them.
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=trainable.reselects)
            self.wrapped = self.accelerator.prepare_model(wrapped)
        else:
            self.wrapped = wrapped

    @staticmethod
    def length(rows: Sized, settings: TrainSettings) -> int:
        """The number of optimiser steps of a run over these rows."""
        s = settings
        return Order(len(rows), s.batch_size, s.epochs, s.max_steps, s.seed, s.shuffle).total

    @property
    def total_steps(self) -> int:
        return self.order.total

    def _default_optimizer(self, groups: list[Any]) -> torch.optim.Optimizer:
        s = self.settings
        return default_optimizer(
            groups, s.learning_rate, betas=s.adam_betas, eps=s.adam_eps, weight_decay=s.weight_decay
        )

    # --- one step ---

    def _chosen(self, step: int) -> list[Mapping[str, Any]]:
        """The rows of a step, in this epoch's version."""
        rows = [self.rows[i] for i in self.order.rows(step)]
        return rows if self.draw is None else [self.draw(r, step // self.order.steps_per_epoch) for r in rows]

    def window(self, step: int) -> Window:
        """The micro-batches of this rank."""
        chosen = self._chosen(step)
        lengths = [len(row["ids"]) for row in chosen]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = micro_batches(lengths, self.settings.tokens_per_forward, world)[rank]
        micro = [collate([chosen[i] for i in part]) for part in parts]
        clock = Clock(step, self.total_steps, self.order.epoch(step))
        gather = self.accelerator.gather if world > 1 else (lambda x: x)
        return Window(
            [b.to(self.view.device) for b in micro], clock, self.lab, gather=gather, total=self._total, rank=rank
        )

    def _live(self, window: Window) -> tuple[list[Batch], float]:
        """The micro-batches that have tokens, with weight 1. A rank without any runs one row with weight 0, because every rank
        must take part in the last backward pass."""
        live = [b for b in window.micro if b.num_tokens]
        if live:
            return live, 1.0
        idle = collate([self._chosen(window.clock.step)[0]]).to(self.view.device)
        # The other ranks do not plan together with this one, and their state does not change.
        objective = self.objective.fresh()
        window = replace(window, micro=[idle], gather=lambda x: x, total=lambda x: x, rank=0)
        return objective.plan(window, Probe(self.view, objective, self.extra))[0].micro, 0.0

    def _total(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        return value if self.accelerator.num_processes == 1 else self.accelerator.reduce(value, "sum")

    def _reduce(self, local: Mapping[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return dict(local)
        keys = sorted(local)
        total = self.accelerator.reduce(torch.tensor([local[k] for k in keys], device=self.view.device).double())
        return dict(zip(keys, total.tolist(), strict=True))

    def step(self) -> dict[str, float]:
        """Take one optimiser step. Returns the values to log. All random numbers come from this run's seed."""
        with self.generators.drawing():
            return self._step()

    def _step(self) -> dict[str, float]:
        started, number = time.perf_counter(), self.progress.step
        window = self.window(number)
        given = sum(b.num_tokens for b in window.micro)
        meter, spent = self.view.meter, dict(self.view.meter.flops)
        with meter.stage("select"):
            self.trainable.before_window(window, self.probe)
        chosen = time.perf_counter() - started
        with torch.no_grad(), meter.stage("plan"):
            window, local = self.objective.plan(window, self.probe)
        denominators, p = self._reduce(local), self.progress
        learns = any(denominators.values())
        with meter.stage("train"):
            entry, moved = self._moved_by(window, denominators) if learns else self._passed_over(number)
        self._next_rate(moved)
        p.step += 1
        p.skipped += not moved
        stepped = time.perf_counter()
        if moved:
            with meter.stage("select"):
                self.trainable.after_step(Clock(p.step, self.total_steps, self.order.epoch(p.step)))
        p.select_seconds += chosen + time.perf_counter() - stepped
        for stage, flops in self._reduce({k: meter.flops.get(k, 0.0) - spent.get(k, 0.0) for k in STAGES}).items():
            p.flops[stage] = p.flops.get(stage, 0.0) + flops
        counts = self._reduce(
            {
                "given": given, "tokens": learns * sum(b.num_tokens for b in window.micro),
                "supervised": learns * sum(int((b.labels != IGNORE).sum()) for b in window.micro),
            }
        )  # fmt: skip
        p.tokens += int(counts["tokens"])
        p.row_tokens += int(counts["given"])
        p.supervised += int(counts["supervised"])
        seconds = time.perf_counter() - started
        p.seconds += seconds
        rate = counts["tokens"] / seconds
        clock = {"step": p.step, "epoch": self.order.epoch(p.step)}
        counts = {"num_tokens": p.tokens, "tokens_per_second": rate, "flops": sum(p.flops.values())}
        if p.skipped:
            counts["skipped"] = p.skipped
        return {**clock, **entry, **self.objective.report(), **counts}

    def _moved_by(self, window: Window, denominators: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        """The values to log for a step, and whether a weight changed."""
        if self.trainable.steps_by_closure:
            return self._closure_step(window, denominators), True
        return self._gradient_step(window, denominators)

    def _passed_over(self, number: int) -> tuple[dict[str, float], bool]:
        """Take a step whose window has no supervised token on any rank: no forward, no momentum, no decay; the schedule advances.

        Raises LuthierError if no row has a supervised token.
        """
        if not self._supervised:
            self._supervised = any(count([collate([row])])["sequences"] for row in self.rows)
        if not self._supervised:
            raise LuthierError(f"step {number + 1}: no row has a supervised token; `luthier check` shows the rows")
        return {"learning_rate": self.scheduler.get_last_lr()[0]}, False

    def _next_rate(self, moved: bool) -> None:
        # If the first step is skipped, torch reports a wrong order of calls.
        skipped = warnings.catch_warnings(action="ignore", category=UserWarning)
        with contextlib.nullcontext() if moved else skipped:
            self.scheduler.step()

    def _losses(
        self, window: Window, denominators: Mapping[str, float], backward: bool
    ) -> tuple[float, dict[str, float]]:
        """The step's loss and its named parts, over all micro-batches and ranks."""
        world, total = self.accelerator.num_processes, 0.0
        parts: dict[str, float] = {}
        micro, weight = self._live(window)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            sync = contextlib.nullcontext() if world == 1 or last else self.accelerator.no_sync(self.wrapped)
            with sync, self.view.phase("train"):
                loss, named = self.wrapped(batch, denominators)
                if backward and loss.requires_grad:
                    # The denominators are global, and the wrapper averages over ranks. This factor undoes the average.
                    self.accelerator.backward(loss * (world * weight))
            total += weight * float(loss.detach())
            for k, v in named.items():
                parts[k] = parts.get(k, 0.0) + weight * float(v)
        summed = self._reduce({"total": total, **{f"part.{k}": v for k, v in parts.items()}})
        return summed["total"], {k[5:]: v for k, v in summed.items() if k.startswith("part.")}

    def _gradient_step(self, window: Window, denominators: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        self.view.module.train()
        loss, parts = self._losses(window, denominators, backward=True)
        self.trainable.after_backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(params, self.settings.max_grad_norm)) if params else 0.0
        entry = {**parts, "loss": loss, "grad_norm": norm, "learning_rate": self.scheduler.get_last_lr()[0]}
        moves = False
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(entry)
        elif self.trainable.before_step(Stats(loss, norm)):
            moves, self.progress.not_finite = True, 0
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return entry, moves

    def _closure_step(self, window: Window, denominators: Mapping[str, float]) -> dict[str, float]:
        """Take a step with an optimiser that only asks for losses: dropout off, no graph."""
        self.view.module.eval()

        def closure() -> float:
            with torch.no_grad():
                return self._losses(window, denominators, backward=False)[0]

        loss = self.optimizer.step(closure)
        return {"loss": float(loss), "learning_rate": self.scheduler.get_last_lr()[0]}

    def _not_finite(self, entry: dict[str, float]) -> None:
        self.progress.not_finite += 1
        if self.settings.on_nan == "stop" or self.progress.not_finite >= NAN_STEPS:
            raise LuthierError(
                f"step {self.progress.step + 1}: loss {entry['loss']}, gradient norm {entry['grad_norm']}; "
                "lower learning_rate, or set on_nan: skip to skip single bad steps"
            )

    # --- the whole stage ---

    def run(self, deadline: float | None = None) -> Progress:
        """Train to the end, starting from the newest complete checkpoint if there is one."""
        self.resume()
        p, s = self.progress, self.settings
        while p.step < self.total_steps:
            if self._asked_to_stop(deadline):
                self.save()
                raise Interrupted(f"stopped after step {p.step} of {self.total_steps}")
            entry = self._step_within_memory()
            if p.step % s.logging_steps == 0 or p.step == self.total_steps:
                p.log.append(entry)
            if self.on_step is not None:
                self.on_step(entry, p, self.total_steps)
            if (
                s.eval_steps
                and self.evaluate
                and (p.step % s.eval_steps == 0 or p.step == self.total_steps)
                and self._evaluated()
            ):
                break
            if s.save_steps and p.step % s.save_steps == 0:
                self.save()
        if s.eval_steps and s.load_best and p.best_step not in (None, p.step) and self.folder is not None:
            best = self.folder / "best" / f"checkpoint-{p.best_step}"
            self._restore(best, checkpoint.load(best), whole=False)
        return p

    def _step_within_memory(self) -> dict[str, float]:
        """Take a step. If memory ends, save the steps before it and name the keys that lower the memory."""
        try:
            return self.step()
        except (MemoryError, RuntimeError) as error:  # torch's own error is a RuntimeError
            ended = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
            if not ended:
                raise
            self.optimizer.zero_grad(set_to_none=True)
            self.save()
            raise LuthierError(
                f"out of memory in step {self.progress.step + 1}, in the activations of up to "
                f"{self.settings.tokens_per_forward} tokens; the steps before it are saved: lower tokens_per_forward "
                "or set gradient_checkpointing: true, and run again"
            ) from error

    def _asked_to_stop(self, deadline: float | None) -> bool:
        """True on all ranks once one rank was asked to stop: they must stop after the same step."""
        asked = self.stop() or (deadline is not None and time.monotonic() > deadline)
        return self._reduce({"stop": float(asked)})["stop"] > 0

    def _evaluated(self) -> bool:
        """Evaluate, remember the best state, and return whether to stop early."""
        assert self.evaluate is not None
        p = self.progress
        with Generators(Streams(self.settings.seed), "evaluate", p.step).drawing():
            loss = self.evaluate()
        entry = {"step": p.step, "epoch": self.order.epoch(p.step), "eval_loss": loss}
        p.log.append(entry)
        if self.on_step is not None:
            self.on_step(entry, p, self.total_steps)
        if p.best_loss is None or loss < p.best_loss:
            p.best_loss, p.best_step, p.bad_evaluations = loss, p.step, 0
            if self.folder is not None and self.settings.load_best:
                self.save(self.folder / "best")
                checkpoint.prune(self.folder / "best", 1)
        else:
            p.bad_evaluations += 1
        patience = self.settings.early_stopping_patience
        return patience is not None and p.bad_evaluations >= patience

    # --- checkpoints ---

    def save(self, folder: Path | None = None) -> None:
        """Write a complete checkpoint. Every rank calls this; the first one writes."""
        folder = folder or self.folder
        if folder is None:
            return
        self.accelerator.wait_for_everyone()
        if folder == self.folder:
            self.progress.saved_step = self.progress.step
        generators = gather_object([self.generators.states])  # of every rank
        if self.accelerator.is_main_process:
            kept = self.objective.state_dict()
            tensors = {f"trainable.{k}": v for k, v in self.trainable.state_dict().items()}
            if self.extra is not None:
                tensors |= {f"extra.{k}": v for k, v in self.extra.state_dict().items()}
            tensors |= {f"objective.{k}": v for k, v in kept.items() if isinstance(v, Tensor)}
            state = {
                **vars(self.progress), "global_step": self.progress.step, "data_hash": self.data_hash,
                "objective": {k: v for k, v in kept.items() if not isinstance(v, Tensor)},
            }  # fmt: skip
            checkpoint.save(
                folder, self.progress.step, tensors, self.optimizer.state_dict(), self.scheduler.state_dict(),
                {"ranks": generators}, state,
            )  # fmt: skip
            checkpoint.prune(folder, self.settings.save_limit)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continue from the newest checkpoint that is complete and can be read. Returns False if there is none."""
        found = None if self.folder is None else checkpoint.newest(self.folder)
        if found is None:
            return False
        self._restore(*found, whole=True)
        return True

    def _restore(self, folder: Path, saved: dict[str, Any], whole: bool) -> None:
        if saved["state"]["data_hash"] != self.data_hash:
            raise LuthierError(f"{folder}: was made with other rows than data.train has now; use --fresh to start over")
        try:
            self._take_up(saved, whole)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise LuthierError(f"{folder}: does not fit this run ({error}); use --fresh to start over") from error

    def _take_up(self, saved: dict[str, Any], whole: bool) -> None:
        def of(owner: str) -> dict[str, Tensor]:
            return {k.removeprefix(owner): v for k, v in saved["tensors"].items() if k.startswith(owner)}

        self.trainable.load_state_dict(of("trainable."))
        if self.extra is not None:
            self.extra.load_state_dict(of("extra."))
        if whole:
            self.objective.load_state_dict({**of("objective."), **saved["state"]["objective"]})
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            ranks, rank = saved["rng"]["ranks"], self.accelerator.process_index
            if rank < len(ranks):  # a rank that is new in this run starts its generators from the seed
                self.generators.states = ranks[rank]
            known = Progress.__dataclass_fields__
            self.progress = Progress(**{k: v for k, v in saved["state"].items() if k in known})
            self.progress.resumed = True
