"""The contract's refusals, shadow runs and what is said of an update's likeness; numbers in names are the sheet's."""

import numpy as np
import pytest
import torch

from luthier.collaboration.contract import Contract, refuse_other, refuse_vector, start_of
from luthier.collaboration.controls import controls, gap_recovered, mean_shadow, pooled, share_of_gain
from luthier.collaboration.grad_transformer import GradTransformer, shadow
from luthier.collaboration.messages import Refused
from luthier.collaboration.privacy import Privacy
from luthier.collaboration.shadows import draw, tuned
from luthier.collaboration.similarity import likeness, mean_cosine
from luthier.collaboration.translators.base import Pairs
from luthier.collaboration.translators.ridge import Ridge
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.testing.models import batch_of, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora
from luthier.update.packing import kinds

TUNER = Lora(rank=2, alpha=32, targets=("q_proj", "v_proj"))
SETTINGS = TrainSettings(max_steps=4, batch_size=4, learning_rate=1e-2)


def logits(view):
    with torch.no_grad():
        return view.module(input_ids=batch_of().ids[None]).logits


@pytest.fixture(scope="module")
def start():
    return start_of(view_of(), TUNER)


def test_the_start_is_the_same_wherever_it_is_made_and_leaves_the_model_alone(start):
    view = view_of()
    before = {n: p.clone() for n, p in view.module.named_parameters()}
    assert start_of(view, TUNER).side == start.side
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters())
    assert start_of(view, TUNER.model_copy(update={"seed": 1})).side.initial != start.side.initial


def test_2_the_recorded_update_reproduces_the_tuned_model_and_zero_changes_nothing(start):
    view = view_of()
    untouched = logits(view)
    with start.update(torch.zeros(start.side.layout)).bind(view):
        assert torch.equal(logits(view), untouched)
    vectors = tuned(view, rows_of(), TUNER, SETTINGS)
    assert torch.equal(logits(view), untouched)
    trainable = TUNER.attach(view, None, 4)
    loop = Loop(view, rows_of(), trainable, Sft(), SETTINGS)
    for _ in range(4):
        loop.step()
    live = logits(view)
    trainable.detach()
    assert not torch.allclose(live, untouched, atol=1e-4)
    with start.update(vectors[-1]).bind(view):
        assert torch.allclose(logits(view), live, atol=1e-5)


def test_snapshots_are_one_an_optimiser_step():
    view = view_of()
    all_four, last = tuned(view, rows_of(), TUNER, SETTINGS, 4), tuned(view, rows_of(), TUNER, SETTINGS)
    assert all_four.shape[0] == 4 and torch.equal(all_four[-1], last[0])
    assert len({tuple(s.flatten().tolist()) for s in all_four}) == 4
    with pytest.raises(ValueError, match="5 snapshots of a run of 4 steps"):
        tuned(view, rows_of(), TUNER, SETTINGS, 5)


def test_a_run_that_is_stopped_leaves_the_base():
    view = view_of()
    before = logits(view)

    def stop(what, done, total):
        assert (what, total) == ("tune    step", 4)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(view, rows_of(), TUNER, SETTINGS, progress=stop)
    assert torch.equal(logits(view), before)


def test_under_a_promise_the_small_side_is_as_noisy_as_a_clients_and_the_large_one_is_not():
    small, large = view_of(layers=2), view_of(layers=3, seed=1)
    rows, loud = rows_of(), Privacy(epsilon=0.5, delta=0.01)
    plain, private = (GradTransformer(privacy=p).agree([small, large], TUNER, SETTINGS) for p in (None, loud))
    quiet, noisy = (shadow(c, [small, large], rows, 0) for c in (plain, private))
    again = shadow(private, [small, large], rows, 0)
    assert torch.equal(quiet["y"], noisy["y"]), "public rows of the large model need no promise"
    assert not torch.allclose(quiet["x"], noisy["x"]) and not torch.equal(noisy["x"], again["x"]), (
        "noise is the machine's own"
    )
    assert plain.digest != private.digest, "what clients promise is part of what is agreed on"


def test_sets_mix_sorts_in_shares_of_their_own_where_rows_tell_them_apart():
    sorts = ["a"] * 60 + ["b"] * 60 + ["c"] * 60
    mixed = draw(sorts, 40, 20, Streams(0), concentration=0.05)
    alike = draw(sorts, 40, 20, Streams(0))
    largest = lambda sets: np.mean([max(sum(sorts[i] == s for i in one) for s in "abc") for one in sets])  # noqa: E731
    assert largest(mixed) > 17 > 12 > largest(alike) and all(len(set(one)) == 20 for one in mixed)
    assert mixed[:7] == draw(sorts, 7, 20, Streams(0), concentration=0.05)


def test_shadow_sets_are_drawn_alike_everywhere_and_independently():
    sets = draw(range(50), 6, 10, Streams(3))
    assert sets == draw(range(50), 6, 10, Streams(3)) and sets[:4] == draw(range(50), 4, 10, Streams(3))
    assert all(len(set(s)) == 10 for s in sets)
    assert sets != draw(range(50), 6, 10, Streams(4)) and len({tuple(s) for s in sets}) == 6
    with pytest.raises(ValueError, match="51 rows cannot be drawn from 50"):
        draw(range(50), 1, 51, Streams(0))


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: start_of(view_of(seed=1), TUNER), "base"),
        (lambda: start_of(view_of(), TUNER.model_copy(update={"seed": 1})), "initial"),
        (lambda: start_of(view_of(), Lora(rank=2, alpha=32, targets=("q_proj",))), "initial"),
        (lambda: start_of(view_of(), TUNER.model_copy(update={"alpha": 16.0})), "scale"),
    ],
)
def test_9_another_start_is_refused_by_the_name_of_what_differs(start, other, name):
    with pytest.raises(Refused) as caught:
        refuse_other(other().side, start.side, "clinic")
    assert caught.value.name == name and "clinic" in str(caught.value)
    refuse_other(start.side, start.side, "clinic")


