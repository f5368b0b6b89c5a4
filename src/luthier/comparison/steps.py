"""Which runs a comparison needs: a pure function of the finished runs, so that a killed comparison continues.

An arm is first measured over a few steps, then tried at several learning rates with a part of the budget each, then run with
every seed at the best rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from luthier.comparison.plan import Comparison, Foreign, Search

Selections = Callable[[int], int]
MEASURED_STEPS = 4  # steps of the first, short run of each arm


class Job(NamedTuple):
    """One run: arm, purpose, learning rate, seed and number of steps."""

    arm: str
    purpose: str  # "measure", "trial-N", "seed-N"
    learning_rate: float
    seed: int
    steps: int | None  # None: as in the recipe

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.purpose}"


class StageCost(NamedTuple):
    """The cost of one stage of a pipeline."""

    flops: float
    seconds: float
    row_tokens: float


class Done(NamedTuple):
    """The result of a finished run.

    flops, seconds                of training, with the choice of trained weights
    select_flops, select_seconds  of that choice alone
    once_flops, once_seconds      of curation, before the first step
    row_tokens                    tokens of the rows that the run was given
    value                         the measure that chooses the learning rate, with the sign that more is better; None if it
                                  was not measured
    error                         the reason of a failure; None if the run did not fail
    stages                        the cost of each stage of a pipeline, by name
    """

    job: Job
    flops: float
    seconds: float
    steps: int
    row_tokens: float
    once_flops: float = 0.0
    once_seconds: float = 0.0
    update_bytes: float = 0.0
    peak_bytes: float = 0.0
    evaluation_seconds: float = 0.0
    value: float | None = None
    error: str | None = None
    select_flops: float = 0.0
    select_seconds: float = 0.0
    stages: Mapping[str, StageCost] = {}


class Cost(NamedTuple):
    """What one arm costs, in the budget's unit: a step, the work before the first step, and a choice of trained weights."""

    step: float
    once: float
    choice: float = 0.0

    def of(self, steps: int, selections: Selections) -> float:
        """The cost of a number of steps."""
        return self.once + self.step * steps + self.choice * selections(steps)


def never(steps: int) -> int:
    """No choices: most tuners always train the same weights."""
    return 0


class StagePlan(NamedTuple):
    """A training stage of a pipeline: its number of steps, and the mean number of tokens of a step's rows."""

    name: str
    steps: int
    tokens_a_step: float


def cost_of(
    done: list[Done], unit: str, tokens_a_step: float, selections: Selections = never, stages: Sequence[StagePlan] = ()
) -> Cost:
    """The cost of a step over average rows, computed from the longest run so far.

    selections  number of steps -> how often such a run chooses weights; a choice costs nearly the same in every run
    stages      of a pipeline; a step is then a step of all stages, in their shares
    Raises ValueError if there is no run.
    """
    runs = [d for d in done if d.error is None and d.steps]
    if not runs:
        raise ValueError("no run says what a step costs")
    known = max(runs, key=lambda d: d.steps)
    if unit == "tokens":
        return Cost(tokens_a_step, 0.0)
    if stages:
        return _cost_in_stages(known, unit, stages)
    spent = {"flops": known.flops, "seconds": known.seconds}[unit]
    once = {"flops": known.once_flops, "seconds": known.once_seconds}[unit]
    times = selections(known.steps)
    chosen = {"flops": known.select_flops, "seconds": known.select_seconds}[unit] if times else 0.0
    return Cost((spent - chosen) / max(known.row_tokens, 1.0) * tokens_a_step, once, chosen / max(times, 1))


def _cost_in_stages(known: Done, unit: str, stages: Sequence[StagePlan]) -> Cost:
    """The cost of a pipeline's step. Work between the stages, such as labelling a pool, is done once."""
    once = {"flops": known.once_flops, "seconds": known.once_seconds}[unit]
    trained = {s.name for s in stages}
    once += sum(getattr(c, unit) for name, c in known.stages.items() if name not in trained)
    whole = 0.0
    for s in stages:
        took = known.stages[s.name]
        whole += getattr(took, unit) / max(took.row_tokens, 1.0) * s.tokens_a_step * s.steps
    return Cost(whole / sum(s.steps for s in stages), once)


