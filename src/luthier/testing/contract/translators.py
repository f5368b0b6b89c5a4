"""Tests of every translator: the form of its results, equal results from equal pairs, and what it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from luthier.collaboration.translators.base import Fitted, Pairs, Translator
from luthier.step.lab import Lab
from luthier.testing.contract.examples import Example

SETS = 24  # shadow sets; translators that learn in epochs need so many
SMALL, LARGE = (2, 12), (3, 20)  # (layers, numbers in each layer)


def pairs_for(scale: float = 2.0**-8, seed: int = 0) -> Pairs:
    """Pairs whose two sides are linear functions of the same three hidden numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(SETS, 3, generator=generator)
    x, y = (scale * (hidden @ torch.randn(3, a * d, generator=generator)).view(SETS, a, d) for a, d in (SMALL, LARGE))
    kinds = [torch.arange(d).ge(d // 2).to(torch.int8).expand(a, d) for a, d in (SMALL, LARGE)]
    return Pairs(x, y, torch.arange(SETS), *kinds)


def fitted(translate: Example, pairs: Pairs) -> Fitted:
    """The translator after it has learnt these pairs."""
    assert isinstance(translate.method, Translator)
    return translate.method.fit(pairs, Lab())


@cache
def learnt(translate: Example) -> Fitted:
    """The translator after it has learnt the usual pairs, once for all tests."""
    return fitted(translate, pairs_for())


def test_a_translation_has_the_form_of_the_large_model_and_is_near(translate: Example) -> None:
    pairs = pairs_for()
    out = learnt(translate)(pairs.x)
    assert out.shape == pairs.y.shape and out.dtype == torch.float32 and out.isfinite().all()
    off, none = (float((guess - pairs.y).square().sum()) for guess in (out, pairs.y.mean(0)))
    assert off < 0.9 * none, "nearer than the mean of all shadow updates"


def test_an_update_is_translated_by_itself(translate: Example) -> None:
    """Its translation is the same alone, among others and in any order; a second call gives the same bits."""
    x, one = pairs_for(seed=1).x, learnt(translate)
    together = one(x)
    assert torch.equal(together, one(x))
    alone = torch.cat([one(v[None]) for v in x])
    for other in (alone, one(x.flip(0)).flip(0)):
        torch.testing.assert_close(other, together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def test_the_same_pairs_give_the_same_translator(translate: Example) -> None:
    """To the bit, for any state of the global generator. The generator and the pairs do not change."""
    pairs, before = pairs_for(), pairs_for()
    torch.manual_seed(12)
    state = torch.get_rng_state()
    again = fitted(translate, pairs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again(pairs.x), learnt(translate)(pairs.x)) and again.epochs == learnt(translate).epochs
    assert [e["epoch"] for e in again.epochs] == list(range(1, len(again.epochs) + 1))
    assert all(torch.equal(a, b) for a, b in zip(pairs, before, strict=True))


def test_small_updates_are_learnt_as_well_as_large_ones(translate: Example) -> None:
    """With the standard form, pairs that are smaller by a power of two give translations that are smaller by the same factor."""
    assert isinstance(translate.method, Translator)
    if not translate.method.standardise:
        return
    half = 2.0**-4
    usual, small = pairs_for(), pairs_for(scale=2.0**-12)
    assert torch.equal(small.x, half * usual.x)
    found, expected = fitted(translate, small)(small.x), half * learnt(translate)(usual.x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p._replace(y=p.y[:-1]), "pair them up"),
        (lambda p: p._replace(x=p.x[:, :, 1:]), "pairs.x is"),
        (lambda p: p._replace(y=p.y * float("nan")), "pairs.y: .* not finite"),
        (lambda p: p._replace(shadow=torch.zeros_like(p.shadow)), "1 shadow sets where"),
    ],
    ids=["unpaired", "another layout", "not finite", "one set"],
)
def test_unusable_pairs_are_refused(translate: Example, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fitted(translate, change(pairs_for()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :, 1:], r"\(2, 11\), the translator learnt \(2, 12\)"),
        (lambda x: x[:, 1:], r"\(1, 12\), the translator learnt \(2, 12\)"),
        (lambda x: x * float("inf"), "not finite"),
        (lambda x: (100 * x).long(), "no real numbers"),
    ],
    ids=["narrower", "fewer layers", "not finite", "whole numbers"],
)
def test_unusable_updates_are_refused(translate: Example, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learnt(translate)(change(pairs_for().x))


__all__ = [
    "test_a_translation_has_the_form_of_the_large_model_and_is_near",
    "test_an_update_is_translated_by_itself",
    "test_small_updates_are_learnt_as_well_as_large_ones",
    "test_the_same_pairs_give_the_same_translator",
    "test_unusable_pairs_are_refused",
    "test_unusable_updates_are_refused",
]
