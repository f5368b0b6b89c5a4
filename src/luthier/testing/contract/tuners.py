"""Tests that every tuner must pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.data.batch import IGNORE, collate
from luthier.method import Facts
from luthier.model.view import ModelView
from luthier.objectives.base import Forward, Term
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.window import Window
from luthier.support.errors import LuthierError
from luthier.tasks.classification import Classification
from luthier.testing.contract.examples import (
    CONSTANT,
    NOTHING,
    PLAIN,
    SETTINGS,
    STEPS,
    Example,
    Four,
    attached,
    base_in,
    loop_of,
    losses,
    losses_of,
    on_a_gpu,
    resumed_equals_whole,
    states,
    view_in,
    whole_run,
)
from luthier.testing.models import batch_of, labelled_rows, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.base import Tuner, with_head
from luthier.update.files import load, save_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_back_the_base_bit_for_bit(tuner: Example, dtype: torch.dtype) -> None:
    view = view_in(dtype)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    flags = {n: p.requires_grad for n, p in view.module.named_parameters()}
    attached(tuner, view).detach()
    after = dict(view.module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n], p) and p.requires_grad == flags[n] and p.grad is None for n, p in after.items())
    assert not view.input_hooks and not any("forward" in vars(m) for m in view.module.modules())


def test_the_saved_update_in_a_fresh_base_gives_the_same_states(tuner: Example, tmp_path: Path) -> None:
    view, batch = view_of(), batch_of()
    trainable = attached(tuner, view)
    view.module.eval()
    live = states(view, batch)
    assert torch.equal(live, states(base_in(torch.float32), batch)) != tuner.trains
    update = trainable.update()
    save_update(update, tmp_path, view)
    fresh = view_of()
    with load(tmp_path).bind(fresh):
        torch.testing.assert_close(states(fresh, batch), live, atol=2e-5, rtol=1e-4)
    assert update.linear == type(tuner.method).traits.linear or not tuner.trains


@pytest.mark.parametrize("kind", ["llama-classifier", "gpt2-classifier", "bert-classifier"])
def test_a_task_head_is_learnt_or_refused_by_check(tuner: Example, kind: str, tmp_path: Path) -> None:
    learns_a_task_head(tuner, kind, tmp_path)


def learns_a_task_head(tuner: Example, kind: str, folder: Path) -> None:
    """Every step trains the head, a resumed run equals one without a break, and the saved update gives the same logits on a
    base with another new head. Or else `check` refuses this classifier with a sentence.
    """
    view, rows = view_of(kind), labelled_rows()
    closure = "closure" in tuner.method.traits.needs
    settings = SETTINGS.model_copy(
        update={"tokens_per_forward": 20, **(CONSTANT if closure else {"warmup_fraction": 0.0})}
    )
    facts = Facts(
        Classification.key(), view.layout, STEPS, 4, len(rows), view.module.config, settings, anatomy=view.anatomy
    )
    if refusals := tuner.method.check(facts):
        assert all(" " in p.what for p in refusals)
        return

    def loop_on(view: ModelView) -> Loop:
        assert isinstance(tuner.method, Tuner)
        trainable = with_head(tuner.method.attach(view, total_steps=STEPS), view.anatomy.task_head)
        return Loop(view, rows, trainable, Sft(), settings, folder=folder / "stopped", data_hash="contract")

    def logits(view: ModelView) -> Tensor:
        view.module.eval()
        return Forward(collate(rows), view).logits().detach()

    loop = loop_on(view)
    heads = {n: view.weight(n).detach().clone() for n in view.anatomy.task_head}
    losses = [loop.step()["loss"]]
    loop.save()
    assert all(not torch.equal(view.weight(n), t) for n, t in heads.items())
    losses.append(loop.step()["loss"])
    live, update = logits(view), loop.trainable.update()
    resumed = loop_on(view_of(kind))
    assert resumed.resume() and resumed.step()["loss"] == losses[1] != losses[0]
    assert torch.equal(logits(resumed.view), live)
    save_update(update, folder, view)
    fresh = view_of(kind)
    with torch.no_grad():
        for n in heads:
            fresh.weight(n).normal_()
    with load(folder).bind(fresh):
        torch.testing.assert_close(logits(fresh), live, atol=2e-5, rtol=1e-4)
    loop.trainable.detach()
    assert all(torch.equal(view.weight(n), t) for n, t in heads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_update_the_model_is_the_base(tuner: Example, dtype: torch.dtype) -> None:
    """Inside the scope it has the bits of the base, and after it the bits from before; also nested, and after an error."""
    view, batch = view_in(dtype), batch_of()
    base = states(base_in(dtype), batch)
    attached(tuner, view)
    view.module.eval()
    tuned = states(view, batch)
    with view.without_update():
        assert torch.equal(states(view, batch), base)
        with view.without_update():
            assert torch.equal(states(view, batch), base)
        assert torch.equal(states(view, batch), base)
    assert torch.equal(states(view, batch), tuned) and torch.equal(tuned, base) != tuner.trains
    with pytest.raises(ZeroDivisionError), view.without_update():
        raise ZeroDivisionError
    assert torch.equal(states(view, batch), tuned)


def test_use_of_the_base_during_training_changes_nothing(tuner: Example) -> None:
    """The base is used before each step, and between the forward and the backward pass of every micro-batch."""
    if not tuner.trains:
        return
    looking, plain = loop_of(tuner, Example(Looking())), whole_run(tuner, PLAIN)
    looking.run()
    assert losses_of(looking) == losses_of(plain)
    mine, theirs = looking.trainable.state_dict(), plain.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    pairs = zip(looking.view.module.parameters(), plain.view.module.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


class Looking(Sft):
    """The usual loss, which also compares the base with a fresh one at every opportunity."""

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        with probe.quiet():
            probe.view.module.train()
            look(probe.forward(window.micro[0]))
        with probe.view.without_update():
            scored = probe.scores(window.micro)[0].nll
            names = [n for n in probe.view.anatomy.parameters if n.endswith("norm.weight")]
            probe.gradients(window.micro, names)
        with probe.quiet(), probe.view.without_update():
            assert torch.equal(probe.forward(window.micro[0]).scores().nll, scored)
        return super().plan(window, probe)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        if fwd.view.attached.left_out:  # this computes the gradient of the base
            return super().loss(fwd)
        look(Forward(fwd.batch, fwd.view))
        terms, tuned = super().loss(fwd), fwd.hidden()
        look(fwd)
        assert fwd.hidden() is tuned
        return terms


def look(fwd: Forward) -> None:
    """Compare the base under a tuner with a fresh one."""
    view, fresh = fwd.view, Forward(fwd.batch, base_in(fwd.view.dtype))
    mode = view.module.training
    with view.without_update():
        assert not view.module.training
        assert torch.equal(fwd.hidden(), fresh.hidden()) and torch.equal(fwd.scores().nll, fresh.scores().nll)
    assert view.module.training == mode


def test_same_seed_same_numbers(tuner: Example) -> None:
    if not tuner.trains:
        assert isinstance(tuner.method, Tuner) and not list(tuner.method.attach(view_of()).parameters())
        with pytest.raises(LuthierError, match="nothing trains"):
            loop_of(tuner, PLAIN)
        return
    again = loop_of(tuner, PLAIN)
    assert [again.step()["loss"] for _ in range(3)] == losses_of(whole_run(tuner, PLAIN))[:3]


def test_a_resumed_tuner_equals_one_without_a_break(tuner: Example, tmp_path: Path) -> None:
    if tuner.trains:
        resumed_equals_whole(tuner, PLAIN, tmp_path)


@on_a_gpu
def test_a_tuner_trains_on_a_gpu_as_on_the_cpu(tuner: Example) -> None:
    if tuner.trains:
        assert losses(tuner, PLAIN, "cuda") == pytest.approx(losses(tuner, PLAIN, "cpu"), rel=1e-3)


def test_a_tuner_in_a_bare_loop(plain_tuner: Example) -> None:
    """A plain transformers model in a plain loop: nothing of luthier but the tuner."""
    model, batch = tiny().eval(), batch_of((9,), answer=5)
    ids = batch.ids.unsqueeze(0)
    labels = ids.clone()
    labels[:, :4] = IGNORE
    assert isinstance(plain_tuner.method, Tuner)
    tuned = plain_tuner.method.attach(model, total_steps=4)
    optimizer = tuned.optimizer(
        tuned.groups(), lambda groups: torch.optim.AdamW([p for g in groups for p in g.params], lr=1e-2)
    )
    losses = []
    for _ in range(4):
        tuned.before_window(*NOTHING)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        tuned.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        tuned.after_step(NOTHING[0])
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert tuned.update().parts


def test_a_tuner_under_transformers_trainer(plain_tuner: Example, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from luthier.integrations.own_loop import Tuning

    model = tiny()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert isinstance(plain_tuner.method, Tuner)
    tuned = plain_tuner.method.attach(model, total_steps=4)
    optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2))
    trainer = Trainer(model, arguments, train_dataset=Four(), optimizers=(optimizer, None), callbacks=[Tuning(tuned)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert tuned.update().parts


__all__ = [
    "test_a_resumed_tuner_equals_one_without_a_break",
    "test_a_task_head_is_learnt_or_refused_by_check",
    "test_a_tuner_in_a_bare_loop",
    "test_a_tuner_trains_on_a_gpu_as_on_the_cpu",
    "test_a_tuner_under_transformers_trainer",
    "test_detach_gives_back_the_base_bit_for_bit",
    "test_same_seed_same_numbers",
    "test_the_saved_update_in_a_fresh_base_gives_the_same_states",
    "test_use_of_the_base_during_training_changes_nothing",
    "test_without_the_update_the_model_is_the_base",
]
