"""LoRA: equation 3 of its paper, to autograd's numbers, under peft's names."""

import pytest
import torch
import torch.nn.functional as F

from luthier.kernels.linear import low_rank_linear
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Lora, Peft


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


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_beside_a_weight_that_trains_too_autograd_takes_all_gradients(trains):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, weight, bias, a, b = (t.requires_grad_() for t in (draw(2, 7, 5), draw(6, 5), draw(6), draw(3, 5), draw(6, 3)))
    (bias if trains == "weight" else weight).requires_grad_(False)
    moving = [t for t in (x, weight, bias, a, b) if t.requires_grad]
    ours, theirs = low_rank_linear(x, weight, bias, a, b, 0.7), F.linear(x, weight, bias) + 0.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    along = draw(2, 7, 6)
    for mine, wanted in zip(*(torch.autograd.grad((o * along).sum(), moving) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize(("kind", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", ("q_proj",))])
def test_logits_and_gradients_equal_pefts_with_equal_factors(kind, targets):
    """Golden: peft's own forward and autograd, 1e-6."""
    from peft import LoraConfig, get_peft_model

    view, batch, model = view_of(kind), batch_of((11,)), tiny(kind).eval()
    trainable = Lora(rank=4, alpha=12.0, targets=targets).attach(view)
    modules = [x.module for x in trainable.targets]
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules=modules, fan_in_fan_out=kind == "gpt2")
    )
    theirs, generator = dict(wrapped.named_parameters()), torch.Generator().manual_seed(0)
    pairs = []
    with torch.no_grad():
        for module in modules:
            for which, mine in (("A", trainable.a), ("B", trainable.b)):
                p = mine[f"{module}.weight"].normal_(std=0.2, generator=generator)
                q = theirs[f"base_model.model.{module}.lora_{which}.default.weight"]
                q.copy_(p)
                pairs.append((p, q))
    ours, expected = view.trace(batch).hidden[-1] @ view.head_weight.T, model(batch.ids[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=0)  # sums of several threads differ by more than 1e-6
    bare = view_of(kind).module(batch.ids[None]).logits[0]
    assert float((ours - bare).detach().abs().max()) > 0.02
    along = torch.randn(ours.shape, generator=generator)
    (ours * along).sum().backward()
    (expected * along).sum().backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad, atol=3e-5 * float(q.grad.abs().max()), rtol=1e-5)


def test_a_starts_kaiming_uniform_in_the_width_of_its_input():
    view = view_of()
    trainable = Lora(rank=32).attach(view)
    for name, a in trainable.a.items():
        bound = torch.nn.init.calculate_gain("leaky_relu", 5**0.5) * (3 / a.shape[1]) ** 0.5
        assert a.shape[1] == view.weight(name).shape[1]
        assert 0.98 * bound < float(a.detach().abs().max()) <= bound
        assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.06)
        assert not trainable.b[name].any()
    a, other = trainable.a, Lora(rank=32, seed=1).attach(view_of()).a
    names = list(a)
    assert all(not torch.equal(a[n], other[n]) for n in names)
    assert not torch.equal(a[names[0]], a[names[1]]), "keyed by layer"
    assert all(torch.equal(a[n], p) for n, p in Lora(rank=32).attach(view_of()).a.items())


def test_dropout_is_that_of_the_additions_input():
    """y = W x + s B A drop(x) with drop's 1 / (1 - p): drawn again from the same generator."""
    view = view_of()
    trainable = Lora(rank=4, alpha=8.0, dropout=0.5, targets=("layers.1.mlp.up_proj",)).attach(view)
    (name,) = trainable.a
    module, x = view.module.get_submodule(name.removesuffix(".weight")), torch.randn(5, 32)
    with torch.no_grad():
        trainable.b[name].normal_()
        view.module.train()
        torch.manual_seed(3)
        seen = module(x)
        torch.manual_seed(3)
        kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        wanted = x @ module.weight.T + 2.0 * (x * kept) @ trainable.a[name].T @ trainable.b[name].T
        assert set(kept.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)


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


def test_targets_are_patterns_that_must_all_match():
    view = view_of()
    trainable = Lora(rank=2, targets=("q_proj", "*.mlp.*")).attach(view)
    assert {n.split(".")[-2] for n in trainable.a} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(LuthierError, match="no_such"):
        Lora(targets=("q_proj", "no_such")).attach(view_of())


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Lora(**fields)


def test_only_the_factors_train_and_what_is_kept_is_all_of_them():
    view, other = view_of(), view_of()
    first, second = Lora(rank=2, seed=1).attach(view), Lora(rank=2).attach(other)
    assert {id(p) for p in view.module.parameters() if p.requires_grad} == {id(p) for p in first.parameters()}
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.5)
    state = first.state_dict()
    assert not any(t.requires_grad for t in state.values())
    second.load_state_dict({k: v.clone() for k, v in state.items()})
    assert second.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in second.state_dict().items())
    assert second.update().chart.digest == first.update().chart.digest


def test_a_second_one_stands_beside_the_first():
    view, batch = view_of(), batch_of()
    Lora(rank=2).attach(view)
    before = view.trace(batch).hidden[-1].detach()
    second = Lora(rank=2, seed=1).attach(view)
    torch.testing.assert_close(view.trace(batch).hidden[-1], before, atol=1e-6, rtol=1e-6)
    assert len(second.a) == len(second.targets)


def test_beside_the_weight_of_a_dora_adapter_it_is_refused():
    """Its norms are those of the weight, and would not see what stands beside."""
    view = view_of()
    first = Peft(options={"r": 2, "use_dora": True}, targets=("layers.0.mlp.up_proj",)).attach(view)
    with pytest.raises(LuthierError, match=r"layers\.0\.mlp\.up_proj has a DoRA adapter"):
        Lora(rank=2).attach(view)
    assert view.attached == [first]


def test_a_rank_above_that_of_every_matrix_is_refused():
    assert Lora(rank=32).attach(view_of())
    with pytest.raises(
        RecipeError, match=r"rank: is 33, and no matrix here has a higher rank than 32; set a smaller rank"
    ):
        Lora(rank=33).attach(view_of())
