"""grad-transformer's exact checks on packing, order and chart; numbers in names are the sheet's."""

import random
from functools import cache

import pytest
import torch

from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora
from luthier.update import Update
from luthier.update.packing import factor_deltas, from_deltas, kinds, pack, slots, unpack, widths


def trained(seed=0, rows_seed=0, targets=("q_proj", "v_proj")):
    view = view_of()
    trainable = Lora(rank=2, alpha=32, targets=targets, seed=seed).attach(view)
    loop = Loop(view, rows_of(seed=rows_seed), trainable, Sft(), TrainSettings(max_steps=2, batch_size=4))
    for _ in range(2):
        loop.step()
    return view, trainable


@cache
def update_of(**fields):
    return trained(**fields)[1].update()


def test_1_round_trip_is_exact_and_order_free():
    update = update_of()
    values = factor_deltas(update.parts[0], update.chart)
    packed = pack(values)
    shapes = {k: tuple(t.shape) for k, t in values.items()}
    back = unpack(packed.rows, shapes)
    assert back.keys() == values.keys() and all(torch.equal(back[k], values[k]) for k in values)
    shuffled = list(values.items())
    random.Random(0).shuffle(shuffled)
    assert torch.equal(pack(dict(shuffled)).rows, packed.rows)
    assert torch.equal(update.coordinates(), packed.rows)
    other = update_of(rows_seed=1)
    assert not torch.equal(other.coordinates(), update.coordinates())


@pytest.mark.parametrize(("hidden", "kv", "layers", "width"), [(2048, 256, 36, 12800), (3584, 512, 28, 22528)])
def test_1_widths_of_the_two_published_shapes(hidden, kv, layers, width):
    shapes = {}
    for i in range(layers):
        name = f"model.layers.{i}.self_attn"
        shapes |= {f"a.{name}.q_proj.weight": (2, hidden), f"b.{name}.q_proj.weight": (hidden, 2)}
        shapes |= {f"a.{name}.v_proj.weight": (2, hidden), f"b.{name}.v_proj.weight": (kv, 2)}
    order = slots(shapes)
    assert set(widths(order).values()) == {width}
    assert [s.layer for s in order] == sorted(s.layer for s in order)  # layer 10 comes after 9
    first = [s.key.rpartition("self_attn.")[0][:2] + s.key.rpartition("self_attn.")[2] for s in order[:4]]
    assert first == ["a.q_proj.weight", "b.q_proj.weight", "a.v_proj.weight", "b.v_proj.weight"]


def test_names_are_ordered_by_all_of_their_letters():
    shapes = {f"{factor}.{name}.0.w.weight": (1, 1) for factor in "ba" for name in ("za", "ab", "zb")}
    order = [f"{s.key[0]} {s.key[2:4]}" for s in slots(shapes)]
    assert order == ["a ab", "b ab", "a za", "b za", "a zb", "b zb"]


def test_unequal_layers_are_padded_and_masked():
    values = {
        "a.m.0.x.weight": torch.ones(2, 3),
        "b.m.0.x.weight": torch.ones(4, 2),
        "a.m.1.x.weight": torch.ones(2, 2),
    }
    packed = pack(values)
    assert packed.rows.shape == (2, 14) and packed.mask.sum(1).tolist() == [14, 4]
    assert bool((packed.rows[~packed.mask] == 0).all())
    back = unpack(packed.rows, {k: tuple(t.shape) for k, t in values.items()})
    assert all(torch.equal(back[k], values[k]) for k in values)


def test_2_zero_update_changes_nothing_and_the_true_one_reproduces_the_run():
    view, trainable = trained()
    batch = batch_of()
    live = view.trace(batch).hidden[-1].detach()
    update = trainable.update()
    trainable.detach()
    base = view.trace(batch).hidden[-1].detach()
    values = factor_deltas(update.parts[0], update.chart)
    scale = update.parts[0].scale
    zero = from_deltas({k: torch.zeros_like(t) for k, t in values.items()}, update.chart, scale)
    with Update(update.base, (zero,)).bind(view):
        assert torch.equal(view.trace(batch).hidden[-1], base)
    rows = pack(values).rows
    again = from_deltas(unpack(rows, {k: tuple(t.shape) for k, t in values.items()}), update.chart, scale)
    with Update(update.base, (again,)).bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-5, rtol=0)


def test_9_another_start_has_another_digest():
    charts = [trained(seed=s)[1].update().chart for s in (0, 0, 1)]
    assert charts[0].digest == charts[1].digest != charts[2].digest


def test_bad_input():
    update = update_of()
    values = factor_deltas(update.parts[0], update.chart)
    shapes = {k: tuple(t.shape) for k, t in values.items()}
    with pytest.raises(ValueError, match="these shapes need"):
        unpack(pack(values).rows[:2], shapes)
    broken = {**values, next(iter(values)): torch.full_like(next(iter(values.values())), float("nan"))}
    with pytest.raises(ValueError, match="not finite"):
        pack(broken)
    wider = update_of(targets=("q_proj", "k_proj"))
    with pytest.raises(ValueError, match="other matrices than the chart"):
        factor_deltas(wider.parts[0], update.chart)
    with pytest.raises(TypeError, match="coordinates need"):
        (2.0 * update).coordinates()
    with pytest.raises(ValueError, match="lies in no block"):
        pack({"a.lm_head.weight": torch.ones(2, 2)})


def test_kinds_say_which_factor_a_coordinate_belongs_to():
    shapes = {
        "a.m.0.q.weight": (2, 3), "b.m.0.q.weight": (4, 2), "a.m.1.q.weight": (2, 3), "b.m.1.q.weight": (2, 2),
    }  # fmt: skip
    found = kinds(shapes)
    ones = {k: torch.full(s, float(k[0] == "b")) for k, s in shapes.items()}
    packed = pack(ones)
    assert found.tolist() == [6 * [0] + 8 * [1], 6 * [0] + 4 * [1] + 4 * [-1]]
    assert torch.equal(found >= 0, packed.mask)
    assert torch.equal(found[packed.mask].float(), packed.rows[packed.mask])
