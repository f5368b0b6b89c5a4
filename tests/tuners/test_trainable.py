"""What every trainable does: what it puts on a model comes off again, whatever came before and after; and a head beside it."""

import pytest
import torch

from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import batch_of, labelled_rows, view_of
from luthier.training.loop import Loop
from luthier.tuners import Full, Lora
from luthier.tuners.base import copies, with_head


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