def test_a_contract_has_one_digest_and_every_part_counts(start):
    contract = Contract(small=start.side, large=start.side, tuner=TUNER, settings=SETTINGS)
    assert Contract.model_validate_json(contract.model_dump_json()).digest == contract.digest
    for change in ({"settings": TrainSettings(max_steps=5)}, {"packing": 2}, {"tuner": Lora(rank=3)}):
        assert contract.model_copy(update=change).digest != contract.digest


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x, s: x.long(), "dtype"),
        (lambda x, s: x[:1], "shape"),
        (lambda x, s: x.index_fill(1, torch.tensor([0]), float("nan")), "not-finite"),
        (lambda x, s: torch.zeros_like(x), "zero"),
        (lambda x, s: x + s.initial(), "adapter"),
    ],
)
def test_vectors_that_are_no_update_are_refused_by_name(start, change, name):
    x = tuned(view_of(), rows_of(), TUNER, SETTINGS)[0]
    refuse_vector(x, start, "clinic")
    with pytest.raises(Refused) as caught:
        refuse_vector(change(x, start), start, "clinic")
    assert caught.value.name == name


def shadows(n=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 3, generator=g)
    shapes = {"a.m.0.q.weight": (2, 3), "b.m.0.q.weight": (4, 2)}
    x = (hidden @ torch.randn(3, 14, generator=g)).view(n, 1, 14) * 1e-2
    y = (hidden @ torch.randn(3, 14, generator=g)).view(n, 1, 14) * 1e-2
    return Pairs(x, y, torch.arange(n), kinds(shapes), kinds(shapes))


def test_an_update_like_no_shadow_is_said_to_be_with_its_numbers():
    pairs = shadows()
    usual = likeness(0.5 * (pairs.x[0] + pairs.x[1]), pairs)
    far = likeness(pairs.x[0] + 0.1 * torch.randn(1, 14, generator=torch.Generator().manual_seed(1)), pairs)
    large = likeness(20 * pairs.x[0], pairs)
    assert far.distance > far.limit and "away" in far.warnings("clinic")[-1]
    assert large.norm > 5 and "clinic: its norm is" in large.warnings("clinic")[0]
    assert usual.distance < far.distance
    assert likeness(pairs.x[3], pairs).warnings("clinic") == [] and likeness(pairs.x[3], pairs).distance < 1e-2


def test_controls_know_what_they_should_and_no_more():
    pairs = shadows()
    clients = pairs.x[:4]
    made = controls(pairs, clients, Ridge(), Streams(0))
    assert not made["C0 no update"].any()
    assert (
        torch.equal(made["C1 mean shadow"], mean_shadow(pairs, clients))
        and len(made["C1 mean shadow"].unique(dim=0)) == 1
    )
    assert torch.equal(made["C3 nearest shadow"], pairs.y[:4])
    error = {k: float((v - pairs.y[:4]).norm()) for k, v in made.items()}
    assert error["C4 ridge"] < 0.5 * error["C1 mean shadow"] < error["C5 shuffled pairs"]


def test_6_pooling_equal_clients_is_one_client_and_order_does_not_matter():
    x = shadows().x
    same = {name: x[0] for name in ("a", "b", "c")}
    assert torch.equal(pooled(same), x[0])
    ab, ba = {"a": x[0], "b": x[1], "c": x[2]}, {"c": x[2], "b": x[1], "a": x[0]}
    assert torch.equal(pooled(ab), pooled(ba))
    assert torch.allclose(pooled({"a": x[0], "b": x[1]}), 0.5 * x[0] + 0.5 * x[1])
    with pytest.raises(ValueError, match="no update has arrived"):
        pooled({})


def test_cosine_of_clients():
    x = torch.eye(4).view(4, 1, 4)
    assert mean_cosine(x) == pytest.approx(0, abs=1e-6)
    assert mean_cosine(x[:1].expand(3, 1, 4)) == pytest.approx(1)


def test_measures_of_a_translation():
    assert gap_recovered(61.02, 48.43, 58.66) == pytest.approx(123.07, abs=0.01)  # AQuA-RAT in the paper
    assert share_of_gain(1.3014, 1.3676, 1.2929) == pytest.approx(0.886, abs=0.001)


def test_a_lab_without_shadow_runs_or_models_says_so():
    seen = []
    bare, full = Lab(), Lab(shadowing=lambda sets, snapshots: seen.append((sets, snapshots)) or [{}])
    with pytest.raises(LuthierError, match="nothing here reads shadow runs; give the lab a service that does"):
        bare.shadows(2, 1)
    assert full.shadows(3, 2) == [{}] and seen == [(3, 2)]
    with pytest.raises(LuthierError, match="there is no model called 'small' here"):
        GradTransformer().alone("clinic", None, bare, [])
