"""Linear layers with trained parts against the same written out with ordinary operations, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from luthier.kernels.linear import folded, low_rank_linear, sparse_linear, stochastic_round
from luthier.kernels.plain import plain_operations

SCALE = 0.37


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def layer(bias=True, leading=(2, 3)):
    """x [..., 5], weight [4, 5], bias [4] or None, a [2, 5], b [4, 2]."""
    return (
        drawn(*leading, 5),
        drawn(4, 5, seed=1),
        drawn(4, seed=2) if bias else None,
        drawn(2, 5, seed=3),
        drawn(4, 2, seed=4),
    )


def written_out(x, weight, bias, a, b):
    return F.linear(x, weight + SCALE * b @ a, bias)


def compared(ours, wanted, of):
    torch.testing.assert_close(ours, wanted)
    by = torch.linspace(-1, 2, ours.numel()).view(ours.shape)
    for found, expected in zip(
        torch.autograd.grad((ours * by).sum(), of), torch.autograd.grad((wanted * by).sum(), of), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "trained", [(0, 3, 4), (3, 4), (0, 3), (0, 4), (3,), (4,), (0,), (0, 1, 3, 4), (2, 3), (0, 1, 2, 3, 4)]
)
def test_a_low_rank_addition_has_the_value_and_the_gradients_of_the_whole_product(trained, bias):
    given = layer(bias)
    trained = [i for i in trained if given[i] is not None]
    for i, t in enumerate(given):
        if t is not None:
            t.requires_grad_(i in trained)
    compared(low_rank_linear(*given, SCALE), written_out(*given), [given[i] for i in trained])


def test_parts_that_do_not_train_get_no_gradient():
    x, weight, bias, a, b = layer()
    for frozen, trained in ((a, b), (b, a)):
        for t in (x, weight, bias, a, b):
            t.requires_grad_(t is trained)
        low_rank_linear(x, weight, bias, a, b, SCALE).sum().backward()
        assert trained.grad is not None and frozen.grad is None
        trained.grad = None


def test_beside_frozen_weights_the_hand_written_way_is_taken_which_keeps_no_copies():
    x, weight, bias, a, b = layer()
    found = low_rank_linear(x, weight.detach(), bias.detach(), a, b, SCALE)
    assert type(found.grad_fn).__name__ == "_LowRankBackward"


def test_without_gradients_a_trained_weight_takes_the_short_way_too():
    given = layer()
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(*given, SCALE), written_out(*given))


def test_with_ordinary_operations_derivatives_in_forward_mode_are_those_of_the_whole_product():
    x, weight, bias, a, b = (t.detach() for t in layer())
    moves = [drawn(*t.shape, seed=9).detach() for t in (x, a, b)]
    with plain_operations():
        found = torch.func.jvp(lambda x, a, b: low_rank_linear(x, weight, bias, a, b, SCALE), (x, a, b), tuple(moves))
    wanted = torch.func.jvp(lambda x, a, b: written_out(x, weight, bias, a, b), (x, a, b), tuple(moves))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bf16_a_small_addition_is_not_lost_in_the_rounding_of_the_product():
    """The product is 257, which bf16 cannot hold; with 1 more it is 258, which it can."""
    x, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    a, b = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0]])
    for frozen in (True, False):
        found = low_rank_linear(x, weight.requires_grad_(not frozen), None, a, b, 1.0)
        assert found.item() == 258.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("through", [True, False])
def test_sparse_entries_get_their_entries_of_the_dense_gradient(bias, through):
    x, weight, offset, *_ = layer(bias)
    x.requires_grad_(through)
    indices, values, seen = torch.tensor([0, 7, 19]), torch.zeros(3, requires_grad=True), []
    ours = sparse_linear(x, weight.detach(), offset, values, indices, seen.append)
    wanted = F.linear(x, weight, offset)
    torch.testing.assert_close(ours, wanted)
    by = torch.linspace(-1, 2, ours.numel()).view(ours.shape)
    of = [x] if through else []
    found, *rest = torch.autograd.grad((ours * by).sum(), [values, *of])
    dense, *others = torch.autograd.grad((wanted * by).sum(), [weight, *of])
    torch.testing.assert_close(found, dense.reshape(-1)[indices])
    torch.testing.assert_close(seen, [dense])
    torch.testing.assert_close(rest, others)


def test_an_adapter_is_folded_into_the_projection():
    x, weight, bias, a, b = drawn(3, 5), drawn(4, 5, seed=1), drawn(4, seed=2), drawn(2, 4, seed=3), drawn(4, 2, seed=4)
    for offset in (bias, None):
        h = F.linear(x, weight, offset)
        torch.testing.assert_close(F.linear(x, *folded(weight, offset, a, b)), h + h @ a.T @ b.T)
    assert folded(weight, None, a, b)[1] is None


def test_stochastic_rounding_keeps_the_expected_value():
    """A hundredth of a bf16 step, which rounding to nearest would lose, is kept in the mean, and so are three quarters."""
    generator = torch.Generator().manual_seed(0)
    for part in (0.01, 0.75):
        master = torch.full((200_000,), 1.0) + 2**-7 * part
        rounded = stochastic_round(master, torch.bfloat16, generator).float()
        assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
        assert float((rounded - 1).mean()) == pytest.approx(2**-7 * part, rel=0.05)
        assert float((-stochastic_round(-master, torch.bfloat16, generator).float() - 1).mean()) == pytest.approx(
            2**-7 * part, rel=0.05
        )


def test_stochastic_rounding_keeps_what_bf16_can_hold_and_what_is_not_finite():
    generator = torch.Generator().manual_seed(0)
    held = torch.full((2_000_000,), 1.5)
    assert torch.equal(stochastic_round(held, torch.bfloat16, generator).float(), held)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    found = stochastic_round(odd, torch.bfloat16, generator)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), odd, equal_nan=True, atol=0, rtol=0)


def test_other_types_are_rounded_to_nearest():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 2**-12, 0.1])
    before = generator.get_state()
    assert torch.equal(stochastic_round(values, torch.float16, generator), values.half())
    assert stochastic_round(values, torch.float32, generator) is values
    assert torch.equal(generator.get_state(), before)
