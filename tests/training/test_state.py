"""What a run keeps beside its weights: the objective's state and the generators. Resumed equals uninterrupted to the bit."""

import json
import logging
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr

from helpers.commands import luthier, write
from luthier.objectives.base import Objective, Term, count
from luthier.objectives.otr import Otr
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.rng import Generators, Streams, generator_states, set_generators
from luthier.testing.models import rows_of, view_of
from luthier.training import checkpoint
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.lora import Lora

SETTINGS = TrainSettings(max_steps=6, batch_size=4, learning_rate=1e-2, tokens_per_forward=20)


class Averaging(Objective):
    """Divides the loss by a moving average of itself."""

    _average: torch.Tensor | None = PrivateAttr(None)
    _steps: int = PrivateAttr(0)

    def plan(self, window, probe):
        scored = probe.scores(window.micro)
        sums = torch.stack([s.nll.sum() for s in scored]).sum(), torch.tensor(float(sum(len(s.nll) for s in scored)))
        now = window.total(sums[0]) / window.total(sums[1])
        self._average = now if self._average is None else 0.5 * self._average + 0.5 * now
        self._steps += 1
        by = self._steps / self._average
        micro = [b.with_columns(row={"by": by.expand(b.num_sequences)}) for b in window.micro]
        return window.with_micro(micro), count(micro)

    def loss(self, fwd) -> Mapping[str, Term]:
        return {"loss": Term(fwd.nll().sum() * fwd.batch.row["by"][0], "tokens")}

    def state_dict(self):
        return {"steps": self._steps} | ({} if self._average is None else {"average": self._average})

    def load_state_dict(self, state):
        self._steps, self._average = int(state["steps"]), state.get("average")


class Drawing(Objective):
    """Scales the loss by what the global generators of three libraries give."""

    def plan(self, window, probe):
        drawn = random.random() + np.random.rand() + torch.rand(()) + random.gauss(0, 1) + np.random.normal()
        micro = [b.with_columns(row={"by": drawn.expand(b.num_sequences).float()}) for b in window.micro]
        return window.with_micro(micro), count(micro)

    def loss(self, fwd) -> Mapping[str, Term]:
        return {"loss": Term(fwd.nll().sum() * fwd.batch.row["by"][0], "tokens")}


CASES = {
    "moving-average": (Lora(rank=4), Averaging()),
    "global-draws": (Lora(rank=4), Drawing()),
    "dropout": (Lora(rank=4, dropout=0.3), Sft()),
    "dropout-moving-average": (Lora(rank=4, dropout=0.3), Averaging()),
    "dropout-otr": (Lora(rank=4, dropout=0.3), Otr(draws=8)),
}


def make(name, folder=None, stop=lambda: False, evaluate=None, **changes):
    tuner, objective = CASES[name]
    view = view_of()
    settings = SETTINGS.model_copy(update=changes)
    trainable = tuner.attach(view, total_steps=settings.max_steps)
    return Loop(
        view, rows_of((9, 5, 12, 7, 8, 6)), trainable, objective, settings, folder=folder, stop=stop, evaluate=evaluate
    )  # fmt: skip


def losses(loop, key="loss"):
    return [e[key] for e in loop.progress.log if key in e]


def shaken():
    """Others draw too."""
    random.random(), np.random.rand(7), torch.rand(3)


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted_to_the_bit(name, tmp_path):
    whole = make(name)
    whole.run()
    for at in (1, 2, 1):  # stopped after steps 1, 3 and 4
        asked = iter(range(100))
        with pytest.raises(Interrupted):
            make(name, tmp_path, stop=lambda asked=asked, at=at: next(asked) >= at).run()
        shaken()
    again = make(name, tmp_path)
    again.run()
    assert len(losses(whole)) == 6 and losses(again) == losses(whole)
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", ["dropout", "global-draws"])
def test_what_is_drawn_follows_the_seed_alone_and_other_generators_are_left_as_they_were(name):
    first, second, other = make(name), make(name), make(name, seed=1)
    found = []
    for _ in range(3):  # two runs side by side do not shift each other
        shaken()
        before = generator_states()
        found.append((first.step()["loss"], second.step()["loss"]))
        assert json_of(generator_states()) == json_of(before)
    assert [a for a, _ in found] == [b for _, b in found] and len({a for a, _ in found}) == 3
    other.order = first.order  # the same rows
    assert [other.step()["loss"] for _ in range(3)] != [a for a, _ in found]


def json_of(states):
    return json.dumps(states, default=lambda t: t.tolist())


