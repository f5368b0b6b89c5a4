"""Sizes of a change by layer, against numbers worked by hand."""

import pytest
import torch

from luthier.inspection import Norms
from luthier.inspection.base import Case
from luthier.inspection.norms import BAR, GAP, OUTSIDE, Size, bars, layer_of, sizes
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.update import Dense, Prompt, Update

A, B, C = "model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.10.a.weight"


def test_sizes_by_hand():
    view = view_of()
    weights = {A: torch.full((2, 2), 2.0), B: torch.full((1, 9), 1.0), C: torch.ones(4), "head": torch.full((1,), 10.0)}
    changes = {A: torch.full((2, 2), 3.0), B: torch.full((1, 9), 4.0), C: torch.zeros(4), "head": torch.ones(1)}
    found = sizes(Update(view.base, (Dense(changes),)), weights)
    assert [s.layer for s in found] == ["block 0", "block 10", OUTSIDE]
    assert found[0].change == pytest.approx((4 * 9 + 9 * 16) ** 0.5)
    assert found[0].relative == pytest.approx(((4 * 9 + 9 * 16) / (4 * 4 + 9)) ** 0.5)
    assert found[1][1:] == (0.0, 0.0) and found[2][1:] == (1.0, pytest.approx(0.1))


def test_parts_on_one_tensor_are_added_before_they_are_measured():
    up, down = Dense({A: torch.ones(3)}), Dense({A: -torch.ones(3)})
    assert sizes(Update(view_of().base, (up, down)), {A: torch.ones(3)})[0].change == 0.0


def test_blocks_come_in_their_order():
    names = [f"model.layers.{i}.x.weight" for i in (10, 2, 0)]
    found = sizes(
        Update(view_of().base, (Dense(dict.fromkeys(names, torch.ones(1))),)), dict.fromkeys(names, torch.ones(1))
    )
    assert [s.layer for s in found] == ["block 0", "block 2", "block 10"] and layer_of("lm_head.weight") == OUTSIDE


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
    assert "&lt;b&gt;" in bars(
        {"<b>": sizes(Update(view.base, (Dense(changes),)), dict(view.module.named_parameters())), "x": []}
    )


def test_what_is_no_difference_of_weights_is_refused():
    view = view_of()
    with pytest.raises(LuthierError, match=r"inspect.norms: mine holds parts .* \(prompt\)"):
        Norms().inspect(Case(view, {"mine": Update(view.base, (Prompt(torch.zeros(2, 32)),))}))


def test_a_picture_of_no_change_has_bars_of_no_width():
    assert 'width="0.0"' in bars({"mine": [Size("block 0", 0.0, 0.0)]}) and "<rect" not in bars({"mine": []})
