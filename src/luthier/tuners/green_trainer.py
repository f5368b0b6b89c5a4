"""GreenTrainer: train the tensors that lower the loss most, within a given share of the FLOPs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.method import Source, Traits
from luthier.model.anatomy import Anatomy, Linear
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.step.window import Window
from luthier.support.errors import LuthierError, RecipeError
from luthier.tuners.base import DenseTrainable, ParamGroup, Tuner, as_view, by_decay

# Places in a block, in the order of the forward pass; tensors of one place read the same activation.
_NORM_IN, _QKV, _OUT, _NORM_MID, _UP, _DOWN, _NORM_END, _PLACES = 0, 1, 2, 3, 4, 5, 6, 7
_NORMS = (
    (r"(input_layernorm|ln_1|self_attn_layer_norm)$", _NORM_IN),
    (r"(post_attention_layernorm|ln_2|final_layer_norm|pre_feedforward_layernorm)$", _NORM_MID),
    (r"attention\.output\.LayerNorm$|sa_layer_norm$", _NORM_MID),  # of encoders, behind the residual
    (r"(post_feedforward_layernorm|output\.LayerNorm|output_layer_norm)$", _NORM_END),
    (r"[qk]_norm$", _QKV),
)
_ROLE_PLACE = {
    "q": _QKV,
    "k": _QKV,
    "v": _QKV,
    "qkv": _QKV,
    "o": _OUT,
    "gate": _UP,
    "gate_up": _UP,
    "up": _UP,
    "down": _DOWN,
}


class Item(NamedTuple):
    """A tensor that may be trained."""

    name: str
    level: int  # place in the forward pass, 0 nearest the input
    weight_cost: int  # multiply-adds of its own gradient
    part: str = ""  # "q", "k", "v", "qkv" in an attention level


class CostModel(NamedTuple):
    """Multiply-adds of one batch, without elementwise work.

    items           every parameter but a task head's
    through         level -> cost of passing the activation gradient through its matrices
    core            B N^2 (heads * head_dim): one of the four products of an attention's backward
    attention       levels that hold q, k, v
    head            cost of the head's activation gradient, paid when anything trains; for a task head, which always
                    trains, of its weight gradients too
    forward         of the whole pass
    """

    items: tuple[Item, ...]
    through: dict[int, int]
    core: int
    attention: frozenset[int]
    head: int
    forward: int

    def prefix(self, level: int, parts: frozenset[str]) -> int:
        """Activation gradients that must be taken when `level` is the shallowest with a trained tensor."""
        above = sum(cost for j, cost in self.through.items() if j > level)
        cores = sum(4 for j in self.attention if j > level)
        own = core_units(parts) if level in self.attention else 0
        return self.head + above + (cores + own) * self.core

    def backward(self, selected: Sequence[str]) -> int:
        """bp(m): weight gradients of the selected tensors, and all activation gradients on the way to them."""
        chosen = [x for x in self.items if x.name in set(selected)]
        if not chosen:
            return 0
        shallowest = min(x.level for x in chosen)
        parts = frozenset(x.part for x in chosen if x.level == shallowest)
        return self.prefix(shallowest, parts) + sum(x.weight_cost for x in chosen)

    @property
    def full_backward(self) -> int:
        return self.backward([x.name for x in self.items])


def core_units(parts: frozenset[str]) -> int:
    """How many of the four products of an attention core's backward these projections' gradients need."""
    if "qkv" in parts or {"q", "k", "v"} <= parts:
        return 4
    return {frozenset("v"): 1, frozenset("q"): 2, frozenset("k"): 2}.get(parts, 3)


def cost_model(anatomy: Anatomy, tokens: int, pairs: int, sequences: int) -> CostModel:
    """Costs for a batch of `tokens` tokens in `sequences` sequences with sum L^2 = `pairs`.

    A head over the vocabulary is priced for every token; a pooler and the head of a whole text read one token of a sequence.
    Raises LuthierError for a parameter whose place in the forward pass is not known.
    """
    matrices = {x.module: x for x in anatomy.linears}
    head = _head_cost(anatomy, tokens, sequences)
    last = len(anatomy.blocks) * _PLACES + 1
    items, through = [], dict.fromkeys(range(last + 2), 0)
    for name in anatomy.parameters:
        module, _, kind = name.rpartition(".")
        if name in anatomy.task_head:
            continue
        if module == anatomy.embedding:
            items.append(Item(name, 0, head if anatomy.tied else 0))
        elif module == anatomy.head:
            items.append(Item(name, last + 1, head if kind == "weight" else 0))
        elif module == anatomy.final_norm:
            items.append(Item(name, last, 0))
        elif name.startswith(anatomy.block_list + "."):
            level, part = _place(anatomy, module, matrices)
            cost = tokens * matrices[module].shape[0] * matrices[module].shape[1] if module in matrices else 0
            items.append(Item(name, level, cost if kind == "weight" else 0, part))
            through[level] += cost if kind == "weight" else 0
        elif ".pooler." in f".{name}":
            cost = sequences * matrices[module].shape[0] * matrices[module].shape[1] if kind == "weight" else 0
            items.append(Item(name, last, cost))
            through[last] += cost
        elif re.search(r"(embed_positions|wpe|position_embeddings|token_type_embeddings|embeddings\.LayerNorm)", name):
            items.append(Item(name, 0, 0))
        else:
            raise LuthierError(
                f"green-trainer does not know the place of {name} in the forward pass; choose the tuner full"
            )
    core = pairs * anatomy.num_heads * anatomy.head_dim
    attention = frozenset(i * _PLACES + 1 + _QKV for i in range(len(anatomy.blocks)))
    forward = sum(through.values()) + head + len(anatomy.blocks) * 2 * core
    backward = 2 * head if anatomy.task_head else head
    return CostModel(tuple(items), through, core, attention, backward, forward)


def _head_cost(anatomy: Anatomy, tokens: int, sequences: int) -> int:
    """Multiply-adds of the head's forward."""
    if not anatomy.task_head:
        return tokens * anatomy.parameters[f"{anatomy.embedding}.weight"][0] * anatomy.hidden_size
    return (tokens if anatomy.tags_tokens else sequences) * sum(
        x.shape[0] * x.shape[1] for x in anatomy.linears if x.name in anatomy.task_head
    )


