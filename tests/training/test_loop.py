"""The loop line by line, with exact values: a step's numbers, what it calls and when, ranks, evaluations, what is kept."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from pydantic import PrivateAttr

from helpers.ranks import Ranks
from luthier.compute.base import Compute
from luthier.data.batch import IGNORE, collate
from luthier.objectives.base import Clock, Forward, Objective, Term, count
from luthier.objectives.caft import Caft
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.training import checkpoint
from luthier.training import loop as loop_module
from luthier.training.loop import NAN_STEPS, Interrupted, Loop, Wrapped
from luthier.tuners.base import ParamGroup
from luthier.tuners.frozen import Frozen
from luthier.tuners.lora import Lora

SETTINGS = TrainSettings(max_steps=4, batch_size=4, learning_rate=1e-2, tokens_per_forward=14, shuffle=False)
LENGTHS = (9, 5, 12, 7)  # 33 tokens, four targets each, in three micro-batches of at most 14


class TwoTerms(Objective):
    """The mean loss of a token, and half the squares over sequences; a third denominator stays zero."""

    def plan(self, window, probe):
        return window, count(window.micro) | {"nothing": 0.0}

    def loss(self, fwd):
        nll = fwd.nll()
        return {"plain": Term(nll.sum(), "tokens"), "squares": Term(nll.square().sum(), "sequences", 0.5)}


class Remembering(Objective):
    """Keeps a number, a tensor, and a module beside the model."""

    _number: int = PrivateAttr(0)
    _tensor: torch.Tensor = PrivateAttr(default_factory=lambda: torch.zeros(2))

    def extend(self, view, carried=None):
        return torch.nn.Linear(1, 1)

    def plan(self, window, probe):
        self._number += 3
        self._tensor = self._tensor + torch.rand(2)
        return window, count(window.micro)

    def loss(self, fwd):
        return {"loss": Term(fwd.nll().sum() * fwd.extra(fwd.nll().new_ones(1)).exp()[0], "tokens")}

    def state_dict(self):
        return {"number": self._number, "tensor": self._tensor}

    def load_state_dict(self, state):
        self._number, self._tensor = state["number"], state["tensor"]


class Still(Objective):
    """A loss that no weight has a part in."""

    def loss(self, fwd):
        return {"loss": Term(torch.full((), 8.0), "tokens")}


def looped(
    objective=None, tuner=None, lengths=LENGTHS, rows=None, change=lambda trainable: None, settings=None, **more
):
    """A loop over rows with four targets each.

    change    is given the trainable before the loop is made
    settings  other values of SETTINGS
    """
    view = more.pop("view", None) or view_of(layers=1)
    trainable = (tuner or Lora(rank=2)).attach(view)
    change(trainable)
    rows = rows_of(lengths) if rows is None else rows
    settings = SETTINGS.model_copy(update=settings or {})
    return Loop(view, rows, trainable, objective or Sft(), settings, **more)


def plainly(rate, momentum=0.0):
    """A change by which a trainable's groups are trained by plain descent, the second at twice the rate."""

    def change(trainable):
        def optimizer(groups, default):
            params = [{"params": g.params, "lr": rate * (i + 1)} for i, g in enumerate(groups)]
            return torch.optim.SGD(params, lr=rate, momentum=momentum)

        trainable.optimizer = optimizer

    return change


def without_targets(row):
    return {**row, "labels": [IGNORE] * len(row["ids"])}


# --- one step ---


