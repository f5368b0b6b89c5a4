"""Tests that every objective must pass."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.objectives.base import Objective
from luthier.step.lab import Lab
from luthier.testing.contract.examples import (
    DROPPING,
    PADDED,
    SMALL,
    STEPS,
    Example,
    loop_of,
    losses,
    on_a_gpu,
    padded_rows,
    resumed_equals_whole,
)
from luthier.testing.models import tiny, view_of
from luthier.tuners.base import Stats
from luthier.tuners.full import Full


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_packed_alone_and_padded_give_the_same_loss(objective: Example, layout: str) -> None:
    packed = first_losses(objective, layout, 10_000)
    assert packed == pytest.approx(first_losses(objective, layout, 1), abs=1e-5)
    assert packed == pytest.approx(first_losses(objective, "flat", 10_000), abs=1e-5)


@cache
def first_losses(objective: Example, layout: str, limit: int) -> tuple[float | None, ...]:
    """Losses of the first steps; None for a step that was skipped.

    limit  tokens of one forward pass
    """
    view = view_of()
    view.layout = layout
    loop = loop_of(SMALL, objective, view, tokens_per_forward=limit, adam_eps=1e-5)
    return tuple(loop.step().get("loss") for _ in range(2))


def test_an_objective_in_a_bare_loop_equals_luthiers_own_step(objective: Example) -> None:
    """The loss and the gradients are those of a step of luthier's loop on the same rows."""
    from luthier.integrations.own_loop import Loss

    assert isinstance(objective.method, Objective)
    model, lab = tiny(), Lab(sets={n: list(r) for n, r in objective.pools.items()})
    loss = Loss(objective.method, model, total_steps=STEPS, lab=lab)
    value = loss(PADDED if objective.inputs is None else dict(objective.inputs))
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    view, same = view_of(), replace(objective, rows=padded_rows() if objective.inputs is None else objective.rows)
    loop = loop_of(Example(Full()), same, view, max_grad_norm=1e9, shuffle=False)
    seen: dict[str, Tensor] = {}

    def note(stats: Stats) -> bool:
        seen.update({n: p.grad.clone() for n, p in view.module.named_parameters() if p.grad is not None})
        return True

    loop.trainable.before_step = note  # type: ignore[method-assign]
    assert loop.step()["loss"] == pytest.approx(float(value.detach()), abs=1e-6)
    assert seen.keys() == gradients.keys()
    assert all(torch.allclose(seen[n], gradients[n], atol=1e-6) for n in seen)


def test_a_resumed_objective_equals_one_without_a_break(objective: Example, tmp_path: Path) -> None:
    resumed_equals_whole(DROPPING, objective, tmp_path)


@on_a_gpu
def test_an_objective_trains_on_a_gpu_as_on_the_cpu(objective: Example) -> None:
    assert losses(SMALL, objective, "cuda") == pytest.approx(losses(SMALL, objective, "cpu"), rel=1e-3)


__all__ = [
    "test_a_resumed_objective_equals_one_without_a_break",
    "test_an_objective_in_a_bare_loop_equals_luthiers_own_step",
    "test_an_objective_trains_on_a_gpu_as_on_the_cpu",
    "test_packed_alone_and_padded_give_the_same_loss",
]
