"""A weighted sum of updates: exact in weight space, for every form that adds."""

import pytest
import torch

from luthier.merging import Linear
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.tuners import Full, Lora
from luthier.update import Dense, Update


def updates():
    out = []
    for seed in range(3):
        trainable = Lora(rank=2, seed=seed).attach(view_of())
        with torch.no_grad():
            for i, p in enumerate(trainable.parameters()):
                p.normal_(generator=torch.Generator().manual_seed(10 * seed + i))
        out.append(trainable.update())
    return out


@pytest.mark.parametrize("weights", [None, (0.5, -2.0, 0.25)])
def test_every_tensor_is_the_weighted_sum(weights):
    members = updates()
    merged, parts = Linear(weights=weights).merge(members).dense(), [m.dense() for m in members]
    for name in parts[0]:
        wanted = sum(w * p[name] for w, p in zip(weights or (1 / 3,) * 3, parts, strict=True))
        torch.testing.assert_close(merged[name], wanted, atol=1e-5, rtol=1e-5)


def test_one_member_with_weight_one_is_itself():
    member = updates()[0]
    for weights in ((1.0,), None):
        torch.testing.assert_close(Linear(weights=weights).merge([member]).dense(), member.dense(), atol=0, rtol=0)


def test_forms_may_differ():
    trainable = Full().attach(view_of())
    with torch.no_grad():
        for p in trainable.parameters():
            p.add_(0.5)
    whole, low = trainable.update(), updates()[0]
    merged, sums, change = Linear(weights=(2.0, 1.0)).merge([whole, low]).dense(), whole.dense(), low.dense()
    for name in change:
        torch.testing.assert_close(merged[name], 2 * sums[name] + change[name], atol=1e-5, rtol=1e-5)


def test_faults_are_named():
    members = updates()
    with pytest.raises(LuthierError, match="2 weights for 3 updates"):
        Linear(weights=(1.0, 2.0)).merge(members)
    with pytest.raises(LuthierError, match="no update to merge"):
        Linear().merge([])
    other = Update(view_of(seed=5).base, (Dense({}),))
    with pytest.raises(LuthierError, match="merge.linear"):
        Linear().merge([members[0], other])