def test_a_step_of_many_micro_batches_is_the_gradient_step_of_the_whole_by_hand():
    constant = {"max_grad_norm": 0.5, "lr_scheduler_type": "constant", "warmup_fraction": 0.0}
    loop = looped(TwoTerms(), change=plainly(0.25), settings=constant)
    assert [b.num_tokens for b in loop.window(0).micro] == [12, 14, 7]
    params = [p for p in loop.view.module.parameters() if p.requires_grad]
    nll = Forward(collate(rows_of(LENGTHS)), loop.view).nll()
    plain, squares = nll.sum() / 16, nll.square().sum() / 4
    grads = torch.autograd.grad(plain + 0.5 * squares, params)
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    wanted = [p.detach() - 0.25 * g * 0.5 / norm for p, g in zip(params, grads, strict=True)]
    assert norm > 0.5, "else nothing is clipped"
    entry = loop.step()
    assert entry["plain"] == pytest.approx(float(plain.detach()), rel=1e-5)
    assert entry["squares"] == pytest.approx(float(squares.detach()), rel=1e-5)
    assert entry["loss"] == pytest.approx(float((plain + 0.5 * squares).detach()), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close([p.detach() for p in params], wanted, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in params) and loop.view.module.training
    numbers = {"step": 1, "epoch": 1.0, "learning_rate": 0.25, "num_tokens": 33}
    assert {k: entry[k] for k in numbers} == numbers and "skipped" not in entry
    assert entry.keys() == numbers.keys() | {"plain", "squares", "loss", "grad_norm", "tokens_per_second", "flops"}


def test_parts_of_a_loss_hold_no_graph():
    view = view_of(layers=1)
    total, parts = Wrapped(view, TwoTerms(), None)(collate(rows_of(LENGTHS)), {"tokens": 16.0, "sequences": 4.0})
    assert total.requires_grad and not any(p.requires_grad for p in parts.values())


def test_tokens_rows_and_targets_are_added_up_over_steps_and_silent_steps_count_as_given():
    rows = rows_of((9, 5, 12, 7, 8, 6))
    rows = [without_targets(r) if i in (2, 3) else r for i, r in enumerate(rows)]
    loop = looped(rows=rows, settings={"batch_size": 2, "max_steps": 3})
    found = []
    for _ in range(3):
        loop.step()
        p = loop.progress
        found.append((p.step, p.tokens, p.row_tokens, p.supervised, p.skipped))
    assert found == [(1, 14, 14, 8, 0), (2, 14, 33, 8, 1), (3, 28, 47, 16, 1)]


class Charging(Still):
    """Says to the meter what each of its calls took."""

    def plan(self, window, probe):
        probe.view.meter.charge(2.0)
        return window, count(window.micro)

    def loss(self, fwd):
        fwd.view.meter.charge(100.0)
        return super().loss(fwd)


def test_flops_of_a_step_are_what_the_meter_counted_in_it():
    view = view_of(layers=1)
    view.meter.flops = {"plan": 1e6, "other": 3.0}

    def change(trainable):
        trainable.attach_flops, trainable.attach_seconds = 7.0, 0.25
        trainable.before_window = lambda window, probe: view.meter.charge(10.0)
        trainable.after_step = lambda clock: view.meter.charge(5.0)

    loop = looped(Charging(), view=view, change=change)
    assert (loop.progress.flops, loop.progress.seconds, loop.progress.select_seconds) == ({"select": 7.0}, 0.25, 0.25)
    assert loop.step()["flops"] == 324.0
    assert loop.progress.flops == {"select": 22.0, "plan": 2.0, "train": 300.0}
    assert loop.step()["flops"] == 641.0
    assert loop.progress.flops == {"select": 37.0, "plan": 4.0, "train": 600.0}
    plain = looped(Still())
    assert plain.progress.flops == {}
    plain.step()
    assert plain.progress.flops == {"select": 0.0, "plan": 0.0, "train": 0.0}


def test_seconds_are_read_from_the_clock(monkeypatch):
    readings = iter([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0])
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    loop = looped(Still())
    assert loop.step()["tokens_per_second"] == 33 / 15
    assert (loop.progress.seconds, loop.progress.select_seconds) == (15.0, 1.0 + 4.0)
    loop.step()
    assert (loop.progress.seconds, loop.progress.select_seconds) == (15.0 + 480.0, 5.0 + 32.0 + 128.0)


def test_a_trainable_is_called_in_order_and_told_how_far_the_run_is():
    calls, answers, loop = [], iter([True, False]), looped(lengths=(9, 5, 12, 7, 8, 6))
    t = loop.trainable
    t.before_window = lambda window, probe: calls.append(("window", window.clock, probe is loop.probe))
    t.after_backward = lambda: calls.append(("backward", all(p.grad is not None for p in t.parameters())))
    t.before_step = lambda stats: calls.append(("before", stats.loss, stats.grad_norm)) or next(answers)
    t.after_step = lambda clock: calls.append(("after", clock))
    first = loop.step()
    asked = ("before", first["loss"], first["grad_norm"])
    assert calls == [("window", Clock(0, 4, 0.0), True), ("backward", True), asked, ("after", Clock(1, 4, 0.5))]
    calls.clear()
    before = {k: v.clone() for k, v in t.state_dict().items()}
    second = loop.step()  # which before_step refuses
    assert calls[0][1] == Clock(1, 4, 0.5) and [c[0] for c in calls] == ["window", "backward", "before"]
    assert loop.progress.skipped == 1 == second["skipped"]
    assert all(torch.equal(v, before[k]) for k, v in t.state_dict().items())
    assert all(p.grad is None for p in t.parameters())


def test_rates_follow_the_schedule_through_silent_steps_and_are_logged_before_they_change(recwarn):
    def change(trainable):
        plainly(0.5)(trainable)
        first, *others = trainable.parameters()
        trainable.groups = lambda: [ParamGroup([first]), ParamGroup([]), ParamGroup(others)]

    rows = [without_targets(r) if i in (0, 3) else r for i, r in enumerate(rows_of((6,) * 10))]
    loop = looped(rows=rows, change=change, settings={"batch_size": 1, "max_steps": 10, "warmup_fraction": 0.2})
    rates = [loop.step()["learning_rate"] for _ in range(10)]
    assert rates == pytest.approx([0.0, 0.25, *(0.5 * (10 - k) / 8 for k in range(2, 10))])
    assert loop.progress.skipped == 2 and not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_rows_without_any_target_are_refused_in_the_first_step():
    loop = looped(rows=[without_targets(r) for r in rows_of(LENGTHS)])
    with pytest.raises(LuthierError, match="step 1: no row has a supervised token"):
        loop.step()
    assert looped(rows=[without_targets(r) for r in rows_of(LENGTHS)] + rows_of((4,))).step()["skipped"] == 1
    with pytest.raises(LuthierError, match="no row is left to train on"):
        looped(rows=[])


def test_a_loss_without_a_graph_is_a_step_without_gradients():
    entry = (loop := looped(Still())).step()
    assert (entry["loss"], entry["grad_norm"], loop.progress.skipped) == (3 * 8.0 / 16, 0.0, 0)


def test_weights_that_are_not_trained_take_no_gradient_and_empty_groups_are_passed_over():
    with pytest.raises(LuthierError, match="nothing trains: sft adds no trained modules"):
        looped(tuner=Frozen())
    loop = looped(
        Caft(stage="heads", ahead=2), Frozen(), change=lambda t: setattr(t, "groups", lambda: [ParamGroup([])])
    )
    beside = [p for p in loop.extra.parameters() if p.requires_grad]
    assert [g["params"] for g in loop.optimizer.param_groups] == [[], beside] and beside
    before = [p.detach().clone() for p in beside]
    loop.step(), loop.step()
    assert not any(torch.equal(p, b) for p, b in zip(beside, before, strict=True))

    class Fixed(Sft):
        def extend(self, view, carried=None):
            return torch.nn.Linear(1, 1).requires_grad_(False)

    assert len(looped(Fixed()).optimizer.param_groups) == len(looped().optimizer.param_groups) == 1


def broken(loop, gradient, loss_factor=1.0):
    """One step whose gradients are all this number, and whose loss is multiplied."""
    loop.trainable.after_backward = lambda: [p.grad.fill_(gradient) for p in loop.trainable.parameters()]
    losses = loop._losses
    loop._losses = lambda *args, **more: (lambda total, parts: (total * loss_factor, parts))(*losses(*args, **more))
    try:
        return loop.step()
    finally:
        loop._losses = losses


@pytest.mark.parametrize("gradient, factor", [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_loss_or_a_norm_that_is_not_finite_moves_nothing(gradient, factor):
    loop = looped(change=plainly(0.5), settings={"on_nan": "skip", "warmup_fraction": 0.0})
    before = {k: v.clone() for k, v in loop.trainable.state_dict().items()}
    assert broken(loop, gradient, factor)["skipped"] == 1 == loop.progress.not_finite
    assert all(torch.equal(v, before[k]) for k, v in loop.trainable.state_dict().items())
    assert all(p.grad is None for p in loop.trainable.parameters())
    assert broken(loop, 1.0)["skipped"] == 1 and loop.progress.not_finite == 0
    assert not all(torch.equal(v, before[k]) for k, v in loop.trainable.state_dict().items())
    with pytest.raises(LuthierError, match="step 1: loss .*; lower learning_rate"):
        broken(looped(), gradient, factor)


def test_the_tenth_bad_step_in_a_row_ends_the_run():
    loop = looped(settings={"on_nan": "skip", "max_steps": 50})
    for _ in range(NAN_STEPS - 1):
        broken(loop, math.nan)
    broken(loop, 1.0)
    for _ in range(NAN_STEPS - 1):
        broken(loop, math.nan)
    with pytest.raises(LuthierError, match=f"step {2 * NAN_STEPS}: loss"):
        broken(loop, math.nan)


def test_a_closure_is_asked_for_losses_in_eval_mode_without_a_graph():
    asked = []

    class Asking(torch.optim.SGD):
        def step(self, closure=None):
            asked.append((closure(), closure(), torch.is_grad_enabled()))
            return asked[-1][0]

    def change(trainable):
        trainable.steps_by_closure = True
        trainable.groups = lambda: [ParamGroup([p]) for p in (*trainable.a.values(), *trainable.b.values())]
        trainable.optimizer = lambda groups, default: Asking(
            [{"params": g.params, "lr": 0.5 * (i + 1)} for i, g in enumerate(groups)], lr=0.5
        )
        trainable.after_step = lambda clock: asked.append(clock)

    loop = looped(change=change, settings={"warmup_fraction": 0.0})
    loop.view.module.train()
    wanted = float(Forward(collate(rows_of(LENGTHS)), loop.view).nll().mean().detach())
    entry = loop.step()
    (first, second, _), clock = asked
    assert first == second == entry["loss"] == pytest.approx(wanted, rel=1e-5)
    assert entry["learning_rate"] == 0.5 and clock == Clock(1, 4, 1.0)
    assert loop.progress.skipped == 0 and not loop.view.module.training
    assert all(p.grad is None for p in loop.view.module.parameters())


# --- what a loop is made of ---


def test_a_loop_makes_what_it_is_not_given(monkeypatch):
    made = []
    monkeypatch.setattr(
        loop_module,
        "Accelerator",
        lambda **asked: made.append(asked) or SimpleNamespace(num_processes=1, process_index=0),
    )
    lab = Lab(seed=5)
    assert looped(lab=lab).lab is lab and looped(settings={"seed": 7}).lab.seed == 7
    assert made == [{"cpu": True}] * 2
    mine = SimpleNamespace(num_processes=1, process_index=0)
    assert looped(accelerator=mine).accelerator is mine and len(made) == 2


class Marking(Compute):
    """Says in which phases it was entered."""

    _seen: list = PrivateAttr(default_factory=list)

    @contextmanager
    def patch(self, view, phase):
        self._seen.append((phase, view))
        yield


def test_a_compute_method_is_entered_around_every_forward_pass():
    compute = Marking()
    loop = looped(compute=compute)
    loop.step()
    assert compute._seen == [("train", loop.view)] * 3
    assert len(loop.view.phases) == 1 + len(looped().view.phases)


@pytest.mark.parametrize("asked, times", [(True, 1), (False, 0), ("auto", 0)])
def test_blocks_are_checkpointed_only_where_that_was_asked_for(asked, times):
    view, calls = view_of(layers=1), []
    view.checkpoint_blocks = lambda: calls.append(1)
    looped(view=view, settings={"gradient_checkpointing": asked})
    assert len(calls) == times


@pytest.mark.parametrize("compiled", [True, False])
def test_blocks_are_compiled_for_any_length_or_all_layers_are_metered(compiled, monkeypatch):
    calls, watched, view = [], [], view_of(layers=2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: calls.append((self, how)))
    monkeypatch.setattr(view.meter, "watch", watched.append)
    loop = looped(view=view, settings={"torch_compile": compiled})
    assert calls == ([(view.block(i), {"dynamic": True}) for i in range(2)] if compiled else [])
    assert watched == ([] if compiled else [loop.wrapped])


def test_each_epoch_draws_its_own_version_of_a_row():
    drawn = []

    def draw(row, epoch):
        drawn.append((row["key"], epoch))
        return {**row, "ids": [3 + epoch] * len(row["ids"])}

    loop = looped(lengths=(9, 5, 12, 7, 8, 6), draw=draw, settings={"batch_size": 2, "max_steps": 8})
    found = [loop.window(step).micro[0].ids.unique().tolist() for step in range(8)]
    assert found == [[3]] * 3 + [[4]] * 3 + [[5]] * 2
    assert drawn == [(str(2 * (k % 3) + i), k // 3) for k in range(8) for i in range(2)]


# --- several processes ---


def looking(seen):
    """An objective that writes down what it plans with."""

    class Looking(TwoTerms):
        def plan(self, window, probe):
            tokens = [float(b.num_tokens) for b in window.micro]
            gathered = window.gather(torch.tensor(tokens)).tolist()
            seen.append((window.rank, tokens, gathered, float(window.total(torch.tensor(sum(tokens))))))
            return super().plan(window, probe)

    return Looking()


def three_steps(accelerator):
    """(entries, trained tensors, what was planned with, the loop) after three steps; the second is of one row."""
    seen = []
    loop = looped(looking(seen), lengths=(9, 8, 12, 7, 5), accelerator=accelerator, change=plainly(0.5))
    entries = [loop.step() for _ in range(3)]
    return entries, [p.detach().clone() for p in loop.trainable.parameters()], seen, loop


def test_two_processes_take_the_steps_of_one():
    ((entries, weights, seen, alone),) = Ranks(1).run(three_steps)
    two = Ranks(2).run(three_steps)
    for mine, theirs, _, loop in two:
        for a, b in zip(mine, entries, strict=True):
            keys = a.keys() - {"tokens_per_second", "flops"}
            assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, rel=1e-4)
        torch.testing.assert_close(theirs, weights, atol=1e-6, rtol=1e-4)
        for key in ("step", "tokens", "row_tokens", "supervised", "skipped"):
            assert getattr(loop.progress, key) == getattr(alone.progress, key), key
        assert mine[0]["flops"] == entries[0]["flops"] and mine[1]["flops"] > entries[1]["flops"], (
            "an idle rank works too"
        )
        assert loop.accelerator.calls.count("mean of gradients") == 3, "once in a step"
        assert loop.accelerator.ddp_handler.find_unused_parameters is False
    # Alone nothing but a backward pass is asked for.
    assert alone.accelerator.calls == ["mean of gradients"] * (4 + 1 + 4) and alone.accelerator.ddp_handler is None
    whole, single = (0, [12.0, 9.0, 8.0, 7.0], [12.0, 9.0, 8.0, 7.0], 36.0), (0, [5.0], [5.0], 5.0)
    assert seen == [whole, single, whole]
    # The idle one takes part in the plan of all with nothing, and then plans for itself as if alone.
    first = (0, [12.0, 8.0], [12.0, 8.0, 9.0, 7.0], 36.0)
    assert two[0][2] == [first, single, first]
    second = (1, [9.0, 7.0], [12.0, 8.0, 9.0, 7.0], 36.0)
    assert two[1][2] == [second, (1, [], [5.0], 5.0), single, second]


def test_weights_that_change_from_window_to_window_are_said_to_the_wrapper():
    def change(trainable):
        trainable.reselects = True

    (loop, _) = Ranks(2).run(lambda rank: looped(change=change, accelerator=rank))
    assert loop.accelerator.ddp_handler.find_unused_parameters is True and loop.accelerator.calls == ["prepare_model"]


# --- the whole stage ---


def steps_logged(progress, key="loss"):
    return [e["step"] for e in progress.log if key in e]


def checkpoints(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_run_logs_saves_evaluates_and_tells_in_its_steps(tmp_path):
    told, evaluated = [], []
    loop = looped(
        folder=tmp_path,
        on_step=lambda *given: told.append(given),
        evaluate=lambda: evaluated.append(loop.progress.step) or 1.0 / len(evaluated),
        settings={
            "max_steps": 7,
            "logging_steps": 3,
            "save_steps": 2,
            "eval_steps": 3,
            "load_best": False,
            "save_limit": 2,
        },
    )
    assert loop.run() is loop.progress and loop.progress.step == 7 == loop.total_steps
    assert steps_logged(loop.progress) == [3, 6, 7] == evaluated == steps_logged(loop.progress, "eval_loss")
    assert [e["eval_loss"] for e in loop.progress.log if "eval_loss" in e] == [1.0, 0.5, 1 / 3]
    steps = [(entry["step"], "eval_loss" in entry, p is loop.progress, total) for entry, p, total in told]
    assert steps == [(k, e, True, 7) for k in range(1, 8) for e in (False, True) if not e or k in (3, 6, 7)]
    assert told[3][0] == {"step": 3, "epoch": 3.0, "eval_loss": 1.0} == loop.progress.log[1]
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"] and loop.progress.saved_step == 6
    assert Loop.length(rows_of(LENGTHS), SETTINGS) == 4


def test_a_run_without_keys_for_it_neither_saves_nor_evaluates(tmp_path):
    loop = looped(folder=tmp_path, evaluate=lambda: 1 / 0)
    assert steps_logged(loop.run()) == [1, 2, 3, 4] and checkpoints(tmp_path) == []
    assert looped(settings={"eval_steps": 1}).run().log[-1]["step"] == 4  # nothing evaluates
    assert looped(settings={"save_steps": 1}).run().saved_step == -1  # there is no folder


def evaluated(losses, folder=None, change=lambda trainable: None, **settings):
    """A run of five steps that evaluates after each, with the state after each step."""
    given, states = iter(losses), []

    def evaluate():
        states.append({k: v.clone() for k, v in loop.trainable.state_dict().items()})
        return next(given)

    settings = {"max_steps": 5, "eval_steps": 1, "warmup_fraction": 0.0, **settings}
    loop = looped(folder=folder, evaluate=evaluate, settings=settings, change=change)
    return loop, loop.run(), states


def holds(loop, state):
    return all(torch.equal(v, state[k]) for k, v in loop.trainable.state_dict().items())


@pytest.mark.parametrize(
    "losses, patience, steps, best",
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], 1, 5, 5),
        ([3.0, 2.0, 2.5, 2.5, 2.5], 2, 4, 2),
        ([3.0, 3.0, 2.0, 4.0, 4.0], 2, 5, 3),
        ([3.0, 3.0, 3.0, 3.0, 3.0], 3, 4, 1),
        ([3.0, 4.0, 4.0, 4.0, 4.0], None, 5, 1),
    ],
)
def test_the_best_state_is_kept_and_patience_ends_the_run(losses, patience, steps, best, tmp_path):
    loop, progress, states = evaluated(losses, tmp_path, early_stopping_patience=patience)
    assert (progress.step, progress.best_step, progress.best_loss) == (steps, best, losses[best - 1])
    assert progress.bad_evaluations == steps - best
    assert holds(loop, states[best - 1]) and (best == steps or not holds(loop, states[-1]))
    assert checkpoints(tmp_path / "best") == [f"checkpoint-{best}"] and checkpoints(tmp_path) == ["best"]
    # Only what was trained goes back: the steps, the rate and the moments are those of the end.
    assert loop.progress is progress and progress.saved_step == -1 and not progress.resumed
    assert loop.scheduler.last_epoch == steps
    assert {int(s["step"]) for s in loop.optimizer.state.values()} == {steps}


def test_the_last_state_stays_where_the_best_is_not_asked_for_or_cannot_be_kept(tmp_path):
    losses = [1.0, 2.0, 2.0, 2.0, 2.0]
    for folder, load_best in ((tmp_path, False), (None, True), (None, False)):
        loop, progress, states = evaluated(losses, folder, load_best=load_best)
        assert progress.best_step == 1 and holds(loop, states[-1]) and checkpoints(tmp_path) == []


def test_an_evaluation_draws_by_its_step_and_shifts_no_training():
    drawn = []
    evaluate = lambda: drawn.append(float(torch.rand(()))) or 1.0  # noqa: E731
    runs = [looped(Remembering(), evaluate=evaluate, settings={"eval_steps": k}).run() for k in (1, 2, None)]
    assert drawn[:4] == [*dict.fromkeys(drawn)] and drawn[4:] == drawn[1:4:2]
    losses = [[e["loss"] for e in p.log if "loss" in e] for p in runs]
    assert losses[0] == losses[1] == losses[2]


# --- stops ---


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("cuda"), RuntimeError("can't allocate memory: 9")]
)
def test_where_memory_ends_the_steps_before_are_saved_and_the_keys_are_named(error, tmp_path):
    loop, found = looped(folder=tmp_path), []

    def after_backward():
        if loop.progress.step == 2:
            raise error

    loop.trainable.after_backward = after_backward
    save = loop.save
    loop.save = lambda: found.append([p.grad for p in loop.trainable.parameters()]) or save()
    with pytest.raises(LuthierError, match="out of memory in step 3, .* 14 tokens; .* lower tokens_per_forward"):
        loop.run()
    assert checkpoints(tmp_path) == ["checkpoint-2"] and found == [[None] * len(found[0])] and found[0]


