"""How stages are carried out: what each is given, what it hands on, and what it leaves behind."""

import time

import pytest
import torch

from luthier.method import Facts
from luthier.objectives.base import Term
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.pipelines import Stages, base
from luthier.pipelines.base import Apply, Pipeline, Train, run_pipeline
from luthier.step.lab import Lab
from luthier.step.outcome import Outcome
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Interrupted, Loop
from luthier.tuners import Full, Lora
from luthier.tuners.lift import Lift

BRISK = {
    "max_steps": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup_fraction": 0.0,
    "lr_scheduler_type": "constant",
}
LORA = Lora(rank=4)


def stages(*items):
    return Stages(stages=[{**BRISK, "tuner": LORA, **x} for x in items])


class Beside(Sft):
    """Trains a number beside the model, from 0 or from where an earlier stage left it, towards 1."""

    def extend(self, view, carried=None):
        module = torch.nn.Module()
        module.register_parameter("number", torch.nn.Parameter(torch.zeros(())))
        if carried is not None:
            module.load_state_dict(dict(carried))
        return module

    def loss(self, fwd):
        number = fwd.extra.number
        return {**super().loss(fwd), "number": Term((number - 1).square() * 20.0, "tokens")}


def test_what_trained_beside_the_model_is_carried_where_that_is_asked():
    items = ({"name": "a"}, {"name": "b", "carry": "a"}, {"name": "c"})
    done = run_pipeline(stages(*({"objective": Beside(), **x} for x in items)), view_of(), Lab({"train": rows_of()}))
    number = {n: float(o.beside["number"]) for n, o in done.items()}
    assert number["b"] > 1.5 * number["a"] > 0 and number["c"] == number["a"]
    plain = run_pipeline(stages({"name": "a"}), view_of(), Lab({"train": rows_of()}))
    assert plain["a"].beside is None


def test_every_stage_is_told_of_before_it_begins_and_gets_its_own_settings(tmp_path, monkeypatch):
    told = []

    class Noted(Loop):
        def __init__(self, view, rows, trainable, objective, settings, **kwargs):
            told.append((settings.seed, settings.learning_rate, kwargs["folder"]))
            super().__init__(view, rows, trainable, objective, settings, **kwargs)

    monkeypatch.setattr(base, "Loop", Noted)
    both = stages({"name": "a", "seed": 5}, {"name": "b", "start": "a", "learning_rate": 0.002})
    lab = Lab({"train": rows_of()})
    run_pipeline(both, view_of(), lab, tmp_path, before_stage=lambda s: told.append(s.name))
    assert told == ["a", (5, 0.01, tmp_path / "a"), "b", (0, 0.002, tmp_path / "b")]


def test_a_deadline_stops_a_stage_and_later_ones_never_begin(tmp_path):
    told = []
    both = stages({"name": "a"}, {"name": "b"})
    with pytest.raises(Interrupted):
        run_pipeline(
            both, view_of(), Lab({"train": rows_of()}), tmp_path, deadline=time.monotonic() - 1,
            before_stage=lambda s: told.append(s.name),
        )  # fmt: skip
    assert told == ["a"]


def test_the_end_of_a_stage_is_saved_once(tmp_path, monkeypatch):
    saved, save = [], Loop.save
    monkeypatch.setattr(Loop, "save", lambda self, *a: saved.append(self.progress.step) or save(self, *a))
    lab = Lab({"train": rows_of()})
    run_pipeline(stages({"name": "a"}), view_of(), lab, tmp_path / "at its end")
    run_pipeline(stages({"name": "a", "save_steps": 1}), view_of(), lab, tmp_path / "at each step")
    assert saved == [2, 1, 2]


def classes(count=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (count, 6), generator=generator).tolist()
    return [{"ids": x, "labels": [-100] * 6, "key": str(i), "row": {"label": i % 3}} for i, x in enumerate(ids)]


def test_a_stage_trains_a_task_head_and_hands_it_on():
    view = view_of("bert-classifier")
    before = view.weight("classifier.weight").detach().clone()
    done = run_pipeline(stages({"name": "a"}, {"name": "b", "start": "a"}), view, Lab({"train": classes()}))
    moved = {}
    for name in ("a", "b"):
        with done[name].update.bind(view):
            moved[name] = float((view.weight("classifier.weight") - before).norm())
    assert moved["b"] > 1.2 * moved["a"] > 0
    assert torch.equal(view.weight("classifier.weight"), before)


def test_a_tuner_knows_how_long_its_stage_is():
    seen = []

    class Asked(Lora):
        def attach(self, model, lab=None, total_steps=None):
            seen.append((total_steps, lab.rows("train")[0]["key"]))
            return super().attach(model, lab, total_steps)

    lab = Lab({"train": rows_of()})
    for more in ({}, {"max_steps": None, "epochs": 3, "batch_size": 2}):
        run_pipeline(stages({"name": "a", "tuner": Asked(rank=4), **more}), view_of(), lab)
    assert seen == [(2, "0"), (6, "0")]


