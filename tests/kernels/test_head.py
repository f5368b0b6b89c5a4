"""The chunked head against the whole matrix of logits."""

import contextlib

import pytest
import torch

from luthier.kernels.head import CHUNK, CPU_ROWS, _blocks, recomputes, token_nll, token_scores
from luthier.kernels.plain import is_plain, plain_operations

ROWS = [0, 1, CPU_ROWS + 3, 2 * CHUNK + CPU_ROWS + 5]


def parts(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (rows, 50))
    return hidden, weight, torch.randint(0, 50, (rows,), generator=generator)


def whole(hidden, weight, labels):
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("trained", ["nothing", "hidden", "hidden and head"])
def test_losses_and_gradients_equal_those_of_all_logits_at_once(rows, trained):
    hidden, weight, labels = parts(rows)
    weight.requires_grad_(trained == "hidden and head")
    hidden.requires_grad_(trained != "nothing")
    by = torch.linspace(-1, 2, rows)
    found = token_nll(hidden, weight, labels)
    torch.testing.assert_close(found, whole(hidden, weight, labels), atol=1e-5, rtol=1e-5)
    moved = [x for x in (hidden, weight) if x.requires_grad]
    if moved and rows:
        ours, wanted = (torch.autograd.grad((f(hidden, weight, labels) * by).sum(), moved) for f in (token_nll, whole))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_half_precision_is_summed_in_float32():
    hidden, weight, labels = parts(CHUNK + 7, torch.bfloat16)
    found = token_nll(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(hidden, weight, labels), atol=1e-5, rtol=1e-5)
    grad, wanted = (torch.autograd.grad(f(hidden, weight, labels).sum(), hidden)[0] for f in (token_nll, whole))
    torch.testing.assert_close(grad, wanted, atol=5e-2, rtol=5e-2)


def test_extreme_logits_stay_finite():
    hidden, weight = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [0.0], [-1.0]])
    found = token_nll(hidden, weight, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, 2e4]


def test_under_autocast_the_product_is_its_own():
    hidden, weight, labels = parts(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_nll(hidden.bfloat16(), weight, labels)
        torch.testing.assert_close(found, whole(hidden.bfloat16(), weight, labels), atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


def capped(z):
    return 3 * torch.tanh(z * 0.7 / 3)


@pytest.mark.parametrize("rows", [0, 1, 2 * CHUNK + 5])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("biased", "transform"), [(True, None), (False, capped), (True, capped)])
def test_a_bias_and_what_the_model_does_to_its_logits_are_part_of_the_loss(rows, biased, transform, plain):
    hidden, weight, labels = parts(rows)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(1)).requires_grad_() if biased else None
    by, moved = torch.linspace(-1, 2, rows), [hidden, weight, *([bias] if biased else [])]

    def ours(h, w):
        with plain_operations() if plain else contextlib.nullcontext():
            return token_nll(h, w, labels, bias, transform)

    def wanted(h, w):
        z = h @ w.T + (0 if bias is None else bias)
        return torch.nn.functional.cross_entropy(z if transform is None else transform(z), labels, reduction="none")

    torch.testing.assert_close(ours(hidden, weight), wanted(hidden, weight), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden, weight), wanted(hidden, weight), atol=1e-5, rtol=1e-5)
    if rows:
        a, b = (torch.autograd.grad((f(hidden, weight) * by).sum(), moved) for f in (ours, wanted))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("biased", "transform"), [(False, None), (True, capped)])
def test_losses_and_entropies_of_all_chunks(rows, biased, transform):
    hidden, weight, labels = (x.detach() for x in parts(rows))
    bias = torch.randn(50, generator=torch.Generator().manual_seed(1)) if biased else None
    found = token_scores(hidden, weight, labels, bias, transform)
    z = hidden @ weight.T + (0 if bias is None else bias)
    p = (z if transform is None else transform(z)).double().softmax(-1)
    torch.testing.assert_close(found.nll.double(), -p.gather(1, labels[:, None]).squeeze(1).log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
    assert found.nll.dtype == found.entropy.dtype == torch.float32


def test_the_gradient_of_a_frozen_head_is_all_that_is_kept_and_chunks_share_their_memory():
    hidden, weight, labels = parts(CHUNK + 5)
    assert [len(token_nll(hidden, w, labels).grad_fn.saved_tensors) for w in (weight.detach(), weight)] == [1, 3]
    assert [len(token_nll(hidden.detach(), weight, labels).grad_fn.saved_tensors)] == [3]
    for rows in (3, 2 * CHUNK):
        block, wide = _blocks(torch.zeros(rows, 16, dtype=torch.bfloat16), weight)
        assert (block.shape, wide.shape) == ((min(CHUNK, rows), 50), (CPU_ROWS, 50))
        assert (block.dtype, wide.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("plain", "times"), [(False, 2), (True, 1)])
def test_with_a_transform_logits_are_computed_again_unless_ordinary_operations_are_asked_for(plain, times):
    hidden, weight, labels = parts(2 * CHUNK + 5)
    seen = []

    def noted(z):
        seen.append(len(z))
        return capped(z)

    with plain_operations() if plain else contextlib.nullcontext():
        token_nll(hidden, weight, labels, None, noted).sum().backward()
    assert sorted(seen) == sorted([CHUNK, CHUNK, 5] * times)


def test_a_token_without_probability_adds_nothing_to_the_entropy():
    found = token_scores(torch.tensor([[1.0]]), torch.tensor([[400.0], [0.0], [0.0]]), torch.tensor([0]))
    assert found.entropy.tolist() == [0.0] and found.nll.tolist() == [0.0]


def test_the_ledger_knows_which_losses_are_taken_twice():
    frozen, trained = torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True)
    assert (
        recomputes(trained, None, None)
        and recomputes(frozen, torch.zeros(3), None)
        and recomputes(frozen, None, capped)
    )
    assert not recomputes(frozen, None, None)
    with plain_operations():
        assert not recomputes(trained, torch.zeros(3), capped)


def test_the_gradient_of_a_half_precision_head_is_added_up_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(20 * CHUNK, 16, generator=generator) + 1).bfloat16()
    weight = torch.randn(50, 16, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 50, (20 * CHUNK,), generator=generator)
    (found,) = torch.autograd.grad(token_nll(hidden, weight, labels).sum(), weight)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(whole_double(hidden, exact, labels).sum(), exact)
    assert (found.double() - wanted).norm() / wanted.norm() < 3e-3  # 2.0e-3; 5.0e-3 where chunks are added in bf16


def whole_double(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden.double() @ weight.T, labels, reduction="none")


def test_ordinary_operations_are_for_the_calls_inside():
    for _ in range(2):
        assert not is_plain()
        with plain_operations():
            assert is_plain()
