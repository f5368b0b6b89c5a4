"""Sizes of a change by layer, against numbers worked by hand."""

import pytest
import torch

from luthier.inspection import Norms
from luthier.inspection.base import BAR, GAP, OUTSIDE, Case
from luthier.inspection.norms import picture, sizes
from luthier.testing.models import view_of
from luthier.update import Dense, Replace, Update

A, B, C = "model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.10.a.weight"


def test_sizes_by_hand():
    weights = {A: torch.full((2, 2), 2.0), B: torch.full((1, 9), 1.0), C: torch.ones(4), "head": torch.full((1,), 10.0)}
    changes = {A: torch.full((2, 2), 3.0), B: torch.full((1, 9), 4.0), C: torch.zeros(4), "head": torch.ones(1)}
    found = sizes(changes.items(), weights)
    assert [s.layer for s in found] == ["block 0", "block 10", OUTSIDE]
    assert found[0].change == pytest.approx((4 * 9 + 9 * 16) ** 0.5)
    assert found[0].relative == pytest.approx(((4 * 9 + 9 * 16) / (4 * 4 + 9)) ** 0.5)
    assert found[1][1:] == (0.0, 0.0) and found[2][1:] == (1.0, pytest.approx(0.1))


def test_the_sentence_names_the_largest_and_the_picture_is_to_scale():
    view = view_of()
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    changes = {n: view.weight(n).detach() * share for n, share in zip(names, (0.1, 0.4, 0.2), strict=True)}
    finding = Norms(most=1).inspect(Case(view, {"mine": Update(view.base, (Dense(changes),))}))
    assert finding.says == "mine changes most, as a share of the weights: block 1 (40.00%)."
    assert [round(r[3], 6) for r in finding.rows] == [0.1, 0.4, 0.2]
    assert (
        'width="105.0"' in finding.picture and 'width="420.0"' in finding.picture and 'width="210.0"' in finding.picture
    )
    assert [f'y="{i * (BAR + GAP)}" width' in finding.picture for i in range(4)] == [True, True, True, False]
    weights = dict(view.module.named_parameters())
    assert ">&lt;b&gt;, block 2</text>" in picture({"<b>": sizes(changes.items(), weights), "x": []})
    assert ">block 2</text>" in finding.picture and ">40.00%</text>" in finding.picture


def test_an_update_that_changes_nothing_has_sizes_of_zero_and_says_so():
    view = view_of()
    name = "model.layers.1.mlp.up_proj.weight"
    same = Update(view.base, (Dense({name: torch.zeros_like(view.weight(name))}),))
    finding = Norms().inspect(Case(view, {"mine": same, "none": Update(view.base, ())}))
    assert finding.says == "mine changes no weight. none changes no weight."
    assert finding.rows == [("mine", "block 1", 0.0, 0.0)] and 'width="0.0"' in finding.picture
    assert Norms().inspect(Case(view, {"none": Update(view.base, ())})).picture == ""


def test_a_new_task_head_is_left_out_and_said():
    view = view_of("llama-classifier")
    name = "model.layers.1.mlp.up_proj.weight"
    delta, head = Dense({name: view.weight(name).detach() * 0.5}), Replace({"score.weight": torch.ones(3, 32)})
    finding = Norms().inspect(Case(view, {"mine": Update(view.base, (delta, head))}))
    assert finding.says == (
        "mine changes most, as a share of the weights: block 1 (50.00%). The new task head of mine is left out."
    )
    assert [r[:2] for r in finding.rows] == [("mine", "block 1")]