def steps_within(cost: Cost, budget: float, selections: Selections = never) -> int:
    """The largest number of steps within a budget, up to half a step more; at least one."""
    most = max(1, int((budget - cost.once) / cost.step + 0.5))
    return next((n for n in range(most, 1, -1) if cost.of(n, selections) <= budget + cost.step / 2), 1)


def next_rate(tried: Mapping[float, float], start: float, factor: float) -> float:
    """The next learning rate to try: beyond the best one if that is the lowest or highest so far, else between the best one and
    its better neighbour.

    tried  rate -> value, more is better; values that are not finite are the worst
    """
    if not tried:
        return start
    value = {r: v if math.isfinite(v) else -math.inf for r, v in tried.items()}
    rates = sorted(value)
    best = max(rates, key=lambda r: (value[r], -r))
    i = rates.index(best)
    if i == 0:
        return best / factor
    if i == len(rates) - 1:
        return best * factor
    below, above = rates[i - 1], rates[i + 1]
    neighbour = max((below, above), key=lambda r: (value[r], abs(math.log(r / best))))
    return math.sqrt(best * neighbour)


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the best value; of equal ones the smallest. Raises ValueError if no value is finite."""
    finite = {r: v for r, v in tried.items() if math.isfinite(v)}
    if not finite:
        raise ValueError("no learning rate gave a finite value")
    return max(finite, key=lambda r: (finite[r], -r))


class Arm(NamedTuple):
    """What planning needs to know about an arm.

    learning_rate  where the search begins; of a pipeline: that of its first stage
    tokens_a_step  mean number of tokens of a step's rows
    own_steps      number of steps in its recipe; of a pipeline: of all stages together
    """

    name: str
    learning_rate: float
    tokens_a_step: float
    own_steps: int
    foreign: Foreign | None = None
    selections: Selections = never
    stages: tuple[StagePlan, ...] = ()

    def cost(self, done: list[Done], unit: str) -> Cost:
        """The cost of this arm, computed from its runs so far."""
        return cost_of(done, unit, self.tokens_a_step, self.selections, self.stages)


def next_jobs(plan: Comparison, arms: Mapping[str, Arm], done: Mapping[str, Done]) -> list[Job]:
    """All runs that can start now, in order; empty if everything is done or nothing can continue."""
    jobs: list[Job] = []
    for arm in arms.values():
        jobs += [j for j in _of_arm(plan, arms, arm, done) if j.name not in done]
    return jobs


def runs_of(done: Mapping[str, Done], arm: str) -> list[Done]:
    """The finished runs of an arm."""
    return [d for d in done.values() if d.job.arm == arm]


def budget_of(plan: Comparison, arms: Mapping[str, Arm], done: Mapping[str, Done]) -> tuple[str, float] | None:
    """(unit, amount of one run); None before the baseline has been measured."""
    if plan.budget is not None:
        return plan.budget.unit, plan.budget.amount
    base = arms[plan.base_arm]
    runs = [d for d in runs_of(done, base.name) if d.job.purpose == "measure" and d.error is None]
    if not runs:
        return None
    return "flops", base.cost(runs, "flops").of(base.own_steps, base.selections)


def over_budget(plan: Comparison, done: Mapping[str, Done], arm: str) -> str | None:
    """The reason why an arm may not continue: its update is larger than the budget in bytes. None if it may."""
    if plan.budget is None or plan.budget.bytes is None:
        return None
    size = max((d.update_bytes for d in runs_of(done, arm) if d.error is None), default=0.0)
    if size <= plan.budget.bytes:
        return None
    return f"its update has {size:,.0f} bytes, the budget is {plan.budget.bytes:,.0f}"


def _of_arm(plan: Comparison, arms: Mapping[str, Arm], arm: Arm, done: Mapping[str, Done]) -> list[Job]:
    if over_budget(plan, done, arm.name) is not None:
        return []
    if arm.foreign is None:
        measure = Job(arm.name, "measure", arm.learning_rate, 0, min(MEASURED_STEPS, max(2, arm.own_steps)))
        if measure.name not in done:
            return [measure]
        if done[measure.name].error is not None:
            return []
    budget = budget_of(plan, arms, done)
    leader = arm if arm.foreign is None or arm.foreign.like is None else arms[arm.foreign.like]
    if budget is None or (leader is not arm and f"{leader.name}/measure" not in done):
        return []
    if leader is not arm and done[f"{leader.name}/measure"].error is not None:
        return []
    steps = partial(_steps, budget, leader, runs_of(done, leader.name))
    rate = arm.learning_rate
    if plan.search is not None:
        trials = _trials(arm, plan.search, done, steps(plan.search.share))
        if trials:
            return trials
        tried = rates_tried(done, arm.name)
        if not any(math.isfinite(v) for v in tried.values()):
            return []
        rate = best_rate(tried)
        if leader is not arm and len(rates_tried(done, leader.name)) < plan.search.trials:
            return []  # its steps are known once the search of the other arm is over
    return [Job(arm.name, f"seed-{s}", rate, s, steps(1.0)) for s in plan.seeds]


def _steps(budget: tuple[str, float], arm: Arm, done: list[Done], share: float) -> int | None:
    unit, amount = budget
    if unit == "bytes":
        return max(1, round(arm.own_steps * share))
    if arm.foreign is not None:  # it stops by the clock
        return None
    # Trials are planned from the first measurement, so that a finished trial does not change the length of another.
    known = done if share == 1.0 else [d for d in done if d.job.purpose == "measure"]
    finished = [d for d in known if not d.job.purpose.startswith("seed-")]
    cost = arm.cost(finished, unit)
    return steps_within(cost, amount * share, arm.selections)


def rates_tried(done: Mapping[str, Done], arm: str) -> dict[float, float]:
    """Rate -> value of an arm's finished trials. A failed trial has the worst value."""
    trials = [d for d in runs_of(done, arm) if d.job.purpose.startswith("trial-")]
    return {d.job.learning_rate: -math.inf if d.value is None or d.error else d.value for d in trials}


