"""Canaries: alike but for the coin, exposure against its closed form, and a model that has learnt them by heart."""

import math

import numpy as np
import pytest

from luthier.collaboration.audit.canaries import canaries, exposures, extracted, memory, planted_rows
from luthier.data.rendering import Renderer
from luthier.demos.local import SMALL, byte_tokenizer
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.full import Full


@pytest.fixture(scope="module")
def reader():
    """A byte model of fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=SMALL.hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=SMALL.inner, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return ModelView(LlamaForCausalLM(config).eval(), tokenizer), Renderer(tokenizer, plain=True)


def test_halves_are_alike_and_share_no_name():
    planted, controls = canaries(30, Streams(0))
    assert [c.form for c in planted] == [c.form for c in controls] and len({c.prefix for c in planted + controls}) == 60
    assert canaries(30, Streams(0)) == (planted, controls) != canaries(30, Streams(1))
    assert {len(c.secret) for c in planted if c.form == "number"} == {8}


def test_exposure_of_an_untuned_model_is_that_of_a_random_rank(reader):
    _, controls = canaries(40, Streams(3))
    found = exposures(*reader, controls, 15, 8192, Streams(0))
    expected = np.mean([4 - math.log2(r) for r in range(1, 17)])  # 16 equally likely ranks
    assert found.mean() == pytest.approx(expected, abs=3 * found.std() / math.sqrt(40)) and found.max() <= 4.0


def test_a_model_that_has_learnt_them_by_heart_gives_them_away_and_controls_stay_hidden(reader):
    view, renderer = reader
    planted, controls = canaries(3, Streams(1))
    rows = planted_rows(planted, renderer)
    settings = TrainSettings(max_steps=80, batch_size=3, learning_rate=1e-2, warmup_fraction=0.0)
    trainable = Full().attach(view, None, 80)
    loop = Loop(view, rows, trainable, Sft(), settings)
    for _ in range(80):
        loop.step()
    found = memory(view, renderer, planted, controls, others=15, samples=1, streams=Streams(0))
    trainable.detach()
    assert found.extracted == 1.0 and found.extracted_controls == 0.0 and found.weak
    assert found.exposure == found.highest == 4.0 and found.exposure_controls < 3 and found.error < 1
    again = memory(view, renderer, planted, controls, others=15, samples=1, streams=Streams(0))
    assert again.extracted == 0.0, "the base knows none"
    assert not extracted(view, renderer, planted, 0, Streams(0)).any()


def test_one_canary_alone_is_refused():
    with pytest.raises(LuthierError, match="canaries: 1; use 2 or more, or 0"):
        canaries(1, Streams(0))


def test_a_control_that_was_planted_is_refused(reader):
    planted, _ = canaries(6, Streams(1))
    with pytest.raises(ValueError, match="controls nothing"):
        memory(*reader, planted, planted[:1], streams=Streams(0))
