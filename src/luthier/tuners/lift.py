"""LIFT: train the entries that are largest after a low-rank approximation of each matrix."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.anatomy import Anatomy, Linear
from luthier.model.meter import svd_flops
from luthier.model.undo import Change
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.window import Clock
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_dicts, as_view
from luthier.tuners.sparse import SparseWeights, refuse_entries, target_matrices, top
from luthier.update import Update

log = logging.getLogger(__name__)

# --- the mathematics ---


def num_entries(shape: tuple[int, int], rank: int | None, density: float) -> int:
    """min(r (m + n), m n), what LoRA of this rank would train; or a share of the matrix."""
    m, n = shape
    return min(rank * (m + n), m * n) if rank is not None else max(1, round(density * m * n))


def low_rank(weight: Tensor, rank: int, randomized: bool = False, generator_seed: int = 0) -> Tensor:
    """[m, n] float32: the nearest matrix of this rank; equal to the weight if the rank reaches min(m, n).

    randomized  two power iterations on 2 rank columns instead of an exact decomposition
    """
    w = weight.float()
    if rank >= min(w.shape):
        return w
    if randomized:
        with torch.random.fork_rng():
            torch.manual_seed(generator_seed)
            u, s, v = torch.svd_lowrank(w, q=min(2 * rank, *w.shape), niter=2)
        return (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    low: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return low


def principal(approximation: Tensor, k: int, block: int = 1) -> Tensor:
    """[k] flat positions, ascending, of the largest |W'|; with `block` the k // block^2 blocks with the largest sums.

    For equal values the first position is chosen, so that the number is exact.
    """
    size = approximation.abs()
    if block == 1:
        return top(size.reshape(-1), k)
    m, n = size.shape
    sums = size.reshape(m // block, block, n // block, block).sum((1, 3))  # [m, n] -> [m / b, n / b]
    chosen = top(sums.reshape(-1), max(1, k // block**2))
    row, column = chosen // (n // block) * block, chosen % (n // block) * block
    offsets = torch.arange(block, device=size.device)
    flat = (row[:, None, None] + offsets[None, :, None]) * n + column[:, None, None] + offsets[None, None, :]
    return flat.reshape(-1).sort().values


def carried(old: Tensor, new: Tensor, values: Tensor) -> Tensor:
    """[k] the value of each new position before, 0 if it was not among the old ones; both ascending."""
    at = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    return torch.where(old[at] == new, values[at], torch.zeros_like(values[at]))


# --- the method ---


class Lift(Tuner):
    """Train a small share of each matrix: the entries that are largest after rank reduction, chosen again from time to time.

    Each matrix is replaced by its best approximation of `filter_rank`. The entries where the approximation is largest ("principal
    weights") train with Adam on their own gradient. When entries are chosen again, entries in both choices keep their
    moments, new ones start at 0, and dropped ones keep their trained value; Adam's step count continues. So the final
    difference has as many entries as were ever chosen.
    Follows the paper: the published configurations name a mask that selects the smallest entries. Departs from it: entries have
    float32 values beside a low-precision weight (bf16 loses updates below 1/512 of a weight), and the share defaults to 5%
    of each matrix, because rank 128 is half of a small one. Two more departures from the published code are small (a model
    of four blocks, runs of 60 and 150 steps): epsilon is added after the bias correction, as in the paper (the trained
    difference changes by 1.0% to 1.3% of its norm, the held-out loss by 1e-4 at most); entries are chosen again after each
    `reselect_every` steps, where the code does so one step earlier (6% to 7% of the norm, 3e-4 of the loss).
    Use LoRA's learning rates (1e-4 to 5e-4), not those of full tuning.
    Cost: FLOPs of full tuning without embeddings and head; 14 m n^2 + 8 n^3 for a matrix at each choice (16 s on one core for
    135M weights); 16 bytes an entry, and the overwritten weights.
    Refuses: quantised bases, weight decay, weights that are not finite.
    """

    traits: ClassVar[Traits] = Traits(
        claims=frozenset({"weight"}), needs=frozenset({"total_steps", "plain_weights"}), linear=True
    )
    source: ClassVar[Source] = Source(
        "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused SFT",
        2025,
        "arXiv:2506.00772",
        "eq. 1-3",
    )

    density: float = Field(0.05, gt=0, le=1)
    """Share of each matrix that trains; not used if rank is set."""
    rank: int | None = Field(None, ge=1)
    """Train as many entries as LoRA of this rank, min(r (m + n), m n), instead of density."""
    filter_rank: int | None = Field(None, ge=1)
    """Rank of the approximation; null: the rank whose LoRA would have as many numbers as there are trained entries."""
    reselect_every: int = Field(200, ge=0)
    """Steps between two choices, but at most a fifth of the run; 0: choose once."""
    svd: Literal["exact", "randomized"] = "exact"
    """How the approximation is found."""
    block: Literal[1, 4] = 1
    """4: choose blocks of 4 x 4 entries."""
    targets: str | tuple[str, ...] = "all-linear"
    """Matrices to train; [gate_proj, up_proj, down_proj] are those of the MLP."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's moments."""
    adam_eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment."""
    seed: int = Field(0, ge=0)
    """Seed for rounding, and for the randomized decomposition."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if facts.settings is not None and facts.settings.weight_decay:
            decay = facts.settings.weight_decay
            problems.append(
                Problem("weight_decay", f"weight_decay = {decay} would act on entries alone", "set it to 0")
            )
        if facts.total_steps is not None and self.reselect_every > facts.total_steps:
            log.info(
                "lift: %d steps are fewer than reselect_every; entries are chosen every fifth of the run",
                facts.total_steps,
            )
        return problems

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> LiftTrainable:
        if total_steps is None and self.reselect_every:
            raise RecipeError("tuner.lift", "needs the total number of steps", "set max_steps")
        return LiftTrainable(self, as_view(model), total_steps or 0)

    def check_model(self, anatomy: Anatomy) -> None:
        self.matrices(anatomy)

    def matrices(self, anatomy: Anatomy) -> tuple[Linear, ...]:
        """The matrices that train. Raises RecipeError for a matrix that cannot."""
        linears = target_matrices(self.key(), anatomy, self.targets)
        for x in linears:
            if any(side % self.block for side in x.shape):
                what = f"{x.name} of {x.shape[0]} x {x.shape[1]} has no whole blocks of 4 x 4"
                raise RecipeError("tuner.lift.block", what, "set it to 1")
        return linears

    def every(self, total_steps: int) -> int:
        """Steps between two choices of a run; 0: there is only the first, as in runs of fewer than five steps."""
        return min(self.reselect_every, total_steps // 5)

    def selections(self, total_steps: int) -> int:
        every = self.every(total_steps)
        return 1 + ((total_steps - 1) // every if every else 0)


class LiftTrainable(Trainable):
    """The entries that train or trained before: positions, base values and differences."""

    def __init__(self, tuner: Lift, view: ModelView, total_steps: int) -> None:
        self.tuner, self.view, self._streams, self._steps = tuner, view, Streams(tuner.seed), 0
        self.every = tuner.every(total_steps)
        linears = tuner.matrices(view.anatomy)
        refuse_entries(view, linears)
        before, started = view.meter.total, time.perf_counter()
        chosen = {x.name: self._choose(x) for x in linears}
        super().__init__(view)
        self.freeze_base()
        self.sparse = SparseWeights(view, linears, chosen)
        self.attach_flops, self.attach_seconds = view.meter.total - before, time.perf_counter() - started
        # Dropped entries: positions (ascending), what the base holds there, and the difference training left.
        empty = torch.zeros(0, dtype=torch.long, device=view.device)
        self.left = {
            n: (empty, s[:0].clone(), torch.zeros(0, device=view.device)) for n, s in self.sparse.stored.items()
        }
        self.put(Change(self._restore, self._without), self.sparse.values)
        self._optimizer: Optimizer | None = None
        self.overlap: dict[str, float] = {}

    @torch.no_grad()
    def _choose(self, linear: Linear) -> Tensor:
        """[k] positions over (out, in), from the current weight."""
        t, shape = self.tuner, linear.shape
        weight: Tensor = self.view.weight(linear.name)
        weight = weight.T if linear.transposed else weight
        if not bool(weight.isfinite().all()):
            raise LuthierError(f"lift: {linear.name} holds values that are not finite; look at the base model")
        k = num_entries(shape, t.rank, t.density)
        rank = t.filter_rank or max(1, round(k / sum(shape)))
        if t.filter_rank and t.filter_rank > min(shape):
            log.warning("lift: filter_rank %d is cut to %d for %s", t.filter_rank, min(shape), linear.name)
        seed = int(self._streams.at("lift-svd", linear.module, self._steps).integers(1 << 31))
        if rank < min(shape):
            self.view.meter.charge(svd_flops(*shape) + 2.0 * shape[0] * shape[1] * rank)
        return principal(low_rank(weight, rank, t.svd == "randomized", seed), k, t.block)

    # --- the loop's calls ---

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(self.sparse.values.values()))]

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        lr = default(groups).defaults["lr"]
        self._optimizer = torch.optim.Adam(as_dicts(groups, lr), lr=lr, betas=self.tuner.betas, eps=self.tuner.adam_eps)
        return self._optimizer

    def after_step(self, clock: Clock | None = None) -> None:
        self._steps += 1
        self.sparse.write(self._rounding())
        ended = clock is not None and clock.step >= clock.total  # nothing would train what is chosen then
        if self.every and self._steps % self.every == 0 and not ended:
            for name, linear in self.sparse.linears.items():
                self.reselect(name, self._choose(linear))

    def _rounding(self) -> torch.Generator:
        return self._streams.torch("lift-rounding", self._steps, device=self.view.device)

    @torch.no_grad()
    def reselect(self, name: str, new: Tensor) -> None:
        """Train these positions from now on; no weight changes."""
        old, values, stored = self.sparse.indices[name].long(), self.sparse.values[name], self.sparse.stored[name]
        new = new.to(old.device)
        where, base, left = self.left[name]
        # What is known of every position ever chosen: base value and difference.
        known = torch.cat([old, where])
        order = known.argsort()
        known = known[order]
        bases, changes = torch.cat([stored, base])[order], torch.cat([values.detach(), left])[order]
        fresh = self.sparse.read(name, new)
        at = torch.searchsorted(known, new).clamp_max(len(known) - 1)
        hit = known[at] == new
        if self._optimizer is not None:
            state = self._optimizer.state[values]
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key].copy_(carried(old, new, state[key]))
        self.overlap[name] = float(torch.isin(new, old).float().mean())
        self.sparse.indices[name] = new.to(self.sparse.indices[name].dtype)
        self.sparse.stored[name] = torch.where(hit, bases[at], fresh)
        values.copy_(torch.where(hit, changes[at], torch.zeros_like(changes[at])))
        stay = ~torch.isin(known, new)
        self.left[name] = (known[stay], bases[stay], changes[stay])

    # --- what is kept ---

    def state_dict(self) -> dict[str, Tensor]:
        out = {f"indices.{n}": i for n, i in self.sparse.indices.items()}
        out |= {f"values.{n}": v.detach() for n, v in self.sparse.values.items()}
        out |= {f"stored.{n}": s for n, s in self.sparse.stored.items()}
        for n, (where, base, change) in self.left.items():
            out |= {f"where.{n}": where, f"base.{n}": base, f"change.{n}": change}
            out[f"weight.{n}"] = self.sparse.read(n, torch.cat([self.sparse.indices[n].long(), where]))
        return out | {"steps": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.view.device
        self._steps = int(state["steps"])
        for n in self.sparse.values:
            if len(state[f"values.{n}"]) != len(self.sparse.values[n]):
                found, here = len(state[f"values.{n}"]), len(self.sparse.values[n])
                raise LuthierError(f"lift: the checkpoint trains {found} entries of {n}, the recipe {here}")
            self.sparse.put(n, self.left[n][1], self.left[n][0])  # whatever trained here before
            self.sparse.put(n, self.sparse.stored[n])
            self.sparse.indices[n] = state[f"indices.{n}"].to(device, self.sparse.indices[n].dtype)
            self.sparse.values[n].copy_(state[f"values.{n}"])
            self.sparse.stored[n] = state[f"stored.{n}"].to(device)
            self.left[n] = tuple(state[f"{k}.{n}"].to(device) for k in ("where", "base", "change"))  # type: ignore[assignment]
            every = torch.cat([self.sparse.indices[n].long(), self.left[n][0]])
            self.sparse.put(n, state[f"weight.{n}"].to(device), every)

    def update(self) -> Update:
        """Every entry ever trained."""
        return Update(
            self.base, (self.sparse.part({n: (where, change) for n, (where, _, change) in self.left.items()}),)
        )

    @torch.no_grad()
    def _restore(self) -> None:
        for name, (where, base, _) in self.left.items():
            self.sparse.put(name, base, where)
        self.sparse.detach()

    def _without(self) -> AbstractContextManager[None]:
        """The base's entries where any ever trained."""
        return self.sparse.without({n: (where, base) for n, (where, base, _) in self.left.items()})
