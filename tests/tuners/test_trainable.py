"""What every trainable does: what it puts on a model comes off again, whatever came before and after; and a head beside it."""

import pytest
import torch

from luthier.method import Facts
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.step.window import Clock
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, labelled_rows, view_of
from luthier.training.loop import Loop
from luthier.tuners import Adapter, FedKSeed, Full, Lora, Peft, Spiel
from luthier.tuners.base import DenseTrainable, ParamGroup, as_dicts, copies, default_optimizer, with_head


def wants(view):
    return {n for n, p in view.module.named_parameters() if p.requires_grad}


def stirred(view, **fields):
    trainable = Lora(rank=2, **fields).attach(view)
    with torch.no_grad():
        for p in trainable.parameters():
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return trainable


def test_taken_off_the_model_is_as_it_was_and_a_second_time_nothing_happens():
    view = view_of()
    view.weight("lm_head.weight").requires_grad_(False)
    before, names = wants(view), [n for n, _ in view.module.named_parameters()]
    trainable = Lora(rank=2).attach(view)
    assert wants(view) == {n for n, _ in view.module.named_parameters()} - set(names) and view.phases
    for _ in range(2):
        trainable.detach()
        assert wants(view) == before and not view.phases and not view.attached
        assert [n for n, _ in view.module.named_parameters()] == names


def test_the_base_is_seen_inside_of_its_scope():
    view, batch = view_of(), batch_of()
    plain = view.trace(batch).hidden[-1].detach()
    trainable = stirred(view)
    tuned = view.trace(batch).hidden[-1].detach()
    with trainable.base_view():
        torch.testing.assert_close(view.trace(batch).hidden[-1], plain, atol=1e-6, rtol=0)
    assert torch.equal(view.trace(batch).hidden[-1], tuned) and float((tuned - plain).abs().max()) > 0.01


def test_what_wants_a_gradient_is_handed_on_to_one_that_came_later():
    view = view_of()
    before = wants(view)
    first, later = Lora(rank=2).attach(view), Lora(rank=2, seed=1).attach(view)
    kept = {n for n, p in view.module.named_parameters() if any(p is q for q in later.parameters())}
    first.detach()
    assert wants(view) == kept
    later.detach()
    assert wants(view) == before


def test_a_stage_goes_on_from_the_state_of_one_before():
    first, second = stirred(view_of()), Lora(rank=2).attach(view_of())
    second.continue_from({k: v.clone() for k, v in first.state_dict().items()})
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_whole_tensors_count_their_steps():
    """The count keys the rounding."""
    view = view_of()
    trainable = Full().attach(view)
    for steps in (1, 2):
        trainable.after_step()
        assert int(trainable.state_dict()["steps"]) == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_beside_a_tuner_learns_and_comes_off_with_it(dtype):
    view = view_of("llama-classifier")
    view.module.to(dtype)
    names, before = wants(view), view.weight("score.weight").detach().clone()
    trainable = with_head(Lora(rank=2).attach(view), view.anatomy.task_head)
    settings = TrainSettings(max_steps=2, batch_size=4, learning_rate=0.1, warmup_fraction=0)
    loop = Loop(view, labelled_rows(), trainable, Sft(), settings)
    loop.step()
    assert not torch.equal(view.weight("score.weight"), before)
    assert view.attached == [trainable], "the head answers for both"
    trainable.detach()
    assert torch.equal(view.weight("score.weight"), before) and wants(view) == names


def test_copies_for_an_update_are_numbers_only():
    weight = torch.nn.Parameter(torch.ones(2))
    kept = copies({"w": weight})["w"]
    with torch.no_grad():
        weight.add_(1)
    assert kept.tolist() == [1.0, 1.0] and not kept.requires_grad


def test_one_that_wrote_earlier_is_not_taken_off_below_one_that_wrote_later():
    view = view_of()
    first, later = Full().attach(view), Full().attach(view)
    with pytest.raises(LuthierError, match="DenseTrainable came later and changed"):
        first.detach()
    later.detach()
    first.detach()


@pytest.mark.parametrize("tuner", [Adapter(rank=2), Lora(rank=2), Full()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_numbers_and_gives_parameters_and_weights_back(tuner, dtype):
    views = [view_of(), view_of()]
    for v in views:
        v.module.to(dtype)
    first, second = (tuner.attach(v) for v in views)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        for n in first.writes:
            first.view.weight(n).add_(1.0)
    state = first.state_dict()
    assert not any(t.requires_grad for t in state.values())
    second.load_state_dict({k: t.clone() for k, t in state.items()})
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(views[0].weight(n), views[1].weight(n)) for n in views[0].anatomy.parameters)


def test_whole_packed_tensors_are_refused():
    view, name = view_of(), "model.layers.0.mlp.up_proj.weight"
    module = view.layer("model.layers.0.mlp.up_proj")
    module.weight = torch.nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LuthierError, match=f"tuner: {name} is quantised"):
        DenseTrainable(view, [name])
    assert not view.attached