def _place(anatomy: Anatomy, module: str, matrices: dict[str, Linear]) -> tuple[int, str]:
    """(level, part in an attention level) of a module in a block."""
    number, _, inner = module[len(anatomy.block_list) + 1 :].partition(".")
    start = int(number) * _PLACES + 1
    if module in matrices:
        role = matrices[module].role
        if role in _ROLE_PLACE:
            return start + _ROLE_PLACE[role], role if _ROLE_PLACE[role] == _QKV else ""
    for pattern, place in _NORMS:
        if re.search(pattern, inner):
            return start + place, inner[-6] if place == _QKV else ""
    raise LuthierError(f"green-trainer does not know the place of {module} in the forward pass; choose the tuner full")


def select(costs: CostModel, importance: dict[str, float], budget: float, resolution: int = 1000) -> list[str]:
    """Names with the largest total importance whose backward cost is within `budget` multiply-adds.

    Exact, except that every weight cost is rounded up to budget / resolution. Levels are visited from the output. At each level
    the cost to *reach* it is known, so one plain 0/1 knapsack over weight costs is enough for all levels.
    """
    if budget <= 0:
        return []
    helpful = [x.name for x in costs.items if importance.get(x.name, 0.0) > 0]
    if costs.backward(helpful) <= budget:  # rounding up must not cost the last tensor when all fit
        return helpful
    unit = budget / resolution
    best, answer = 0.0, []
    table = np.zeros(resolution + 1)
    taken: list[tuple[str, int, np.ndarray]] = []
    levels = sorted({x.level for x in costs.items}, reverse=True)
    for level in levels:
        items = [x for x in costs.items if x.level == level and importance.get(x.name, 0.0) > 0]
        for parts in _subsets(frozenset(x.part for x in items)) if level in costs.attention else [frozenset({""})]:
            mine = [x for x in items if level not in costs.attention or x.part in parts]
            room = budget - costs.prefix(level, parts)
            if room < 0 or not mine:
                continue
            trial, more = _knapsack(table, mine, importance, unit)
            slot = int(room / unit)
            if trial[slot] > best:
                best, answer = float(trial[slot]), _chosen([*taken, *more], slot)
        table, more = _knapsack(table, items, importance, unit)
        taken += more
    return answer


