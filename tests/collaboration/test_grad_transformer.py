"""grad-transformer's parties: what each organisation gets, pooling, warnings, refusals, a killed provider."""

import logging

import pytest
import torch

from luthier.collaboration.contract import Contract, start_of
from luthier.collaboration.grad_transformer import GradTransformer, Organisation, Provider, shadow
from luthier.collaboration.messages import Message, Refused
from luthier.collaboration.parties import Tick, in_process
from luthier.collaboration.shadows import tuned
from luthier.collaboration.translators.base import Pairs
from luthier.collaboration.translators.ridge import Ridge
from luthier.collaboration.translators.transformer import Transformer
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.tuners.lora import Lora

NAMES = ("clinic", "lab", "ward")
SETTINGS = TrainSettings(max_steps=2, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0)
LORA = Lora(rank=2, alpha=32, targets=("q_proj", "v_proj"))
SETS = 8


class World:
    """Two tiny models, a contract and a translator that has learnt from a few shadow sets."""

    def __init__(self):
        self.small, self.large = view_of(layers=2), view_of(layers=3, seed=1, hidden_size=32)
        self.starts = start_of(self.small, LORA), start_of(self.large, LORA)
        self.contract = GradTransformer().agree([self.small, self.large], LORA, SETTINGS)
        sets = [many(seed) for seed in range(100, 100 + SETS)]
        x, y = (torch.cat([tuned(v, rows, LORA, SETTINGS) for rows in sets]) for v in (self.small, self.large))
        self.pairs = Pairs(x, y, torch.arange(SETS), *(s.side.kinds() for s in self.starts))
        self.fitted = Ridge().fit(self.pairs)

    def provider(self, journal=None, names=NAMES, fitted=None, **fields):
        learnt = fitted or self.fitted
        return Provider(self.contract, GradTransformer(**fields), self.starts, self.pairs, learnt, names, journal)

    def organisations(self, names=NAMES):
        return [Organisation(n, self.contract, self.small, many(i)) for i, n in enumerate(names)]


def many(seed):
    return rows_of((9, 5, 12, 7) * 2, seed)


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_large_model_may_have_a_rate_of_its_own(world):
    views, rows = [world.small, world.large], many(5)
    other = GradTransformer(large_learning_rate=2e-3).agree(views, LORA, SETTINGS)
    one, two = (shadow(c, views, rows, 0) for c in (world.contract, other))
    assert torch.equal(one["x"], two["x"]) and not torch.equal(one["y"], two["y"])
    alone = tuned(world.large, rows, LORA, SETTINGS.model_copy(update={"learning_rate": 2e-3, "seed": 1}))
    assert torch.equal(two["y"], alone) and other.digest != world.contract.digest


def carried(provider, parties, heard=lambda sent, disclosure: None):
    in_process([provider, *parties], provider.begin(), heard)
    return {p.name: p.update for p in parties}


def vector(world, seed):
    return tuned(world.small, many(seed), LORA, SETTINGS)


def coordinates(world, update):
    """[L, d] of an adapter that came back."""
    return type(update)(update.base, update.parts, world.starts[1].chart).coordinates()


def test_each_organisation_gets_the_translation_of_its_own_update(world):
    said = []
    updates = carried(world.provider(), world.organisations(), lambda s, d: said.append((s.message.header.kind, d)))
    for i, name in enumerate(NAMES):
        expected = world.fitted(vector(world, i))[0]
        assert torch.allclose(coordinates(world, updates[name]), expected, atol=1e-6)
        assert updates[name].base.same_base(world.large.base)
    with updates["lab"].bind(world.large):  # what comes back binds to the large model as it is
        pass
    assert [k for k, _ in said] == ["state"] * 3 + ["update"] * 3 + ["result"] * 3
    up = next(d for k, d in said if k == "update")
    assert "rows of clinic moved the small model" in up.what and up.to == "server"
    assert up.bytes[0] == vector(world, 0).numel() * 4 < up.bytes[1] and "audit" in up.promise