def test_another_error_is_passed_on_and_nothing_is_saved(tmp_path):
    loop = looped(folder=tmp_path)

    def after_backward():
        raise RuntimeError("sizes differ")

    loop.trainable.after_backward = after_backward
    with pytest.raises(RuntimeError, match="sizes differ"):
        loop.run()
    assert checkpoints(tmp_path) == []


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_from_there(tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        looped(folder=tmp_path, stop=lambda: next(asked)).run()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    again = looped(folder=tmp_path)
    assert steps_logged(again.run()) == [1, 2, 3, 4] and again.progress.resumed
    whole = looped()
    assert not whole.run().resumed
    torch.testing.assert_close(list(again.trainable.parameters()), list(whole.trainable.parameters()), atol=0, rtol=0)


def test_a_deadline_is_over_once_the_clock_is_past_it(monkeypatch):
    clock = SimpleNamespace(perf_counter=loop_module.time.perf_counter, monotonic=lambda: 5.0)
    monkeypatch.setattr(loop_module, "time", clock)
    assert looped().run(5.0).step == 4
    with pytest.raises(Interrupted, match="after step 0 of 4"):
        looped().run(4.9)


def test_all_stop_after_the_same_step_once_one_was_asked_to():
    def work(rank):
        loop = looped(accelerator=rank, stop=lambda: rank.process_index == 1 and loop.progress.step == 2)
        with pytest.raises(Interrupted, match="after step 2 of 4"):
            loop.run()
        return loop.progress.step

    assert Ranks(2).run(work) == [2, 2]


# --- checkpoints ---


def remembered(folder, **more):
    return looped(Remembering(), folder=folder, settings={"max_steps": 6, "save_limit": 1}, data_hash="rows", **more)


def flat(value):
    """Numbers of nested tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, (list, tuple)) else value


def all_of(loop):
    """What a resumed run needs, as plain numbers."""
    progress = {k: v for k, v in vars(loop.progress).items() if k != "resumed"}
    owners = {"trainable": loop.trainable, "extra": loop.extra, "objective": loop.objective}
    kept = {k: flat(o.state_dict()) for k, o in owners.items()}
    moments = flat(loop.optimizer.state_dict()), flat(loop.scheduler.state_dict())
    return kept, moments, flat(loop.generators.states), progress


def test_a_checkpoint_holds_all_that_a_resumed_run_needs(tmp_path):
    first = remembered(tmp_path)
    for _ in range(3):
        first.step()
        first.save()
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    again = remembered(tmp_path)
    assert all_of(again)[0] != all_of(first)[0]
    assert again.resume() is True and again.progress.resumed
    assert all_of(again) == all_of(first) and again.progress.saved_step == 3
    a, b = again.step(), first.step()
    assert {k: a[k] for k in a if k != "tokens_per_second"} == {k: b[k] for k in b if k != "tokens_per_second"}
    saved = checkpoint.load(tmp_path / "checkpoint-3")
    assert saved["state"]["objective"] == {"number": 9} and saved["state"]["global_step"] == 3
    assert {k.split(".")[0] for k in saved["tensors"]} == {"trainable", "extra", "objective"}


def test_there_is_nothing_to_resume_without_a_folder_or_before_the_first_checkpoint(tmp_path):
    assert looped().resume() is False and looped(folder=tmp_path).resume() is False


def test_a_checkpoint_elsewhere_is_not_the_last_save(tmp_path):
    loop = remembered(tmp_path / "own")
    loop.save(tmp_path / "other")
    assert loop.progress.saved_step == -1 and checkpoints(tmp_path) == ["other"]
    loop.save()
    assert loop.progress.saved_step == 0 and checkpoints(tmp_path) == ["other", "own"]


def test_a_checkpoint_of_other_rows_or_another_method_is_refused(tmp_path):
    loop = remembered(tmp_path)
    loop.save()
    other = remembered(tmp_path)
    other.data_hash = "others"
    with pytest.raises(LuthierError, match="checkpoint-0: was made with other rows than data.train has now"):
        other.resume()
    with pytest.raises(LuthierError, match="checkpoint-0: does not fit this run .*; use --fresh to start over"):
        looped(Remembering(), Lora(rank=4), folder=tmp_path, data_hash="rows").resume()


def test_the_first_process_writes_while_the_others_wait_and_a_new_one_starts_from_the_seed(tmp_path, monkeypatch):
    order, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: order.append("written") or save(*given))

    def write(rank):
        loop = looped(folder=tmp_path, accelerator=rank)
        loop.step()
        wait = rank.wait_for_everyone
        rank.wait_for_everyone = lambda: order.append(rank.process_index) or wait()
        loop.save()
        return loop

    Ranks(2).run(write)
    assert sorted(order[:2]) == [0, 1] and order.count("written") == 1 and order.index("written") in (2, 3)
    assert sorted(x for x in order[2:] if x != "written") == [0, 1]

    def read(rank):
        loop = looped(folder=tmp_path, accelerator=rank)
        before = flat(loop.generators.states)
        assert loop.resume()
        return before, flat(loop.generators.states)

    (_, kept), (before, fresh) = Ranks(2).run(read)
    (saved,) = checkpoint.load(tmp_path / "checkpoint-1")["rng"]["ranks"]
    assert kept == flat(saved) and fresh == before != kept
