"""The one sparse mechanism: equal to the dense gather bit for bit, and it gives the base back."""

from types import SimpleNamespace

import pytest
import torch

from luthier.data.batch import collate
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import rows_of, tiny, view_of
from luthier.tuners.sparse import (
    SparseWeights,
    in_numpy,
    in_torch,
    refuse_entries,
    target_matrices,
    top,
    top_magnitudes,
)


def sparse_view(kind="llama", share=0.1, dtype=torch.float32):
    view = view_of(kind)
    view.module.to(dtype).requires_grad_(False)
    generator, linears = torch.Generator().manual_seed(1), view.anatomy.match("all-linear")
    first = {}
    for x in linears:
        size = x.shape[0] * x.shape[1]
        first[x.name] = torch.randperm(size, generator=generator)[: max(1, int(share * size))]
    return view, SparseWeights(view, list(linears), first)


def loss_of(view):
    return Sft().loss(Forward(collate(rows_of()), view))["loss"].sums.sum()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_is_the_dense_one_at_its_entries(kind):
    view, sparse = sparse_view(kind)
    whole = {}
    for name in sparse.values:
        sparse.observe[name] = lambda g, name=name: whole.update({name: g.clone()})
    loss_of(view).backward()
    dense = view_of(kind)
    module = dense.module.requires_grad_(True)
    loss_of(dense).backward()
    for name, x in sparse.linears.items():
        grad = module.get_parameter(name).grad
        grad = grad.T if x.transposed else grad  # [out, in]
        seen, wanted = sparse.values[name].grad, grad.reshape(-1)[sparse.indices[name]]
        torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=1e-4)
        assert torch.equal(seen, whole[name].reshape(-1)[sparse.indices[name]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_moved_and_taken_out_the_base_has_its_bits_back(dtype):
    plain = {n: p.detach().to(dtype) for n, p in tiny().named_parameters()}
    view, sparse = sparse_view(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in sparse.values.values():
            v.normal_()
    sparse.write(generator)
    name = next(iter(sparse.values))
    live = view.weight(name).reshape(-1)[sparse.indices[name]].float()
    expected = plain[name].reshape(-1)[sparse.indices[name]].float() + sparse.values[name]
    torch.testing.assert_close(live, expected.detach(), atol=0.05 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    slots = torch.tensor([0, 3])
    old, new = sparse.indices[name][slots].clone(), free_positions(view, sparse, name, 2)
    sparse.move(name, slots, new)
    flat = view.weight(name).reshape(-1)
    assert torch.equal(flat[old], plain[name].reshape(-1)[old]) and torch.equal(flat[new], plain[name].reshape(-1)[new])
    assert sparse.values[name][slots].tolist() == [0.0, 0.0]
    sparse.detach()
    assert all(torch.equal(p, plain[n]) for n, p in view.module.named_parameters())


def free_positions(view, sparse, name, count):
    everywhere = torch.arange(view.weight(name).numel())
    return everywhere[~torch.isin(everywhere, sparse.indices[name])][:count]


def test_the_part_is_in_stored_order_and_binds_to_the_same_model():
    view, sparse = sparse_view("gpt2")
    with torch.no_grad():
        for v in sparse.values.values():
            v.normal_(std=0.1)
    sparse.write(torch.Generator())
    live = {n: p.detach().clone() for n, p in view.module.named_parameters() if "luthier" not in n}
    part = sparse.part()
    sparse.detach()
    assert all((i[1:] > i[:-1]).all() for i in part.indices.values())
    from luthier.update import Update

    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    with Update(view.base, (part,)).bind(view):
        assert all(torch.allclose(p, live[n], atol=1e-6) for n, p in view.module.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


def test_what_was_loaded_is_not_written_to():
    """Two stages may start from one saved state."""
    view, sparse = sparse_view()
    saved = {n: i.clone() for n, i in sparse.indices.items()}
    given, values = {n: i.clone() for n, i in saved.items()}, {n: torch.ones(len(i)) for n, i in saved.items()}
    sparse.load(given, values, torch.Generator())
    name = next(iter(saved))
    sparse.move(name, torch.tensor([0, 1]), free_positions(view, sparse, name, 2))
    assert all(torch.equal(given[n], saved[n]) and bool((values[n] == 1).all()) for n in saved)


def test_a_layers_entries_train_once_and_can_again_when_they_were_taken_out():
    view, sparse = sparse_view()
    linears, first = list(sparse.linears.values()), {n: i.long() for n, i in sparse.indices.items()}
    with pytest.raises(LuthierError, match="train already; detach that tuner first"):
        SparseWeights(view, linears, first)
    found = {id(p) for p in view.module.parameters()}
    assert {id(v) for v in sparse.values.values()} <= found, "processes and optimisers find them in the model"
    for _ in range(2):  # the second time there is nothing left to do
        sparse.detach()
    assert [n for n, _ in view.module.named_parameters()] == [n for n, _ in tiny().named_parameters()]
    SparseWeights(view, linears, first)


# --- the largest entries ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_is_a_stable_sorts_head_with_ties_by_position(dtype):
    generator = torch.Generator().manual_seed(0)
    for n, k in ((1000, 50), (1000, 999), (7, 7), (5, 0), (300, 299)):
        values = torch.randint(0, 40, (n,), generator=generator).to(dtype)
        wanted = values.float().argsort(descending=True, stable=True)[:k].sort().values
        assert torch.equal(top(values, k), wanted)
        if 0 < k < n:
            assert torch.equal(in_numpy(values, k), wanted) and torch.equal(in_torch(values, k), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [7, 100_000])  # many equal magnitudes, and few
def test_top_magnitudes_are_those_of_a_stable_sort(dtype, values):
    generator = torch.Generator().manual_seed(0)
    gradient = ((torch.randint(-values, values + 1, (2000,), generator=generator)) / values * 1e-3).to(dtype)
    for k in (0, 1, 100, 1999, 2000):
        wanted = gradient.float().abs().argsort(descending=True, stable=True)[:k].sort().values
        assert torch.equal(top_magnitudes(gradient, k), wanted)


# --- what is written, read and left out ---


def test_positions_take_32_bits_where_these_reach():
    _, sparse = sparse_view()
    for shape, dtype in (((2**16, 2**15), torch.int32), ((2**16, 2**15 + 1), torch.int64)):
        sparse.linears["wide"] = SimpleNamespace(shape=shape)
        assert sparse._dtype("wide") == dtype


def test_what_is_loaded_stands_in_the_weights_and_what_stood_there_is_the_bases():
    view, sparse = sparse_view()
    plain = {n: view.weight(n).detach().clone() for n in sparse.values}
    with torch.no_grad():
        for v in sparse.values.values():
            v.fill_(0.5)
    sparse.write(torch.Generator())
    given = {n: free_positions(view, sparse, n, len(v)) for n, v in sparse.values.items()}
    values = {n: torch.linspace(-1, 1, len(i)) for n, i in given.items()}
    sparse.load(given, values, torch.Generator())
    for n, base in plain.items():
        wanted = base.reshape(-1).clone()
        wanted[given[n]] += values[n]
        assert torch.equal(view.weight(n).reshape(-1), wanted) and torch.equal(sparse.values[n], values[n])
    assert not any(v.requires_grad for v in sparse.part().values.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_them_the_base_stands_there_and_a_backward_from_before_goes_on(kind):
    view, sparse = sparse_view(kind)
    plain = {n: view.weight(n).detach().clone() for n in sparse.values}
    with torch.no_grad():
        for v in sparse.values.values():
            v.fill_(0.5)
    sparse.write(torch.Generator())
    name = next(iter(plain))
    more = free_positions(view, sparse, name, 3)
    kept = sparse.read(name, more)
    sparse.put(name, kept + 1, more)  # entries that trained before and are left where they are
    tuned = {n: view.weight(n).detach().clone() for n in plain}
    loss = loss_of(view)
    with sparse.without({name: (more, kept)}):
        assert all(torch.equal(view.weight(n), p) for n, p in plain.items())
    assert all(torch.equal(view.weight(n), p) for n, p in tuned.items())
    loss.backward()
    with sparse.without():
        assert not torch.equal(view.weight(name), plain[name])


def test_packed_layers_are_refused():
    view = view_of()
    packed = torch.nn.Parameter(torch.zeros(8, 1).byte(), requires_grad=False)
    (x,) = view.anatomy.match(("layers.0.mlp.up_proj",))
    view.module.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(LuthierError, match="up_proj.weight is quantised"):
        refuse_entries(view, [x])


def test_the_largest_of_what_wants_a_gradient():
    values = torch.tensor([1.0, -3.0, 2.0], requires_grad=True)
    assert top(values, 1).tolist() == [2] and top_magnitudes(values, 2).tolist() == [1, 2]
    half = values.detach().bfloat16().requires_grad_()
    assert top(half, 1).tolist() == [2] and top_magnitudes(half, 2).tolist() == [1, 2]


def test_only_a_head_that_is_tied_is_refused():
    tied, own = view_of(tie_word_embeddings=True).anatomy, view_of().anatomy
    for targets in (("lm_head",), ("lm_head", "q_proj")):
        with pytest.raises(RecipeError, match="tied to the embeddings"):
            target_matrices("spiel", tied, targets)
        assert target_matrices("spiel", own, targets)[-1].module == "lm_head"
    assert len(target_matrices("spiel", tied, ("q_proj",))) == 3


@pytest.mark.parametrize(("kind", "transposed"), [("llama", False), ("gpt2", True)])
def test_a_part_holds_what_trained_before_too_in_stored_order(kind, transposed):
    view = view_of(kind)
    (x, other) = (x for x in view.anatomy.block_linears if x.role == "up" and x.block < 2)
    rows, columns = x.shape
    sparse = SparseWeights(view, [x, other], {x.name: torch.tensor([columns + 2, 1]), other.name: torch.tensor([4])})
    with torch.no_grad():
        sparse.values[x.name].copy_(torch.tensor([1.0, 2.0]))
    part = sparse.part({x.name: (torch.tensor([3]), torch.tensor([5.0]))})
    # (row, column) -> difference: (1, 2) 1, (0, 1) 2 and, from before, (0, 3) 5
    wanted = (
        [(1, 2.0), (3, 5.0), (columns + 2, 1.0)]
        if not transposed
        else [(rows, 2.0), (2 * rows + 1, 1.0), (3 * rows, 5.0)]
    )
    assert list(zip(part.indices[x.name].tolist(), part.values[x.name].tolist(), strict=True)) == wanted
    assert len(part.indices[other.name]) == 1