def test_pooling_before_and_after_and_an_update_for_whoever_was_late(world):
    xs = torch.cat([vector(world, i) for i in (0, 1)])
    for pool, expected in (("before", world.fitted(xs.mean(0)[None])[0]), ("after", world.fitted(xs).mean(0))):
        provider, parties = world.provider(pool=pool), world.organisations()
        states = {s.to: s.message for s in provider.begin()}
        for party in parties[:2]:
            provider.handle(party.handle(states[party.name])[0].message)
        results = provider.handle(Tick())
        assert {s.to for s in results} == set(NAMES), "the mean is everybody's"
        for sent, party in zip(results, parties, strict=True):
            party.handle(sent.message)
            assert torch.allclose(coordinates(world, party.update), expected, atol=1e-6)


def test_6_a_linear_map_may_pool_on_either_side_and_a_transformer_may_not(world):
    many_sets = world.pairs.take(torch.arange(SETS).repeat(3))._replace(shadow=torch.arange(3 * SETS))
    fitted = Transformer(width=16, layers=1, epochs=2).fit(many_sets)
    xs = torch.cat([vector(world, i) for i in range(3)])
    gap = lambda f: float((f(xs.mean(0)[None])[0] - f(xs).mean(0)).abs().max())  # noqa: E731
    assert gap(world.fitted) <= 1e-5 < gap(fitted)
    for pool, expected in (("before", fitted(xs.mean(0)[None])[0]), ("after", fitted(xs).mean(0))):
        provider = world.provider(fitted=fitted, pool=pool)
        carried(provider, world.organisations())
        assert torch.allclose(provider.translated["lab"], expected, atol=1e-6)


def test_updates_unlike_each_other_and_unlike_the_shadows_are_told(world, caplog):
    provider, (clinic, lab, _) = world.provider(pool="before", names=("clinic", "lab")), world.organisations()
    first, second = clinic.message(), lab.message()
    opposed = Message.of("update", *_as(second), {"update": -60 * first.tensors()["update"]}, notes={"rows": 8})
    with caplog.at_level(logging.WARNING):
        provider.handle(first)
        provider.handle(opposed)
    assert "mean cosine of -1.00: their mean is like none of them" in caplog.text
    assert [w.split(":")[0] for w in provider.report["lab"]["warnings"]] == ["lab", "lab"], "norm and distance"
    assert set(provider.report) == {"clinic", "lab"}, "by client"
    assert "from the updates of 2 organisations" in provider.disclosure(provider.results()[0]).what
    assert provider.cosine == pytest.approx(-1, abs=1e-5) and provider.report["clinic"]["rows"] == 8
    (refused,) = world.provider(strict=True).handle(opposed)
    assert refused.message.header.notes["name"] == "unlike"


def _as(message):
    return message.header.run, message.header.sender, message.header.base


def test_what_is_no_update_is_refused_by_name(world):
    clinic = world.organisations()[0].message()
    x = clinic.tensors()["update"]
    whole = x + world.starts[0].initial()
    cases = {
        "shape": x[:, :-1], "not-finite": x * float("nan"), "zero": 0 * x, "dtype": x.int(), "adapter": whole,
    }  # fmt: skip
    provider = world.provider()
    for name, tensor in cases.items():
        (answer,) = provider.handle(Message.of("update", *_as(clinic), {"update": tensor}, notes={"rows": 8}))
        assert answer.message.header.notes["name"] == name and not provider.gathering.arrived
    (answer,) = provider.handle(Message.of("update", *_as(clinic), {"other": x}, notes={"rows": 8}))
    assert answer.message.header.notes["name"] == "form"


def test_another_start_or_model_is_refused_before_anything_is_tuned(world):
    other = Lora(rank=2, alpha=32, targets=("q_proj", "v_proj"), seed=1)
    elsewhere = Contract(**{**dict(world.contract), "tuner": other})
    with pytest.raises(Refused, match="initial: clinic has"):
        Organisation("clinic", elsewhere, world.small, many(0))
    with pytest.raises(Refused, match="base: clinic has"):
        Organisation("clinic", world.contract, view_of(layers=2, seed=5), many(0))
    with pytest.raises(Refused, match="initial: the provider has"):
        starts = start_of(world.small, other), world.starts[1]
        Provider(world.contract, GradTransformer(), starts, world.pairs, world.fitted, NAMES)


def test_without_an_update_there_is_nothing_to_give(world):
    provider = world.provider()
    assert provider.handle(Tick()) == []
    with pytest.raises(LuthierError, match="clinic has sent no update"):
        provider.outcome("clinic")
    with pytest.raises(LuthierError, match="no result yet"):
        _ = world.organisations()[0].update
