"""LoRA: equation 3 of its paper, to autograd's numbers, under peft's names."""

import pytest
import torch
import torch.nn.functional as F

from luthier.kernels.linear import low_rank_linear
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Lora


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "lfm2"])
def test_at_the_start_the_model_is_unchanged(kind):
    view, batch = view_of(kind), batch_of()
    before = view.trace(batch).hidden[-1].detach()
    Lora(rank=4).attach(view)
    torch.testing.assert_close(view.trace(batch).hidden[-1], before, atol=1e-6, rtol=1e-6)


def test_the_hand_written_backward_is_autograds():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, bias = draw(7, 5).requires_grad_(), draw(6, 5), draw(6)
    a, b = draw(3, 5).requires_grad_(), draw(6, 3).requires_grad_()
    seen, expected = [], []
    for out, into in (
        (low_rank_linear(x, weight, bias, a, b, 0.7), seen),
        (F.linear(x, weight, bias) + 0.7 * (x @ a.T) @ b.T, expected),
    ):
        into.append(out.detach())
        into += torch.autograd.grad((out * torch.arange(6.0)).sum(), [x, a, b])
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_training_is_that_of_plain_factors_beside_the_weight():
    """Five steps against transformers' own forward with factors written out by hand."""
    rows, settings = rows_of(), TrainSettings(max_steps=5, batch_size=4, learning_rate=1e-2, shuffle=False)
    view = view_of()
    loop = Loop(view, rows, Lora(rank=4, alpha=8).attach(view), Sft(), settings)
    model = tiny().eval()
    model.requires_grad_(False)
    params = []
    for name, a in view_and_starts():
        module = model.get_submodule(name)
        b, plain = torch.nn.Parameter(torch.zeros(module.weight.shape[0], 4)), module.forward
        module.forward = lambda h, plain=plain, a=a, b=b: plain(h) + 2.0 * (h @ a.T) @ b.T
        params += [a, b]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (5 - s) / 5)
    loop.scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda s: (5 - s) / 5)
    for _ in range(5):
        total = sum(sum(y != -100 for y in r["labels"][1:]) for r in rows)
        value = 0.0
        for r in rows:
            logits = model(torch.tensor([r["ids"]])).logits[0, :-1]
            part = F.cross_entropy(logits, torch.tensor(r["labels"][1:]), reduction="sum") / total
            part.backward()
            value += float(part.detach())
        assert loop.step()["loss"] == pytest.approx(value, abs=1e-5)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def view_and_starts():
    view = view_of()
    trainable = Lora(rank=4, alpha=8).attach(view)
    return [(n.removesuffix(".weight"), torch.nn.Parameter(a.detach().clone())) for n, a in trainable.a.items()]


def test_dropout_acts_in_training_only_and_on_the_addition_only():
    view, batch = view_of(), batch_of()
    trainable = Lora(rank=4, dropout=0.5).attach(view)
    with torch.no_grad():
        for b in trainable.b.values():
            b.normal_()
    view.module.eval()
    still = view.trace(batch).hidden[-1]
    assert torch.equal(still, view.trace(batch).hidden[-1])
    view.module.train()
    assert not torch.equal(view.trace(batch).hidden[-1], view.trace(batch).hidden[-1])


def test_targets_are_patterns_that_must_all_match_and_two_adapters_do_not_share_a_layer():
    view = view_of()
    trainable = Lora(rank=2, targets=("q_proj", "*.mlp.*")).attach(view)
    assert {n.split(".")[-2] for n in trainable.a} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(LuthierError, match="no_such"):
        Lora(targets=("q_proj", "no_such")).attach(view_of())
    with pytest.raises(ValueError, match="already carries an adapter"):
        Lora(rank=2).attach(view)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Lora(**fields)