def _subsets(parts: frozenset[str]) -> list[frozenset[str]]:
    names = sorted(parts)
    return [frozenset(n for i, n in enumerate(names) if mask >> i & 1) for mask in range(1, 1 << len(names))]


def _knapsack(
    table: np.ndarray, items: list[Item], importance: dict[str, float], unit: float
) -> tuple[np.ndarray, list[tuple[str, int, np.ndarray]]]:
    """(the table with these items, each taken or not; for each item its name, its weight, and where it was taken)."""
    table, steps = table.copy(), []
    for x in items:
        weight = int(np.ceil(x.weight_cost / unit))
        with_it = np.full_like(table, -1.0)
        if weight < len(table):
            with_it[weight:] = table[: len(table) - weight] + importance[x.name]
        took = with_it > table
        table = np.where(took, with_it, table)
        steps.append((x.name, weight, took))
    return table, steps


def _chosen(steps: list[tuple[str, int, np.ndarray]], slot: int) -> list[str]:
    """The items that the best value at this slot is made of."""
    names = []
    for name, weight, took in reversed(steps):
        if took[slot]:
            names.append(name)
            slot -= weight
    return names


def scheduled(optimizer: Optimizer) -> float:
    """The learning rate of the optimiser's next step, as a share of the peak; 1 if that is 0, as at the start of a warm-up."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("initial_lr", group["lr"])) or 1.0


class GreenTrainer(Tuner):
    """Train with `flops_share` of the FLOPs of full tuning, on the tensors that lower the loss most.

    Before the first step, and then every `reselect_every` steps, one trial step on the step's rows estimates, to first order, how
    much each tensor's change lowers the loss. A knapsack chooses the set within the FLOP budget. The trial step has the learning
    rate of the step itself and a new optimiser. Everything that the trial changed is restored. A task head always trains, within
    the budget.
    Departs from the official code: exact costs by level instead of a chain, exact selection instead of a shortened table, and the
    moments are not changed by the trial. If a warm-up starts the run at learning rate 0, that trial uses the peak learning rate,
    because a step of size zero says nothing about any tensor.
    Cost: within the given share, plus two forward and backward passes for each selection; masters of all weights.
    Refuses: a share that is not above that of the forward pass alone, and models with tensors whose place in the forward pass it
    does not know.
    """

    traits: ClassVar[Traits] = Traits(
        claims=frozenset({"weight"}), needs=frozenset({"grad", "total_steps", "plain_weights"}), linear=True
    )
    source: ClassVar[Source] = Source(
        "Towards Green AI in Fine-tuning LLMs via Adaptive Backpropagation",
        2023,
        "arXiv:2309.13192",
        "eq. 1, official code",
    )

    flops_share: float = Field(0.6, gt=0, le=1)
    """Share of the FLOPs of full fine-tuning that a step may take (rho)."""
    reselect_every: int | None = Field(None, ge=1)
    """Steps between selections; None: a third of the run."""
    resolution: int = Field(1000, ge=10)
    """Steps into which the budget is divided (T_q)."""
    seed: int = Field(0, ge=0)
    """Seed for stochastic rounding."""

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> GreenTrainable:
        if self.reselect_every is None and total_steps is None:
            raise RecipeError(
                "tuner.green-trainer.reselect_every", "is unset and the run has no known length", "set one of them"
            )
        return GreenTrainable(self, as_view(model), self.every(total_steps or 0))

    def check_model(self, anatomy: Anatomy) -> None:
        cost_model(anatomy, 1, 1, 1)

    def every(self, total_steps: int) -> int:
        """Steps between two selections of a run."""
        return self.reselect_every or max(1, total_steps // 3)

    def selections(self, total_steps: int) -> int:
        return -(-total_steps // self.every(total_steps))


class GreenTrainable(DenseTrainable):
    """All weights except a task head's, with masters. Only the selected ones train."""

    reselects = reads_rows = True

    def __init__(self, tuner: GreenTrainer, view: ModelView, every: int) -> None:
        super().__init__(view, [n for n in view.anatomy.parameters if n not in view.anatomy.task_head], tuner.seed)
        self.tuner, self.every = tuner, every
        self.selected: list[str] = []
        self.spent: dict[str, float] = {}
        self._make: Callable[[list[nn.Parameter]], Optimizer] | None = None

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        run = default(groups)

        def make(params: list[nn.Parameter]) -> Optimizer:
            trial, factor = default(by_decay(params)), scheduled(run)
            for group in trial.param_groups:
                group["lr"] *= factor
            return trial

        self._make = make
        return run

    def before_window(self, window: Window, probe: Probe) -> None:
        if window.clock.step % self.every == 0:
            self.selected = self._select(window, probe)
        chosen = set(self.selected)
        for name in self.names:
            self.view.weight(name).requires_grad_(name in chosen)

    def _select(self, window: Window, probe: Probe) -> list[str]:
        lengths = [n for b in window.micro for n in b.lengths]
        here = [sum(lengths), sum(n * n for n in lengths), len(lengths)]
        everywhere = window.total(torch.tensor(here, device=self.view.device))
        costs = cost_model(self.view.anatomy, *everywhere.tolist())
        full = costs.forward + costs.full_backward
        budget = self.tuner.flops_share * full - costs.forward
        alone = {x.name: costs.backward([x.name]) for x in costs.items}
        reachable = [name for name, cost in alone.items() if cost <= budget]
        if not reachable:
            feasible = (costs.forward + min(alone.values())) / full
            raise LuthierError(
                f"tuner.green-trainer.flops_share = {self.tuner.flops_share}: nothing can be trained; "
                f"the smallest share that trains anything here is {feasible:.3f}"
            )
        importance = self._importance(window, probe, reachable)
        if not any(v > 0 for v in importance.values()):
            # The trial step was too long to say which tensor helps: keep the earlier choice.
            if not self.selected:
                raise LuthierError(
                    "tuner.green-trainer: the change of no tensor lowers the loss in the trial step; lower learning_rate"
                )
            return self.selected
        chosen = select(costs, importance, budget, self.tuner.resolution)
        self.spent = {"flops_share": (costs.forward + costs.backward(chosen)) / full, "tensors": float(len(chosen))}
        return chosen

    def _importance(self, window: Window, probe: Probe, names: list[str]) -> dict[str, float]:
        """-<change, gradient after it> for each tensor: how much the loss would rise without its change."""
        assert self._make is not None
        seen = probe.trial_step(window, names, self._make)
        values = {n: -float((seen.changes[n].double() * seen.grads_after[n].double()).sum()) for n in names}
        if not np.isfinite(list(values.values())).all():
            raise LuthierError(
                "tuner.green-trainer: the trial step gave a value that is not finite; lower learning_rate"
            )
        return values

    def state_dict(self) -> dict[str, Tensor]:
        chosen = set(self.selected)
        return super().state_dict() | {"selected": torch.tensor([n in chosen for n in self.names])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.selected = [n for n, on in zip(self.names, state["selected"].tolist(), strict=True) if on]
