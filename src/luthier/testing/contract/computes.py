"""Tests of every compute method: the model is unchanged after every phase, sequences stay apart, and work is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from luthier.compute.base import PHASES, Compute
from luthier.data.batch import collate
from luthier.data.rendering import Renderer
from luthier.inference.generation import generate
from luthier.integrations.own_loop import Loss
from luthier.model.view import ModelView
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import PADDED, SETTINGS, Example, padded_rows, snapshot, states
from luthier.testing.models import batch_of, byte_tokenizer, rows_of, tiny, view_of
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.adapter import Adapter

LENGTHS = (24, 17, 20)  # sequences that are long enough for tokens to be left out
LAYOUTS = ("flat", "padded")


def method_of(compute: Example) -> Compute:
    """The method itself."""
    assert isinstance(compute.method, Compute)
    return compute.method


def in_layout(layout: str) -> ModelView:
    """A tiny model in this layout."""
    view = view_of(layers=4)
    view.layout = layout
    return view


def learning(compute: Example, layout: str, folder: Path | None = None, **more: Any) -> Loop:
    """A loop with this method over long rows."""
    view = in_layout(layout)
    trainable = Adapter(rank=2, init_std=0.05).attach(view)
    settings = SETTINGS.model_copy(update={"adam_eps": 1e-5, **more.pop("settings", {})})
    rows = rows_of(LENGTHS, answer=9)
    return Loop(
        view, rows, trainable, Sft(), settings, compute=method_of(compute), folder=folder, data_hash="c", **more
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_every_phase_the_model_is_as_it_was(compute: Example, layout: str) -> None:
    """Exactly, after a normal end, after an error and after a nested phase; or the layout is refused by name."""
    method, view, batch = method_of(compute), in_layout(layout), batch_of(LENGTHS)
    view.module.train()
    before, plain = snapshot(view), states(view, batch)
    for phase in PHASES:
        if layout not in method.traits.layouts and phase in method.phases:
            with pytest.raises(LuthierError, match=layout), method.patch(view, phase):
                pass
            assert snapshot(view) == before
            continue
        with pytest.raises(ZeroDivisionError), method.patch(view, phase):
            with method.patch(view, "score"):
                states(view, batch)
            raise ZeroDivisionError
        assert snapshot(view) == before and torch.equal(states(view, batch), plain), phase
        with method.patch(view, phase):
            Forward(batch, view).nll().sum().backward()
        for p in view.module.parameters():
            p.grad = None
        assert snapshot(view) == before and torch.equal(states(view, batch), plain), phase


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_other_phases_the_model_computes_as_without_the_method(compute: Example, layout: str) -> None:
    """Hidden states and answers are equal to the bit."""
    method, batch, prompts = method_of(compute), batch_of(LENGTHS), [[5, 6, 7] * 6, [9] * 11]
    view, renderer = ModelView(tiny(vocab_size=260, layers=4).eval()), Renderer(byte_tokenizer())
    view.layout = layout
    plain, answers = states(view, batch), generate(view, prompts, renderer, 5)
    view.phases.append(partial(method.patch, view))
    for phase in set(PHASES) - method.phases:
        with view.phase(phase):
            assert torch.equal(states(view, batch), plain), phase
    if "generate" not in method.phases:
        assert generate(view, prompts, renderer, 5) == answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sequence_is_shortened_by_itself(compute: Example, layout: str) -> None:
    """Rows that share a forward pass have the losses and gradients of rows with their own pass; gradients are finite."""
    method = method_of(compute)
    if layout not in method.traits.layouts:
        return
    rows = rows_of(LENGTHS, answer=9)
    together, alone = (_gradients(compute, layout, parts) for parts in ([rows], [[r] for r in rows]))
    assert together[0] == pytest.approx(alone[0], abs=1e-4)
    for a, b in zip(together[1], alone[1], strict=True):
        assert a.isfinite().all() and a.any()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def _gradients(compute: Example, layout: str, parts: list[list[dict[str, Any]]]) -> tuple[list[float], list[Tensor]]:
    """(losses of all supervised tokens, gradients of adapters)."""
    view = in_layout(layout)
    trainable, losses = Adapter(rank=2, init_std=0.05).attach(view), []
    for part in parts:
        with method_of(compute).patch(view, "train"):
            nll = Forward(collate(part), view).nll()
            nll.sum().backward()
        losses += nll.tolist()
    return losses, [p.grad for p in trainable.parameters() if p.grad is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_takes_less_work_and_the_ledger_counts_it(compute: Example, layout: str) -> None:
    """The ledger agrees with torch's own counter."""
    if layout not in method_of(compute).traits.layouts:
        return
    short = learning(compute, layout)
    with FlopCounterMode(display=False) as counter:
        short.step()
    dense = learning(compute, layout)
    dense.view.phases.clear()
    dense.step()
    spent, whole = (sum(loop.progress.flops.values()) for loop in (short, dense))
    assert spent == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert spent < whole, "fewer tokens or pairs in the forward pass, or fewer products in the backward pass"


def test_a_resumed_run_with_a_compute_method_equals_one_without_a_break(compute: Example, tmp_path: Path) -> None:
    layout = min(method_of(compute).traits.layouts)
    whole, asked = learning(compute, layout), iter(range(100))
    whole.run()
    with pytest.raises(Interrupted):
        learning(compute, layout, tmp_path, stop=lambda: next(asked) >= 2).run()
    again = learning(compute, layout, tmp_path)
    again.run()
    assert [e["loss"] for e in again.progress.log] == [e["loss"] for e in whole.progress.log]
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_a_compute_method_in_a_bare_loop(compute: Example) -> None:
    """The loss is that of luthier's forward pass on the same rows; every parameter gets a finite gradient."""
    model = tiny()
    loss = Loss(Sft(), model, compute=method_of(compute))
    with loss.thinned():
        value = loss(PADDED)
        value.backward()
    assert value.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    view = view_of()
    with method_of(compute).patch(view, "train"):
        plain = Forward(collate(padded_rows()), view).nll().mean()
    assert float(value.detach()) == pytest.approx(float(plain.detach()), abs=1e-6)


__all__ = [
    "test_a_compute_method_in_a_bare_loop",
    "test_a_resumed_run_with_a_compute_method_equals_one_without_a_break",
    "test_a_step_takes_less_work_and_the_ledger_counts_it",
    "test_after_every_phase_the_model_is_as_it_was",
    "test_each_sequence_is_shortened_by_itself",
    "test_in_other_phases_the_model_computes_as_without_the_method",
]
