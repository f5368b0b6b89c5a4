"""Which runs a comparison needs, from those that are done: a pure function, asked in any order."""

import math

import pytest

from luthier.comparison.plan import checked
from luthier.comparison.steps import (
    Arm,
    Cost,
    Done,
    Job,
    StageCost,
    StagePlan,
    best_rate,
    budget_of,
    cost_of,
    forecast,
    never,
    next_jobs,
    next_rate,
    over_budget,
    steps_within,
    total_runs,
)


def plan_of(**more):
    return checked({"recipe": {}, "arms": {"a": {}, "b": {}}, "seeds": (0, 1), **more}, "plan")


ARMS = {"a": Arm("a", 1e-3, 100.0, 20), "b": Arm("b", 1e-2, 100.0, 20)}


def ran(job, value=1.0, flops=10.0, error=None):
    """A run whose step takes `flops` for every token of a row, and a second for every ten steps."""
    steps = job.steps or 7
    return Done(job, flops * steps * 100, steps / 10, steps, steps * 100.0, 50.0, 0.5, 1e6, 1e8, 2.0, value, error)


def carried_out(plan, arms, run=ran):
    done, order = {}, []
    while jobs := next_jobs(plan, arms, done):
        for job in jobs:
            done[job.name] = run(job)
            order.append(job.name)
    return done, order


def test_every_run_comes_once_and_in_its_turn():
    plan = plan_of()
    done, order = carried_out(plan, ARMS)
    assert len(order) == len(set(order)) == total_runs(plan) == 2 * (1 + 4 + 2)
    assert [n for n in order if n.startswith("a/")] == [
        "a/measure", "a/trial-0", "a/trial-1", "a/trial-2", "a/trial-3", "a/seed-0", "a/seed-1",
    ]  # fmt: skip


def test_it_goes_on_from_whatever_is_done():
    plan = plan_of()
    whole, order = carried_out(plan, ARMS)
    for cut in range(len(order)):
        done = {n: whole[n] for n in order[:cut]}
        again = dict(done)
        while jobs := next_jobs(plan, ARMS, again):
            again.update({j.name: ran(j) for j in jobs})
        assert again == whole


def test_the_default_budget_is_what_the_baselines_recipe_takes():
    plan = plan_of()
    assert budget_of(plan, ARMS, {}) is None
    done, _ = carried_out(plan, ARMS)
    assert budget_of(plan, ARMS, done) == ("flops", 50 + 20 * 100 * 10)
    assert done["a/seed-0"].steps == 20 and done["a/trial-0"].steps == 5


def test_an_arm_whose_step_costs_half_gets_twice_the_steps():
    run = lambda job: ran(job, flops=5.0 if job.arm == "b" else 10.0)  # noqa: E731
    done, _ = carried_out(plan_of(), ARMS, run)
    assert done["b/seed-0"].steps == 40 and done["a/seed-0"].steps == 20


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"tokens": 3000}, 30), ({"seconds": 2.5}, 20), ({"flops": 12050.0}, 12), ({"bytes": 9e9}, 20)],
)
def test_budgets_become_steps(budget, steps):
    done, _ = carried_out(plan_of(budget=budget), ARMS)
    assert done["a/seed-1"].steps == steps


def test_all_seeds_of_an_arm_share_its_best_rate():
    best = {"a": 3e-4, "b": 3e-2}
    value = lambda job: -abs(math.log(job.learning_rate / best[job.arm]))  # noqa: E731
    done, _ = carried_out(plan_of(), ARMS, lambda job: ran(job, value(job)))
    for arm in ARMS:
        rates = {d.job.learning_rate for n, d in done.items() if n.startswith(f"{arm}/seed")}
        assert len(rates) == 1 and 0.55 < rates.pop() / best[arm] < 1.8


def test_a_diverged_trial_is_the_worst_and_an_arm_without_any_good_one_ends():
    fails = lambda job: ran(job, error="loss nan" if job.learning_rate >= 1e-3 and job.arm == "a" else None)  # noqa: E731
    done, _ = carried_out(plan_of(), ARMS, fails)
    assert done["a/measure"].error and "a/seed-0" not in done, "what cannot even be measured is not tried"
    only = lambda job: ran(job, error="no" if job.purpose.startswith("trial") and job.arm == "a" else None)  # noqa: E731
    done, _ = carried_out(plan_of(), ARMS, only)
    assert "a/trial-3" in done and "a/seed-0" not in done and "b/seed-1" in done


def test_without_a_search_the_recipes_rate_is_used():
    done, order = carried_out(plan_of(search=None), ARMS)
    assert len(order) == 6 and done["b/seed-0"].job.learning_rate == 1e-2


def test_a_command_takes_its_leaders_steps():
    plan = plan_of(arms={"a": {}, "t": {"command": "x", "like": "a"}})
    arms = {"a": ARMS["a"], "t": Arm("t", 1e-4, 100.0, 20, plan.arms["t"])}
    done, order = carried_out(plan, arms)
    assert done["t/seed-0"].steps == done["a/seed-0"].steps and done["t/trial-0"].steps == done["a/trial-0"].steps
    assert order.index("t/seed-0") > order.index("a/trial-3") and "t/measure" not in done
    clock = plan_of(arms={"a": {}, "t": {"command": "x"}}, budget={"seconds": 9})
    done, _ = carried_out(clock, {"a": ARMS["a"], "t": Arm("t", 1e-4, 100.0, 20, clock.arms["t"])})
    assert done["t/seed-0"].job.steps is None


def test_the_search_walks_downhill_and_then_looks_closer():
    loss = lambda r: -((math.log(r) - math.log(2e-4)) ** 2)  # noqa: E731
    tried = {}
    for _ in range(6):
        rate = next_rate(tried, 1e-3, 3.0)
        tried[rate] = loss(rate)
    assert len(tried) == 6 and best_rate(tried) == pytest.approx(2e-4, rel=0.35)


