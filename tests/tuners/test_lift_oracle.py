"""LIFT against an implementation written from its sheet alone: whole masks, dense float64 moments, torch.linalg.svd.

Every step's weight gradient is given (the loss is linear in the weights), so both see the same numbers.
"""

import pytest
import torch

from luthier.objectives.base import Clock
from luthier.testing.models import view_of
from luthier.tuners.lift import Lift, low_rank, principal

B1, B2, EPS, RATE = 0.9, 0.95, 1e-6, 0.01


def nearest(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of this rank, in float64: the weight projected on its leading right singular vectors."""
    w = weight.double()
    _, vectors = torch.linalg.eigh(w.T @ w)  # ascending
    leading = vectors[:, -rank:]
    return w @ leading @ leading.T


def mask_of(weight: torch.Tensor, rank: int, k: int) -> torch.Tensor:
    """[m, n] bool: the k entries largest in magnitude after rank reduction."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    s[rank:] = 0
    size = (u @ torch.diag(s) @ vh).abs().reshape(-1)
    out = torch.zeros(len(size), dtype=torch.bool)
    out[size.argsort(descending=True)[:k]] = True
    return out.view(weight.shape)


class Naive:
    """One matrix: mask, weight and moments of its shape."""

    def __init__(self, weight: torch.Tensor, rank: int, filter_rank: int) -> None:
        m, n = weight.shape
        self.w, self.k, self.filter_rank, self.t = weight.double().clone(), min(rank * (m + n), m * n), filter_rank, 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.mask = mask_of(self.w, filter_rank, self.k)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        self.t += 1
        g = torch.where(self.mask, gradient.double(), 0)
        self.m, self.v = B1 * self.m + (1 - B1) * g, B2 * self.v + (1 - B2) * g**2
        change = (self.m / (1 - B1**self.t)) / ((self.v / (1 - B2**self.t)).sqrt() + EPS)
        self.w -= torch.where(self.mask, rate * change, 0)

    def reselect(self) -> None:
        self.mask = mask_of(self.w, self.filter_rank, self.k)
        self.m, self.v = torch.where(self.mask, self.m, 0), torch.where(self.mask, self.v, 0)


@pytest.mark.parametrize(("rank", "filter_rank"), [(1, 1), (2, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_and_weights_are_those_of_the_sheet_at_every_step(kind, rank, filter_rank, seed):
    view = view_of(kind, layers=1, seed=seed)
    targets = ("q_proj", "down_proj") if kind == "llama" else ("attn.c_proj", "c_fc")
    trainable = Lift(rank=rank, filter_rank=filter_rank, reselect_every=4, targets=targets).attach(view, total_steps=20)
    sparse = trainable.sparse
    optimizer = trainable.optimizer(trainable.groups(), lambda g: torch.optim.AdamW(g[0].params, lr=RATE))
    turned = {n: x.transposed for n, x in sparse.linears.items()}
    naive = {
        n: Naive(view.weight(n).detach().T if turned[n] else view.weight(n).detach(), rank, filter_rank) for n in turned
    }
    generator, masks = torch.Generator().manual_seed(seed), {n: x.mask for n, x in naive.items()}
    for t in range(1, 21):
        trainable.before_window(None, None)
        for name, x in sparse.linears.items():
            g = torch.randn(x.shape, generator=generator)
            bias = view.module.get_submodule(x.module).bias
            out = view.module.get_submodule(x.module)(torch.eye(x.shape[1]))  # [in, out], the weight turned
            ((out if bias is None else out - bias.detach()) * g.T).sum().backward()
            naive[name].step(g, RATE)
            if t % 4 == 0 and t < 20:
                naive[name].reselect()
        trainable.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        trainable.after_step(Clock(t, 20))
        for name, n in naive.items():
            assert sparse.indices[name].tolist() == n.mask.reshape(-1).nonzero().squeeze(1).tolist(), f"step {t}"
            weight = view.weight(name).detach()
            torch.testing.assert_close(weight.T if turned[name] else weight, n.w.float(), atol=2e-6, rtol=1e-5)
    assert any(not torch.equal(masks[n], x.mask) for n, x in naive.items()), "other entries were chosen"
    start = view_of(kind, layers=1, seed=seed)
    for name, delta in trainable.update().deltas():
        torch.testing.assert_close(start.weight(name) + delta, view.weight(name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_approximation_is_the_projection_on_the_leading_singular_vectors(rank, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    torch.testing.assert_close(low_rank(w, rank).double(), nearest(w, rank), atol=1e-5, rtol=1e-5)


def test_the_randomized_approximation_nearly_is_too():
    """Twice the rank in columns and two power iterations: within a thousandth where singular values fall by a third."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64))[0] for _ in range(2))
    w = (u @ torch.diag(0.7 ** torch.arange(60).double()) @ v).float()
    wanted = nearest(w, 5)
    found = low_rank(w, 5, randomized=True, generator_seed=3).double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 5
    torch.manual_seed(3)
    a, s, b = torch.svd_lowrank(w, q=10, niter=2)
    torch.testing.assert_close(found.float(), a[:, :5] @ torch.diag(s[:5]) @ b[:, :5].T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_3_the_smallest_chosen_is_at_least_the_largest_left_out(seed):
    view = view_of(seed=seed)
    sparse = Lift(density=0.1, filter_rank=4).attach(view, total_steps=10).sparse
    for n, x in sparse.linears.items():
        size = nearest(view.weight(n).detach(), 4).abs().reshape(-1)
        chosen = torch.zeros_like(size, dtype=torch.bool)
        chosen[sparse.indices[n].long()] = True
        assert float(size[chosen].min()) >= float(size[~chosen].max()) - 1e-7, x.module
        assert int(chosen.sum()) == round(0.1 * x.shape[0] * x.shape[1])


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"rank": 3}, 3), ({"density": 0.05}, 1), ({"density": 0.002}, 1), ({"density": 0.4}, 9), ({"filter_rank": 2}, 2)],
)
def test_the_filter_has_the_rank_of_a_lora_with_as_many_numbers(fields, wanted):
    """up_proj is 64 x 32: 0.4 of it are 819 entries, and LoRA has 96 a rank."""
    view = view_of()
    name = "model.layers.0.mlp.up_proj.weight"
    found = Lift(**fields).attach(view, total_steps=10).sparse.indices[name]
    k = len(found)
    assert found.tolist() == mask_of(view.weight(name).detach(), wanted, k).reshape(-1).nonzero().squeeze(1).tolist()


def test_the_chosen_blocks_are_those_with_the_largest_sums():
    size = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) ** 4
    sums = {(i, j): float(size[i : i + 4, j : j + 4].sum()) for i in range(0, 12, 4) for j in range(0, 20, 4)}
    for k, blocks in ((5, 1), (16, 1), (33, 2), (100, 6)):
        wanted = set(sorted(sums, key=sums.__getitem__)[-blocks:])
        index = principal(size * torch.where(torch.rand(12, 20) < 0.5, -1, 1), k, block=4)
        rows, columns = (index // 20).tolist(), (index % 20).tolist()
        assert {(r // 4 * 4, c // 4 * 4) for r, c in zip(rows, columns, strict=True)} == wanted
        assert len(index) == 16 * blocks and index.tolist() == sorted(index.tolist())


def test_a_choice_costs_what_the_page_says():
    """14 m n^2 + 8 n^3 for the decomposition with n the shorter side, 2 m n R to put the matrix together again."""
    trainable = Lift(density=0.1, filter_rank=3).attach(view_of(), total_steps=10)
    shapes = [sorted(x.shape) for x in trainable.sparse.linears.values()]
    assert trainable.attach_flops == sum(14 * m * n**2 + 8 * n**3 + 2 * m * n * 3 for n, m in shapes)
