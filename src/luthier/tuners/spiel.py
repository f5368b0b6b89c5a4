"""SpIEL: a sparse addition to the weights whose positions change during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.anatomy import Anatomy, Linear
from luthier.model.undo import Change
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.window import Clock, Window
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_dicts, as_view
from luthier.tuners.sparse import SparseWeights, refuse_entries, target_matrices, top, top_magnitudes
from luthier.update import Update
from luthier.update.binding import below

# --- the mathematics ---


def budgets(total: int, sizes: list[int]) -> list[int]:
    """Entries for each matrix, in proportion to its size, rounded down."""
    return [total * s // sum(sizes) for s in sizes]


def is_event(step: int, every: int, window: int, total: int) -> bool:
    """True if positions are chosen again after this many completed steps."""
    return step <= total and (step == window or (step > every and step % every == window))


def is_observed(step: int, every: int, window: int) -> bool:
    """True for a step (counted from 1) whose gradients the next choice uses."""
    return 1 <= step <= window or (step >= every and step % every <= window)


def replaced_share(step: int, total: int, window: int, r0: float, policy: str) -> float:
    """Share of the entries that an event may replace; all of them at the first event of the linear policy."""
    if policy == "cosine":
        return r0 * (1 + math.cos(math.pi * step / total)) / 2
    return 1.0 if step == window else r0 * (1 - step / total)


def exchange(indices: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, quota: int) -> tuple[Tensor, Tensor]:
    """(slots to overwrite, positions to put there).

    indices, values     [K] what is active now
    candidates, scores  [C] positions that could be, and how much each is wanted; those that stay active are left out
    A position that is both dropped and wanted keeps its slot, its value and its moments.
    """
    dropped = top(-values.abs(), quota)
    kept = torch.ones_like(indices, dtype=torch.bool)
    kept[dropped] = False
    if not len(candidates):
        return dropped[:0], candidates
    size = int(max(indices.max(), candidates.max())) + 1
    taken = torch.zeros(size, dtype=torch.bool, device=indices.device)
    taken[indices[kept]] = True
    free = (~taken[candidates]).nonzero().squeeze(1)
    wanted = candidates[free[top(scores[free], quota)]]
    taken.zero_()
    taken[wanted] = True
    leaving = dropped[~taken[indices[dropped]]]  # dropped, and not chosen again
    taken.zero_()
    taken[indices[dropped]] = True
    incoming = wanted[~taken[wanted]]
    if len(incoming) < len(leaving):
        leaving = leaving[top(-values[leaving].abs(), len(incoming))]
    return leaving, incoming[: len(leaving)]


def outer_top(rows: Tensor, columns: Tensor, active: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([k] flat positions, ascending, of the largest rows[j] * columns[i] that are not active, [k] those products).

    rows [R] and columns [C] are not negative; fewer than k where fewer are free. The [R, C] product is never made: along
    sorted columns a row's products reach a bound from one place on, so bounds are tried until they leave little over
    k + len(active) products, which are then looked at one by one.
    """
    n, wanted = len(columns), min(k + len(active), len(rows) * len(columns))
    ordered, order = columns.sort()

    def reached(bound: float) -> Tensor:  # [R] places in `ordered`
        return torch.searchsorted(ordered, bound / rows)

    def enough(bound: float) -> bool:
        return int((n - reached(bound)).sum()) >= wanted

    first = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    high = float(rows.max() * columns.max())
    low = high * 1e-12
    if enough(low):
        for _ in range(18):  # to a relative 1e-4
            middle = math.sqrt(low * high)
            low, high = (middle, high) if enough(middle) else (low, middle)
        first = reached(low * (1 - 1e-5))  # rounding of bound / rows is less
    each = n - first
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(each)
    within = torch.arange(len(row), device=rows.device) - (each.cumsum(0) - each).repeat_interleave(each)
    at = (row * n + order[first[row] + within]).sort().values
    taken = torch.zeros(len(rows) * n, dtype=torch.bool, device=rows.device)
    taken[active] = True
    at = at[~taken[at]]
    scores = rows[at // n] * columns[at % n]
    best = top(scores, k)
    return at[best], scores[best]


def unseen(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age, without the five digits that the plain difference loses for a young element."""
    return -torch.expm1(age * math.log(beta)) if beta else torch.ones_like(age, dtype=torch.float32)


class AgeAdamW(Optimizer):
    """AdamW whose bias correction counts each element's own age.

    eps is added to the root of the second moment before its correction, as in the official code; decay acts on the
    trained difference, that is, towards the pre-trained weight.

    total_steps  the largest age there will be
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, total_steps: int
    ) -> None:
        self.ages = torch.int16 if total_steps <= torch.iinfo(torch.int16).max else torch.int32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    ages = torch.zeros_like(p, dtype=self.ages)
                    state.update(age=ages, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                age, m, v = state["age"], state["exp_avg"], state["exp_avg_sq"]
                age += 1
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                corrected = (v.sqrt() + group["eps"]) / unseen(b2, age).sqrt()
                p.sub_(lr * (m / unseen(b1, age)) / corrected)
                p.mul_(1 - lr * group["weight_decay"])


Places = tuple[Tensor, Tensor, tuple[int, int]]  # (rows, columns, shape) of entries


class SparseSM3(Optimizer):
    """SM3-II over sparse entries: one accumulator a row and one a column, no momentum.

    where  parameter -> (rows, columns, shape) of its entries, asked for at every step, since entries move; a task head,
           which trains beside them, has all of its entries
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, where: Callable[[nn.Parameter], Places]) -> None:
        self.where = where
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, columns, shape = self.where(p)
                state = self.state[p]
                if not state:
                    state.update(row=p.new_zeros(shape[0]), column=p.new_zeros(shape[1]))
                grad = p.grad.view(-1)
                nu = torch.minimum(state["row"][rows], state["column"][columns]) + grad.square()
                state["row"].scatter_reduce_(0, rows, nu, "amax")
                state["column"].scatter_reduce_(0, columns, nu, "amax")
                p.view(-1).sub_(group["lr"] * grad / (nu + 1e-8).sqrt())
                p.mul_(1 - group["lr"] * group["weight_decay"])


def everywhere(p: Tensor) -> Places:
    """(rows, columns, shape) of all entries of a dense tensor, flat; a vector is one column."""
    columns = p[0].numel()
    at = torch.arange(p.numel(), device=p.device)
    return at // columns, at % columns, (len(p), columns)


class Observed:
    """What an open window has observed: candidate positions, and sums of their gradients over steps.

    All layers share one block of memory of each kind. Hundreds of small blocks, allocated in the middle of a backward pass
    and kept after it, would fragment the heap: 0.1 GB of holes on a model of 135M.
    """

    def __init__(self, indices: dict[str, Tensor]) -> None:
        sizes = [len(i) for i in indices.values()]
        widest = max(indices.values(), key=lambda i: i.dtype.itemsize)
        self._step, self._sum, self._squares = (torch.zeros(sum(sizes), device=widest.device) for _ in range(3))
        places = torch.zeros(sum(sizes), dtype=widest.dtype, device=widest.device)
        pieces = zip(*(t.split(sizes) for t in (places, self._sum, self._squares, self._step)), strict=True)
        self._pieces: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = dict(zip(indices, pieces, strict=True))
        self.chosen: set[str] = set()
        self.samples = 0

    def candidates(self, name: str) -> Tensor:
        """[K] ascending."""
        return self._pieces[name][0]

    def sums(self, name: str) -> tuple[Tensor, Tensor]:
        """([K], [K]) the candidates' gradients and their squares, summed over steps."""
        return self._pieces[name][1:3]

    def choose(self, name: str, candidates: Tensor) -> None:
        self.candidates(name).copy_(candidates)
        self.chosen.add(name)

    def see(self, name: str, flat: Tensor) -> None:
        """Add one backward's gradient of the whole matrix, flat."""
        self._pieces[name][3].add_(flat[self.candidates(name)])

    def end_step(self, ranks: dist.ProcessGroup | None) -> None:
        """Add the gradient of the whole step and its square."""
        if ranks is not None:  # the loop scales losses for a mean over ranks
            dist.all_reduce(self._step, group=ranks)
            self._step /= dist.get_world_size()
        self._sum += self._step
        self._squares.addcmul_(self._step, self._step)
        self._step.zero_()
        self.samples += 1


# --- the method ---


class Spiel(Tuner):
    """Train a fixed number of weight entries. Drop those that changed least, and add new ones where the gradient is largest.

    There are two variants. "ag" accumulates gradients of candidate positions over a short window, and trains with an AdamW that
    knows the age of entries. "ma" chooses new entries by the outer product of SM3's row and column accumulators; it needs
    no window.
    Departs from the official code: gradient statistics are taken over whole optimiser steps, and count as earlier steps in
    the age of a new entry, so that Adam's bias correction of its initial moments is exact.
    Cost: FLOPs of full tuning without embeddings and head (the dense weight gradient is computed, one layer at a time), so
    about 1.3 times LoRA's; 22 bytes an entry and 16 more inside a window ("ag"), 12 ("ma"), and the overwritten weights.
    With several processes, the first forward pass of the first process chooses the candidates; their sums are over all processes.
    Refuses: tied weights, quantised bases.
    """

    traits: ClassVar[Traits] = Traits(
        claims=frozenset({"weight"}), needs=frozenset({"total_steps", "plain_weights"}), linear=True
    )
    source: ClassVar[Source] = Source(
        "Scaling Sparse Fine-Tuning to Large Language Models", 2024, "arXiv:2401.16405", "official code"
    )

    density: float = Field(0.01, gt=0, le=1)
    """Share of all model parameters that trains; not used if num_weights is set."""
    num_weights: int | None = Field(None, ge=1)
    """Number of trained entries, instead of density."""
    variant: Literal["ag", "ma"] = "ag"
    """"ag": accumulated gradients and AdamW; "ma": momentum approximation with SM3."""
    reselect_every: int = Field(20, ge=1)
    """Steps between two choices of positions (S)."""
    window: int = Field(5, ge=1)
    """Number of steps whose gradients a choice uses (gamma)."""
    replace_fraction: float = Field(0.2, ge=0, le=1)
    """Share replaced at the start of the schedule (r0)."""
    policy: Literal["linear", "cosine"] = "linear"
    """How that share falls to 0."""
    targets: str | tuple[str, ...] = "all-linear"
    """Matrices to train."""
    adam_eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment before its correction."""
    seed: int = 0
    """Seed for the first positions and for rounding."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if self.window >= self.reselect_every:
            problems.append(
                Problem(
                    "window",
                    f"{self.window} is not below reselect_every = {self.reselect_every}",
                    "windows would overlap",
                )
            )
        return problems

    def check_model(self, anatomy: Anatomy) -> None:
        self.with_budget(anatomy)

    def with_budget(self, anatomy: Anatomy) -> list[tuple[Linear, int]]:
        """The matrices that train, and how many entries of each. Raises RecipeError where the numbers do not fit."""
        linears = target_matrices(self.key(), anatomy, self.targets)
        sizes = [x.shape[0] * x.shape[1] for x in linears]
        total = self.num_weights if self.num_weights is not None else int(self.density * anatomy.num_parameters)
        if not 0 < total <= sum(sizes):
            raise RecipeError(
                "tuner.spiel.density",
                f"asks for {total} entries of the {sum(sizes)} in the target matrices",
                "choose fewer, or more targets",
            )
        chosen = [(x, k) for x, k in zip(linears, budgets(total, sizes), strict=True) if k > 0]
        if not chosen:
            raise RecipeError(
                "tuner.spiel.density", f"{total} entries leave none for any of {len(linears)} matrices", "raise it"
            )
        return chosen

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> SpielTrainable:
        if total_steps is None:
            raise RecipeError("tuner.spiel", "needs the total number of steps", "set max_steps")
        self.refuse(Facts())
        return SpielTrainable(self, as_view(model), total_steps)


class SpielTrainable(Trainable):
    """Active entries, and the candidates of the open window."""

    reads_rows = True

    def __init__(self, tuner: Spiel, view: ModelView, total_steps: int) -> None:
        self.tuner, self.total_steps, self._streams = tuner, total_steps, Streams(tuner.seed)
        linears = tuner.with_budget(view.anatomy)
        refuse_entries(view, [x for x, _ in linears])
        super().__init__(view)
        self.freeze_base()
        first = {}
        for x, k in linears:
            generator = self._streams.torch("spiel", x.module)
            size = x.shape[0] * x.shape[1]
            # Copied: a slice would keep the whole permutation alive, 8 bytes for every weight.
            first[x.name] = torch.randperm(size, generator=generator)[:k].clone() if k < size else torch.arange(size)
        self.sparse = SparseWeights(view, [x for x, _ in linears], first)
        self.put(Change(self.sparse.detach, self.sparse.without), self.sparse.values)
        self.observed: Observed | None = None
        # Candidates are agreed on inside the backward pass, so not on the group that reduces gradients.
        self._ranks = dist.new_group() if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._optimizer: Optimizer | None = None
        self._steps = 0

    # --- the loop's calls ---

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(self.sparse.values.values()))]

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        settings = default(groups).defaults
        entries, decay = as_dicts(groups, settings["lr"]), settings["weight_decay"]
        if self.tuner.variant == "ag":
            self._optimizer = AgeAdamW(
                entries, settings["lr"], settings["betas"], self.tuner.adam_eps, decay, self.total_steps
            )
        else:
            names = {id(p): n for n, p in self.sparse.values.items()}

            def where(p: nn.Parameter) -> Places:
                name = names.get(id(p))
                if name is None:
                    return everywhere(p)
                shape = self.sparse.linears[name].shape
                at = self.sparse.indices[name].long()
                return at // shape[1], at % shape[1], shape

            self._optimizer = SparseSM3(entries, settings["lr"], decay, where)
        return self._optimizer

    def before_window(self, window: Window | None = None, probe: Any = None) -> None:
        if self._optimizer is not None and not isinstance(self._optimizer, (AgeAdamW, SparseSM3)):
            raise TypeError("SpIEL moves its entries: use the optimiser it makes")
        open_now = self.tuner.variant == "ag" and is_observed(
            self._steps + 1, self.tuner.reselect_every, self.tuner.window
        )
        if open_now and self.observed is None:
            self.observed = Observed(self.sparse.indices)
        for name in self.sparse.values:
            self.sparse.observe[name] = partial(self._see, name) if open_now else None

    def _see(self, name: str, gradient: Tensor) -> None:
        """Called in the backward with [out, in]."""
        assert self.observed is not None
        flat = gradient.reshape(-1)
        if name not in self.observed.chosen:
            best = top_magnitudes(flat, len(self.sparse.indices[name]))
            if self._ranks is not None:
                dist.broadcast(best, 0, group=self._ranks)
            self.observed.choose(name, best)
        self.observed.see(name, flat)

    def after_backward(self) -> None:
        if self.observed is not None:
            self.observed.end_step(self._ranks)

    def after_step(self, clock: Clock | None = None) -> None:
        t = self.tuner
        self._steps += 1
        if is_event(self._steps, t.reselect_every, t.window, self.total_steps):
            share = replaced_share(self._steps, self.total_steps, t.window, t.replace_fraction, t.policy)
            for name in self.sparse.values:
                self._reselect(name, int(len(self.sparse.indices[name]) * share))
            self.observed = None
        self.sparse.write(self._rounding())

    def _rounding(self) -> torch.Generator:
        return self._streams.torch("spiel-rounding", self._steps, device=self.view.device)

    @torch.no_grad()
    def _reselect(self, name: str, quota: int) -> None:
        indices, values = self.sparse.indices[name], self.sparse.values[name]
        assert self._optimizer is not None
        state = self._optimizer.state[values]
        if self.tuner.variant == "ma":
            if state:
                candidates, scores = outer_top(state["row"], state["column"], indices, quota)
                slots, incoming = exchange(indices, values.detach(), candidates, scores, quota)
                self.sparse.move(name, slots, incoming)
            return
        seen = self.observed
        if seen is None:
            raise LuthierError("spiel: an event came without observed gradients; call before_window each step")
        if name not in seen.chosen:  # no row has used this layer: an expert that no token went to
            return
        candidates, (s1, s2), n = seen.candidates(name), seen.sums(name), seen.samples
        slots, incoming = exchange(indices, values.detach(), candidates, s1.abs(), quota)
        self.sparse.move(name, slots, incoming)
        if state:
            at = torch.searchsorted(candidates, incoming)
            b1, b2 = self._optimizer.param_groups[0]["betas"]
            state["exp_avg"][slots] = (1 - b1**n) * s1[at] / n
            state["exp_avg_sq"][slots] = (1 - b2**n) * s2[at] / n
            state["age"][slots] = n

    # --- what is kept ---

    def state_dict(self) -> dict[str, Tensor]:
        out = {f"indices.{n}": i for n, i in self.sparse.indices.items()}
        out |= {f"values.{n}": v.detach() for n, v in self.sparse.values.items()}
        seen = self.observed
        if seen is not None:
            for n in seen.chosen:
                s1, s2 = seen.sums(n)
                out |= {f"candidates.{n}": seen.candidates(n), f"s1.{n}": s1, f"s2.{n}": s2}
        samples = 0 if seen is None else seen.samples
        return out | {"steps": torch.tensor(self._steps), "samples": torch.tensor(samples)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps = int(state["steps"])
        self.sparse.load(below("indices.", state), below("values.", state), self._rounding())
        self.observed = None
        if candidates := below("candidates.", state):
            self.observed = Observed(self.sparse.indices)
            self.observed.samples = int(state["samples"])
            for n, at in candidates.items():
                self.observed.choose(n, at)
                for kept, saved in zip(self.observed.sums(n), (state[f"s1.{n}"], state[f"s2.{n}"]), strict=True):
                    kept.copy_(saved)

    def continue_from(self, state: dict[str, Tensor]) -> None:
        """Use one schedule of choices over both stages, so that well-chosen positions are not all replaced again."""
        self.load_state_dict(state)
        self.total_steps += self._steps

    def update(self) -> Update:
        return Update(self.base, (self.sparse.part(),))