def test_a_head_beside_a_tuner_goes_on_from_an_earlier_stage_with_it():
    """A stage of SpIEL goes on at the earlier one's step; a resumed run does not add to its length."""
    tuner, stages = Spiel(density=0.05, reselect_every=3, window=2), []
    for _ in range(2):
        view = view_of("llama-classifier")
        stages.append(with_head(tuner.attach(view, total_steps=7), view.anatomy.task_head))
    first, second = stages
    first.inner.after_step(Clock(1, 7))
    with torch.no_grad():
        first.head.master("score.weight").add_(1.0)
    second.continue_from({k: t.clone() for k, t in first.state_dict().items()})
    assert (second.inner._steps, second.inner.total_steps) == (1, 8)
    assert torch.equal(second.head.master("score.weight"), first.head.master("score.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_the_tuner_trains_is_not_added_again(dtype):
    view = view_of("llama-classifier")
    view.module.to(dtype)
    trainable = Full().attach(view)
    assert with_head(trainable, view.anatomy.task_head) is trainable


def test_no_choice_is_counted_for_a_tuner_that_makes_none():
    assert Full().selections(100) == 0


def test_of_several_that_came_later_the_next_one_takes_over_what_wants_a_gradient():
    view = view_of()
    before = wants(view)
    first, second, third = (Lora(rank=2, seed=s).attach(view) for s in range(3))
    kept = {n for n, p in view.module.named_parameters() if any(p is q for q in second.parameters())}
    first.detach()
    third.detach()
    assert wants(view) == kept
    second.detach()
    assert wants(view) == before


def test_a_layer_under_an_hra_adapter_is_not_trained_whole():
    """It would train without effect."""
    view = view_of()
    around = Peft(type="HRA", targets=("layers.0.mlp.up_proj",)).attach(view)
    with pytest.raises(LuthierError, match=r"layers\.0\.mlp\.up_proj has an adapter of peft's HRA"):
        DenseTrainable(view, ["model.layers.0.mlp.up_proj.weight"])
    assert view.attached == [around]


def test_a_head_beside_a_tuner_leaves_its_tensors_trained_and_gives_both_their_gradients():
    view, name = view_of("llama-classifier"), "model.layers.0.mlp.up_proj.weight"
    view.module.to(torch.bfloat16)
    trainable = with_head(DenseTrainable(view, [name]), view.anatomy.task_head)
    assert wants(view) == {name, "score.weight"}
    for n in (name, "score.weight"):
        view.weight(n).grad = torch.full_like(view.weight(n), 0.5)
    trainable.after_backward()
    masters = trainable.inner.master(name), trainable.head.master("score.weight")
    assert all(m.grad.dtype == torch.float32 and bool((m.grad == 0.5).all()) for m in masters)
    assert view.weight(name).grad is None and view.weight("score.weight").grad is None


def test_an_update_of_a_head_alone_is_whole_tensors_and_one_of_nothing_is_a_difference_of_nothing():
    view = view_of("llama-classifier")
    assert [p.kind for p in DenseTrainable(view, ["score.weight"]).update().parts] == ["replace"]
    assert [(p.kind, *p.names()) for p in DenseTrainable(view, []).update().parts] == [("dense",)]


def test_groups_have_their_own_rates_times_their_factors():
    p = torch.nn.Parameter(torch.zeros(1))
    groups = [ParamGroup([p], 0.5), ParamGroup([p], 0.5, 0.0, 0.3)]
    assert as_dicts(groups, 0.2) == [{"params": [p], "lr": 0.1}, {"params": [p], "lr": 0.15, "weight_decay": 0.0}]
    assert default_optimizer(groups[:1], 0.2).defaults["fused"], "one kernel for all tensors"


def test_settings_of_gradients_are_refused_beside_a_tuner_whose_steps_take_none():
    plain = TrainSettings(lr_scheduler_type="constant", warmup_fraction=0.0)
    for settings, unread in (
        (plain.model_copy(update={"max_grad_norm": 2.0, "on_nan": "skip"}), ["max_grad_norm", "on_nan"]),
        (plain.model_copy(update={"adam_betas": (0.5, 0.9), "adam_eps": 1e-6}), ["adam_betas", "adam_eps"]),
        (plain.model_copy(update={"learning_rate": 0.5}), []),
        (None, []),
    ):
        found = FedKSeed().check(Facts(settings=settings))
        assert [p.key for p in found] == unread and Lora().check(Facts(settings=settings)) == []
        assert {p.what for p in found} <= {"is not read by fedkseed, whose steps take no gradient"}