def test_a_lab_gives_the_first_rows_of_a_set():
    lab = Lab({"few": rows_of((4, 5, 6)), "other": rows_of((7,))})
    assert lab.batch("few", 2).lengths == (4, 5) and lab.batch("few", 9).lengths == (4, 5, 6)
    assert lab.batch("other", 2).lengths == (7,)


def test_a_stage_is_checked_with_its_own_batch_size_settings_and_neighbours():
    facts = Facts(batch_size=8, task="causal-lm")
    alone = {"batch_size": 1, "objective": QTuning(keep_rows=0.5)}
    found = stages({"name": "a"}, {"name": "b", **alone}).check(facts)
    assert [p.key for p in found] == ["stages.1.objective.keep_rows"]
    assert stages({"name": "a", "objective": QTuning(keep_rows=0.5)}).check(Facts(batch_size=1)) == []
    decay = stages({"name": "a", "tuner": Lift(density=0.1), "weight_decay": 0.1}).check(facts)
    assert {p.key.rpartition(".")[0] for p in decay} == {"stages.0.tuner"}
    seen = []

    class Looks(Full):
        def check(self, facts):
            seen.extend(facts.others)
            return []

    tuner = Looks()
    stages({"name": "a", "tuner": tuner, "objective": QTuning()}).check(facts)
    assert seen == [tuner, QTuning()]


class Merged(Pipeline):
    """Two plain stages, half of each one's change added up by a stage without training, then one under a mask."""

    def next(self, done):
        quick = TrainSettings(max_steps=2, batch_size=4, learning_rate=0.01)
        todo = [
            Train("a", Full(), Sft(), settings=quick), Train("b", Full(), Sft(), settings=quick, data="other"),
            Apply("half", ("a", "b")), Train("c", Masked(), Sft(), start="half", settings=quick),
        ]  # fmt: skip
        return next((s for s in todo if s.name not in done), None)

    def apply(self, stage, view, lab, done):
        a, b = (done[n].update for n in stage.inputs)
        name = view.anatomy.linears[0].module + ".weight"
        mask = torch.zeros_like(view.weight(name), dtype=torch.bool)
        mask[0] = True
        view.module(batch_of().ids[None])  # work that is counted
        return Outcome(stage.name, update=a * 0.5 + b * 0.5, mask={name: mask}, metrics={"members": 2.0})


class Masked(Full):
    """Moves only what the mask of an earlier stage lets move."""

    def attach(self, view, lab=None, total_steps=None):
        ((name, mask),) = lab.outcome("half").mask.items()
        trainable = super().attach(view, lab, total_steps)
        view.weight(name).register_hook(lambda grad: grad * mask)
        return trainable


def test_a_stage_without_training_leaves_an_update_a_mask_and_metrics_to_later_ones():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    lab = Lab({"train": rows_of(), "other": rows_of(seed=5)})
    done = run_pipeline(Merged(), view, lab)
    half = done["half"]
    assert half.metrics == {"members": 2.0} and half.progress.flops["apply"] > 0 and half.progress.seconds > 0
    name = next(iter(half.mask))
    moved = {}
    for stage in ("a", "b", "half"):
        with done[stage].update.bind(view):
            moved[stage] = view.weight(name).detach() - before[name]
    torch.testing.assert_close(moved["half"], (moved["a"] + moved["b"]) / 2, rtol=0, atol=1e-7)
    with done["c"].update.bind(view):
        further = view.weight(name).detach() - before[name] - moved["half"]
    assert float(further[0].abs().min()) > 1e-4 and float(further[1:].abs().max()) < 1e-6
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())
    with pytest.raises(LuthierError, match="no earlier stage is called 'half'; there are none"):
        lab.outcome("half")


def test_rows_that_no_stage_made_are_refused_by_name():
    both = Train("b", Full(), Sft(), data="a")
    with pytest.raises(LuthierError, match="b: trains on the rows of a, which made none"):
        base.rows_of(both, Lab(), {"a": Outcome("a")})


def test_a_pace_scales_every_stage_and_is_not_seen_where_it_is_the_pipelines_own():
    stage = Train("a", Full(), Sft(), settings=TrainSettings(epochs=3.0, batch_size=2, learning_rate=0.1))
    rows = rows_of((5,) * 8)
    own = Loop.length(rows, stage.settings)
    assert own == 12 and base.Pace().of(stage, rows).settings.max_steps is None
    half = base.Pace(length=0.5, learning_rate=3.0).of(stage, rows).settings
    assert half.max_steps == 6 and half.learning_rate == pytest.approx(0.3)
    assert base.Pace(length=0.01).steps(12) == 1 and base.Pace(max_steps=4).steps(12) == 4
    assert [base.Pace().of(stage, rows, save).settings.gradient_checkpointing for save in (False, True)] == [
        False,
        True,
    ]
    done = run_pipeline(
        stages({"name": "a"}, {"name": "b", "max_steps": 8}), view_of(), Lab({"train": rows_of()}), pace=base.Pace(length=0.5)
    )  # fmt: skip
    assert [o.progress.step for o in done.values()] == [1, 4]
