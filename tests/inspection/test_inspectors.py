"""What inspectors share: blocks and their order, summed differences, pictures."""

import re

import pytest
import torch

from luthier.inspection import Norms
from luthier.inspection.base import BAR, GAP, LETTER, OUTSIDE, WIDTH, Finding, bars, in_order, layer_of
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.update import Dense, LowRank, Prompt, Update

A, B = "model.layers.0.a.weight", "model.layers.0.b.weight"


def test_blocks_by_number_and_what_is_outside_last():
    assert [layer_of(n) for n in ("model.layers.12.mlp.weight", "h.0.ln", "lm_head.weight", "layer2.x")] == [
        "block 12", "block 0", OUTSIDE, OUTSIDE,
    ]  # fmt: skip
    assert in_order([OUTSIDE, "block 10", "block 9", "block 0"]) == ["block 0", "block 9", "block 10", OUTSIDE]


def test_differences_are_summed_over_parts_and_come_one_at_a_time():
    low = LowRank({A: torch.tensor([[1.0, 2.0]])}, {A: torch.tensor([[1.0], [3.0]])}, {A: 2.0})
    dense = Dense({B: torch.ones(2), A: torch.full((2, 2), 0.5)})
    update = Update(view_of().base, (low, dense))
    found = list(Norms.differences("mine", update))
    assert [n for n, _ in found] == [B, A], "a difference comes as soon as its last part is added"
    assert found[1][1].tolist() == [[2.5, 4.5], [6.5, 12.5]] and found[0][1].tolist() == [1.0, 1.0]
    assert {n: t.tolist() for n, t in found} == {n: t.tolist() for n, t in update.dense().items()}


def test_a_part_that_is_not_a_difference_is_refused_before_any_work():
    prompt = Update(view_of().base, (Dense({B: torch.ones(2)}), Prompt(torch.zeros(2, 32))))
    with pytest.raises(LuthierError, match=r"inspect.norms: mine holds parts that are not differences .* \(prompt\)"):
        Norms.differences("mine", prompt)


def parts_of(svg):
    """(x and width of each bar, texts) of a picture."""
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    return [tuple(map(float, f)) for f in found], re.findall(r">([^<>]*)</text>", svg)


def test_bars_are_to_scale_with_names_before_them_and_numbers_behind():
    svg = bars(
        [("one", 1.0), ("three & more", 4.0), ("none", 0.0)], "counts <of> things", lambda v: f"{v:.0f} <", "count"
    )
    left, step = LETTER * len("three & more") + GAP, BAR + GAP
    found, texts = parts_of(svg)
    assert found == [(left, 0, WIDTH / 4), (left, step, WIDTH), (left, 2 * step, 0)]
    assert texts == ["one", "1 &lt;", "three &amp; more", "4 &lt;", "none", "0 &lt;"]
    assert f'viewBox="0 0 {left + WIDTH + 80} {3 * step}"' in svg and 'class="count"' in svg
    assert 'aria-label="counts &lt;of&gt; things"' in svg and svg.endswith("</svg>")
    behind = re.findall(r'<text x="([\d.]+)" y="(\d+)"', svg)
    assert [(float(x), int(y)) for x, y in behind] == [
        at for i, (x, y, width) in enumerate(found) for at in ((0.0, i * step + BAR - 3), (x + width + 6, i * step + BAR - 3))
    ]  # fmt: skip


def test_bars_of_nothing_of_zeros_and_of_infinite_numbers():
    assert parts_of(bars([], "t", str, "k")) == ([], []) and f'viewBox="0 0 {GAP + WIDTH + 80} 0"' in bars(
        [], "t", str, "k"
    )
    assert [w for *_, w in parts_of(bars([("a", 0.0)], "t", str, "k"))[0]] == [0.0]
    widths = [w for *_, w in parts_of(bars([("a", float("inf")), ("b", 2.0), ("c", 1.0)], "t", str, "k"))[0]]
    assert widths == [WIDTH, WIDTH, WIDTH / 2]


def test_bars_shorter_than_one_are_to_scale():
    widths = [w for *_, w in parts_of(bars([("a", 0.25), ("b", 0.125)], "t", str, "k"))[0]]
    assert widths == [WIDTH, WIDTH / 2]


def test_cells_are_short_numbers_and_words_as_they_are():
    assert [Finding.shown(v) for v in (0.123456, 7, "block 1")] == ["0.1235", "7", "block 1"]