def test_dropout_is_drawn_anew_each_step_and_for_each_rank():
    loop = make("dropout", learning_rate=1e-12)
    loop.order.rows = lambda step: [0, 1, 2, 3]
    with torch.no_grad():  # at its start the addition is zero, dropped or not
        for b in loop.trainable.b.values():
            b.fill_(0.1)
    assert loop.step()["loss"] != pytest.approx(loop.step()["loss"], abs=1e-4)
    drawn = []
    for rank in (0, 1):
        with Generators(Streams(0), "train", rank).drawing():
            drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


def test_a_checkpoint_holds_every_generator_and_is_read_without_unpickling(tmp_path):
    loop = make("moving-average", tmp_path)
    loop.step()
    loop.save()
    saved = checkpoint.load(tmp_path / "checkpoint-1")
    (of_rank,) = saved["rng"]["ranks"]
    assert of_rank.keys() == {"python", "numpy", "cpu", "cuda"}
    assert json_of(of_rank) == json_of(loop.generators.states)
    assert saved["state"]["objective"] == {"steps": 1}
    assert torch.equal(saved["tensors"]["objective.average"], loop.objective._average)


def test_generators_are_put_back_where_they_were():
    random.gauss(0, 1), np.random.normal()  # each keeps a second number for the next call
    states = generator_states()
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), float(torch.rand(())))  # noqa: E731
    first = draw()
    shaken()
    set_generators(states)
    assert draw() == first


def test_generators_of_gpus_are_kept_and_put_back(monkeypatch):
    devices = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [t.clone() for t in devices])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: devices.__setitem__(device, state))
    states = generator_states()
    assert [t.tolist() for t in states["cuda"]] == [[1, 2], [3, 4]]
    devices[:] = [torch.tensor([9, 9]), torch.tensor([9, 9])]
    set_generators(states)
    assert [t.tolist() for t in devices] == [[1, 2], [3, 4]]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    devices[:] = [torch.tensor([9, 9]), torch.tensor([9, 9])]
    set_generators(states)  # on a machine without them
    assert [t.tolist() for t in devices] == [[9, 9], [9, 9]]


def test_evaluations_draw_the_same_in_a_resumed_run_and_shift_no_training(tmp_path):
    drawn = lambda: float(torch.rand(())) + random.random() + float(np.random.rand())  # noqa: E731
    keys = {"eval_steps": 2, "load_best": False}
    whole = make("dropout", evaluate=drawn, **keys)
    whole.run()
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        make("dropout", tmp_path, stop=lambda: next(asked) >= 3, evaluate=drawn, **keys).run()
    shaken()
    again = make("dropout", tmp_path, evaluate=drawn, **keys)
    again.run()
    assert losses(again, "eval_loss") == losses(whole, "eval_loss") and len(set(losses(whole, "eval_loss"))) == 3
    without = make("dropout")
    without.run()
    assert losses(without) == losses(whole) == losses(again)


def test_two_runs_with_one_objective_begin_alike_and_leave_it_as_it_was():
    ends = []
    for _ in range(2):
        loop = make("moving-average")
        ends.append([loop.step()["loss"] for _ in range(3)])
        assert loop.objective._steps == 3
    assert ends[0] == ends[1] and CASES["moving-average"][1]._steps == 0
    assert loop.objective.fresh() == CASES["moving-average"][1] and loop.objective.fresh()._steps == 0


def test_what_an_objective_trains_beside_the_model_starts_by_the_seed():
    class Head(Sft):
        def extend(self, view, carried=None):
            return torch.nn.Linear(4, 4)

    starts = []
    for seed in (0, 0, 1):
        shaken()
        view = view_of()
        loop = Loop(
            view, rows_of(), Lora(rank=2).attach(view), Head(), SETTINGS.model_copy(update={"seed": seed})
        )  # fmt: skip
        starts.append(loop.extra.weight.detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_resumed_run_remembers_what_it_has_warned_of(tmp_path, caplog):
    def loop():
        view = view_of()
        rows = rows_of((20, 20), answer=10)
        return Loop(view, rows, Lora(rank=2).attach(view), Otr(draws=1), SETTINGS, folder=tmp_path)

    first = loop()
    first.step()
    first.save()
    second = loop()
    second.resume()
    assert second.objective.state_dict() == first.objective.state_dict() and first.objective._seen
    with caplog.at_level(logging.WARNING):
        second.step()  # warns of the step that the first run took
        assert caplog.text.count("hardly ever drawn") == 1
        second.save()
        third = loop()
        third.resume()
        third.step()
    assert caplog.text.count("hardly ever drawn") == 1


def test_two_runs_of_one_recipe_with_dropout_are_the_same(model_folder, tmp_path):
    logs = []
    for name in ("one", "two"):
        recipe = write(
            tmp_path / name, model_folder, tuner={"lora": {"rank": 4, "dropout": 0.1}}, evaluate=[], max_steps=4
        )
        shaken()
        done = luthier("run", recipe, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "out" / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line).get("loss") for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) >= 4
