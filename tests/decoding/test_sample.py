"""Sampling: the nucleus by hand, shares of draws, and the neutral and the cold setting."""

import pytest
import torch

from luthier.decoding import Greedy, Sample
from luthier.decoding.sample import nucleus
from luthier.inference.services import lab_around
from luthier.testing.models import byte_tokenizer, tiny

PROMPTS = [[5, 6, 7], [40] * 9, [9]]


@pytest.fixture(scope="module")
def lab():
    return lab_around(tiny(vocab_size=260), byte_tokenizer())


def decoded(decoder, lab, prompts=PROMPTS, tokens=5):
    return decoder.decode({"model": lab.view()}, prompts, lab, tokens)


def test_nucleus_worked_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = nucleus(logits, 0.8).isfinite().tolist()
    assert kept == [[True, True, False, False], [False, False, True, True]]
    assert nucleus(logits, 0.81).isfinite().sum(-1).tolist() == [3, 3]
    assert nucleus(logits, 1e-6).isfinite().sum(-1).tolist() == [1, 1], "the likeliest always stays"
    assert torch.equal(nucleus(logits, 1.0), logits)
    assert nucleus(torch.zeros(1, 2), 0.5).isfinite().tolist() == [[True, False]], "one half is enough for one half"
    alike = nucleus(torch.zeros(1, 5000), 0.5).isfinite()[0]
    assert int(alike.sum()) == pytest.approx(2500, abs=2) and alike[: int(alike.sum())].all(), "of equal ones the first"


def test_cold_or_narrow_sampling_is_greedy(lab):
    greedy = decoded(Greedy(), lab)
    assert decoded(Sample(temperature=1e-4), lab) == greedy == decoded(Sample(top_p=1e-6), lab)
    assert decoded(Sample(temperature=5.0), lab) != greedy


def test_draws_have_the_softmax_of_cooled_logits():
    from luthier.inference.generation import drawn
    from luthier.support.rng import Streams

    logits, n = torch.tensor([0.0, 1.0, 2.0]), 6000
    seen = drawn([Streams(0).torch("t", i) for i in range(n)], 1.0)((logits / 0.5).expand(n, 3), range(n))
    share = torch.bincount(seen, minlength=3) / n
    torch.testing.assert_close(share, (logits / 0.5).softmax(-1), atol=0.02, rtol=0)


def test_logits_are_cooled_once(lab, monkeypatch):
    from luthier.decoding import sample

    seen, own = [], sample.drawn
    monkeypatch.setattr(
        sample, "drawn", lambda generators, temperature: seen.append(temperature) or own(generators, 1.0)
    )
    decoded(Sample(temperature=3.0), lab)
    assert seen == [1.0]


def test_the_seed_decides(lab):
    import dataclasses

    warm = Sample(temperature=3.0)
    other = dataclasses.replace(lab, seed=1)
    assert decoded(warm, lab) == decoded(warm, lab) != decoded(warm, other)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sample(**fields)
