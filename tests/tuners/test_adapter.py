"""LiST's linear adapters: where they sit, and that they fold away exactly (more in tests/pipelines/test_list.py)."""

import pytest
import torch

from luthier.kernels.linear import folded
from luthier.testing.models import batch_of, view_of
from luthier.tuners import Adapter


def test_two_a_block_on_the_output_projections():
    view = view_of()
    trainable = Adapter(rank=4).attach(view)
    assert {n.rpartition(".")[2] for n in trainable.a} == {"o_proj", "down_proj"} and len(trainable.a) == 6
    width = view.anatomy.hidden_size
    assert {id(p) for p in view.module.parameters() if p.requires_grad} == {id(p) for p in trainable.parameters()}
    assert sum(p.numel() for p in trainable.parameters()) == 3 * 2 * 2 * 4 * width


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_folded_into_the_projection_it_is_the_same_model(kind):
    view, batch = view_of(kind), batch_of()
    trainable = Adapter(rank=4, init_std=0.2).attach(view)
    live, merged = view.trace(batch).hidden[-1].detach(), trainable.merged_weights()
    trainable.detach()
    with torch.no_grad():
        for name, value in merged.items():
            view.weight(name).copy_(value)
    torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-5, rtol=1e-4)


def test_it_stands_on_the_output_before_the_residual():
    """The block's own forward with h + B (A h) written out at both places."""
    view, batch = view_of(), batch_of((9,))
    trainable = Adapter(rank=4, init_std=0.2).attach(view)
    plain = view_of()
    for name, a in trainable.a.items():
        b = trainable.b[name]
        plain.module.get_submodule(name).register_forward_hook(lambda m, x, h, a=a, b=b: h + h @ a.T @ b.T)
    with torch.no_grad():
        ours, wanted, bare = (v.trace(batch).hidden[-1] for v in (view, plain, view_of()))
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
    assert float((wanted - bare).abs().max()) > 0.1


def test_both_matrices_start_at_the_stated_deviation_and_differ():
    trainable = Adapter(rank=64, init_std=0.03).attach(view_of())
    every = [p.detach() for p in trainable.parameters()]
    assert all(float(p.std()) == pytest.approx(0.03, rel=0.06) for p in every)
    name, other = list(trainable.a)[:2]
    assert not torch.equal(trainable.a[name], trainable.b[name].T)
    assert not torch.equal(trainable.a[name], trainable.a[other]), "keyed by layer"
    assert not torch.equal(every[0], next(Adapter(rank=64, init_std=0.03, seed=1).attach(view_of()).parameters()))


def test_folding_by_hand():
    w, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0])
    down, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5], [2.0]])
    weight, bias = folded(w, b, down, up)
    assert weight.tolist() == [[1.5, 3.0], [5.0, 8.0]] and bias.tolist() == [1.5, 1.0]


@pytest.mark.parametrize("fields", [{"rank": 0}, {"init_std": -1.0}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Adapter(**fields)
