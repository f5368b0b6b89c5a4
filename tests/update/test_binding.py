"""Parts on a model whose weights are packed bits: refused before anything is touched."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, view_of
from luthier.update import Dense, LowRank, Replace, Seeds, Sparse, Structure, Update

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
SHAPES = {NORM: (32,), Q: (32, 32)}


BITS = torch.arange(32 * 32).reshape(32, 32).remainder(201)  # their weight is (bits - 100) / 500


class Packed(nn.Linear):
    """A layer that is stored as whole numbers, as quantisation does."""

    def forward(self, x):
        return F.linear(x, (self.weight.float() - 100) / 500)


def packed_view():
    """A view of which one layer is packed."""
    view = view_of()
    layer = view.module.get_submodule("model.layers.0.self_attn.q_proj")
    layer.__class__, layer.weight = Packed, nn.Parameter(BITS.to(torch.uint8), requires_grad=False)
    return view


PARTS = {
    "dense": Dense({n: torch.ones(s) for n, s in SHAPES.items()}),
    "sparse": Sparse(dict.fromkeys(SHAPES, torch.tensor([1])), dict.fromkeys(SHAPES, torch.ones(1)), SHAPES),
    "seeds": Seeds(torch.tensor([3]), torch.tensor([5.0], dtype=torch.float64), SHAPES),
    "replace": Replace({n: torch.ones(s) for n, s in SHAPES.items()}),
    "structure": Structure.removing(view_of().anatomy, {0: [2, 3]}),
}


@pytest.mark.parametrize("kind", PARTS)
def test_packed_weights_are_named_and_nothing_is_touched(kind):
    view, part = packed_view(), PARTS[kind]
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    with (
        pytest.raises(LuthierError, match=f"{kind} part: {Q} is quantised; load the model in bf16 or float32"),
        Update(view.base, (part,)).bind(view),
    ):
        pass
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())
    with pytest.raises(LuthierError, match=f"a {kind} part cannot be merged into weights: {Q} is quantised"):
        Update(view.base, (part,)).merge_into(view.module)
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())


def test_factors_of_which_one_belongs_to_packed_bits_stay_beside_the_layers_in_place_too():
    packed, plain = packed_view(), view_of()
    names = (Q, "model.layers.1.mlp.up_proj.weight")
    a, b = ({n: 0.3 * torch.randn(s, generator=torch.Generator().manual_seed(i)) for n, s in zip(names, shapes, strict=True)}
            for i, shapes in enumerate((((2, 32), (2, 32)), ((32, 2), (64, 2)))))  # fmt: skip
    with torch.no_grad():
        plain.weight(Q).copy_((BITS - 100) / 500)
        for n in names:
            plain.weight(n).add_(b[n] @ a[n])
    with Update(packed.base, (LowRank(a, b, dict.fromkeys(names, 1.0)),)).in_place(packed):
        found = packed.trace(batch_of()).hidden[-1].detach()
    torch.testing.assert_close(found, plain.trace(batch_of()).hidden[-1].detach(), atol=1e-5, rtol=1e-5)