def test_a_rate_is_never_tried_twice():
    tried = {}
    for _ in range(12):
        rate = next_rate(tried, 1e-3, 3.0)
        assert not any(math.isclose(rate, r) for r in tried)
        tried[rate] = math.nan if len(tried) % 3 else float(len(tried))


def test_of_equal_rates_the_smaller_one():
    assert best_rate({1e-3: 1.0, 1e-4: 1.0, 1e-2: math.inf * -1}) == 1e-4
    with pytest.raises(ValueError, match="no learning rate"):
        best_rate({1e-3: -math.inf})


def test_cost_is_read_from_the_longest_run():
    done, _ = carried_out(plan_of(), ARMS)
    assert cost_of(list(done.values()), "flops", 200.0) == Cost(2000.0, 50.0)
    with pytest.raises(ValueError, match="no run says"):
        cost_of([], "flops", 1.0)
    assert steps_within(Cost(10.0, 95.0), 100.0) == 1 and steps_within(Cost(10.0, 5.0), 104.0) == 10


def test_choices_of_what_trains_are_planned_for_and_not_taken_for_a_part_of_every_step():
    """Four measured steps hold four choices, a run of twenty holds five: each costs as much as three steps."""

    def chooses(steps):
        return 1 + (steps - 1) // max(1, steps // 5)

    def run(job):
        plain = ran(job)
        chosen = 3000.0 * chooses(plain.steps) if job.arm == "b" else 0.0
        return plain._replace(
            flops=plain.flops + chosen,
            select_flops=chosen,
            seconds=plain.seconds + chosen / 1000,
            select_seconds=chosen / 1000,
        )

    plan, arms = plan_of(), {**ARMS, "b": ARMS["b"]._replace(selections=chooses)}
    done, order = carried_out(plan, arms, run)
    spent = {arm: done[f"{arm}/seed-0"].flops + done[f"{arm}/seed-0"].once_flops for arm in "ab"}
    assert spent["b"] == pytest.approx(spent["a"], abs=1000.0 / 2) and done["b/seed-0"].steps < 20
    measured = {n: done[n] for n in order if n.endswith("measure")}
    rest = [d for n, d in done.items() if n not in measured]
    expected = forecast(plan, arms, measured)
    assert expected["flops"] == pytest.approx(sum(d.flops + d.once_flops for d in rest), rel=0.02)
    took = sum(d.seconds + d.once_seconds + d.evaluation_seconds for d in rest)
    assert expected["seconds"] == pytest.approx(took, rel=0.02)


def test_the_forecast_is_what_the_runs_then_take():
    plan = plan_of()
    done, order = carried_out(plan, ARMS)
    measured = {n: done[n] for n in order if n.endswith("measure")}
    expected = forecast(plan, ARMS, measured)
    rest = [d for n, d in done.items() if n not in measured]
    assert forecast(plan, ARMS, {}) is None and expected["runs"] == len(rest)
    assert expected["flops"] == pytest.approx(sum(d.flops + d.once_flops for d in rest), rel=0.02)
    assert expected["seconds"] == pytest.approx(
        sum(d.seconds + d.once_seconds + d.evaluation_seconds for d in rest), rel=0.02
    )
    half = {n: done[n] for n in order[: len(order) // 2]}
    left = [d for n, d in done.items() if n not in half]
    again = forecast(plan, ARMS, half)
    assert again["runs"] == len(left) and again["flops"] == pytest.approx(
        sum(d.flops + d.once_flops for d in left), rel=0.02
    )
    assert forecast(plan, ARMS, done)["seconds"] == 0


def test_an_arm_whose_update_is_larger_than_the_budget_in_bytes_stops_after_its_first_run():
    plan = plan_of(budget={"bytes": 5e5})

    def run(job):
        return ran(job)._replace(update_bytes=4e5 if job.arm == "a" else 6e5)

    done, order = carried_out(plan, ARMS, run)
    assert [n for n in order if n.startswith("b/")] == ["b/measure"]
    assert len([n for n in order if n.startswith("a/")]) == 7
    assert over_budget(plan, done, "b") == "its update has 600,000 bytes, the budget is 500,000"
    assert over_budget(plan, done, "a") is None
    assert over_budget(plan_of(budget={"tokens": 1}), done, "b") is None


def test_a_pipelines_step_is_its_stages_steps_in_their_shares_and_other_work_is_done_once():
    """Two stages of 30 and 10 steps over rows of 100 and 50 tokens a step; labelling a pool between them takes 500."""
    stages = (StagePlan("a", 30, 100.0), StagePlan("b", 10, 50.0))
    arm = Arm("p", 1e-3, (30 * 100 + 10 * 50) / 40, 40, stages=stages)
    took = {
        "a": StageCost(4 * 100 * 3.0, 8.0, 400.0),
        "label": StageCost(500.0, 2.5, 0.0),
        "b": StageCost(4 * 50 * 7.0, 4.0, 200.0),
    }
    run = Done(Job("p", "measure", 1e-3, 0, 4), 3100.0, 14.5, 8, 600.0, 40.0, 0.5, stages=took)
    flops, seconds, tokens = (arm.cost([run], unit) for unit in ("flops", "seconds", "tokens"))
    assert flops == Cost((30 * 100 * 3 + 10 * 50 * 7) / 40, 540.0)
    assert seconds == Cost((30 * 2.0 + 10 * 1.0) / 40, 3.0)
    assert tokens == Cost(87.5, 0.0)
    assert flops.of(40, never) == 540 + 12500 and steps_within(flops, 540 + 12500 / 2) == 20