def _trials(arm: Arm, search: Search, done: Mapping[str, Done], steps: int | None) -> list[Job]:
    """The next trial: one at a time, because the next rate depends on the last result. Empty when all are done."""
    tried = rates_tried(done, arm.name)
    if len(tried) >= search.trials:
        return []
    rate = next_rate(tried, arm.learning_rate, search.factor)
    return [Job(arm.name, f"trial-{len(tried)}", rate, 0, steps)]


def total_runs(plan: Comparison) -> int:
    """The number of runs of the whole comparison."""
    ours = sum(not isinstance(a, Foreign) for a in plan.arms.values())
    each = (plan.search.trials if plan.search else 0) + len(plan.seeds)
    return ours + each * len(plan.arms)


def forecast(plan: Comparison, arms: Mapping[str, Arm], done: Mapping[str, Done]) -> dict[str, Any] | None:
    """The runs, FLOPs and seconds that are left for one process, once every arm of luthier is measured."""
    budget = budget_of(plan, arms, done)
    measured = {a.name: done.get(f"{a.name}/measure") for a in arms.values() if a.foreign is None}
    if budget is None or any(d is None for d in measured.values()):
        return None
    seconds = flops = 0.0
    for arm in arms.values():
        leader = arm.name if arm.foreign is None or arm.foreign.like is None else arm.foreign.like
        known = measured.get(leader)
        shares = [1.0 for s in plan.seeds if f"{arm.name}/seed-{s}" not in done]
        if plan.search is not None:
            shares += [plan.search.share for i in range(plan.search.trials) if f"{arm.name}/trial-{i}" not in done]
        if known is None or known.error is not None or over_budget(plan, done, arm.name) is not None:
            seconds += sum(shares) * budget[1] if known is None else 0.0
            continue
        chooses = arms[leader].selections
        work, time = (arms[leader].cost([known], unit) for unit in ("flops", "seconds"))
        for share in shares:
            steps = _steps(budget, arms[leader], [known], share) or 0
            flops += work.of(steps, chooses)
            seconds += time.of(steps, chooses) + known.evaluation_seconds
    return {"runs": total_runs(plan) - len(done), "flops": flops, "seconds": seconds}
