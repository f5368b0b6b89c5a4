"""The chunked head against the whole matrix of logits."""

import pytest
import torch

from luthier.kernels.head import CHUNK, CPU_ROWS, token_nll

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
