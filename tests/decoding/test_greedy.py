"""Greedy decoding equals transformers' own, on every kind of cache, whatever the batch."""

import pytest
import torch

from luthier.decoding import Greedy
from luthier.inference import generation
from luthier.inference.generation import batches, generate
from luthier.inference.services import lab_around
from luthier.inference.session import Session, keeps_keys
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuners import Dept, Lora

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46, 47, 48], [9], [70, 71, 72, 73]]


def theirs(model, prompt, tokens, **more):
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0, **more
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3"])
def test_it_writes_what_transformers_writes(kind):
    model = tiny(kind, vocab_size=260)
    lab = lab_around(model, byte_tokenizer())
    renderer, view = lab.renderer, lab.view()
    assert keeps_keys(view)
    done = generate(view, PROMPTS, renderer, 12)
    for prompt, mine in zip(PROMPTS, done, strict=True):
        wanted = theirs(model, prompt, 12)
        cut = wanted[: wanted.index(2)] if 2 in wanted else wanted
        assert mine.text == renderer.tokenizer.decode(cut, skip_special_tokens=True) and mine.stopped == (2 in wanted)


def test_a_penalty_in_the_models_generation_config_is_not_applied():
    model = tiny(vocab_size=260)
    lab = lab_around(model, byte_tokenizer())
    before = Greedy().decode({"model": lab.view()}, PROMPTS, lab, 8)
    model.generation_config.repetition_penalty = 5.0
    assert Greedy().decode({"model": lab.view()}, PROMPTS, lab, 8) == before


def test_a_soft_prompt_is_seen_while_writing():
    model = tiny(vocab_size=260)
    lab = lab_around(model, byte_tokenizer())
    view = lab.view()
    plain = generate(view, PROMPTS, lab.renderer, 8)
    trainable = Dept(budget_length=12, length=4, max_length=16).attach(view)
    with torch.no_grad():
        trainable.vectors.normal_(std=3.0)
    live = generate(view, PROMPTS, lab.renderer, 8)
    update = trainable.update()
    wanted = theirs(model, PROMPTS[0], 8, attention_mask=torch.ones(1, 3, dtype=torch.long))
    trainable.detach()
    with update.bind(view):
        assert generate(view, PROMPTS, lab.renderer, 8) == live != plain
    assert generate(view, PROMPTS, lab.renderer, 8) == plain
    assert live[0].text == lab.renderer.tokenizer.decode([t for t in wanted if t != 2], skip_special_tokens=True)


def test_without_a_cache_the_same_is_written(monkeypatch):
    from luthier.inference import session

    lab = lab_around(tiny(vocab_size=260), byte_tokenizer())
    kept = generate(lab.view(), PROMPTS, lab.renderer, 8)
    monkeypatch.setattr(session, "keeps_keys", lambda view: False)
    assert generate(lab.view(), PROMPTS, lab.renderer, 8) == kept


@torch.no_grad()
def test_rows_that_leave_do_not_disturb_those_that_stay_and_buffers_grow():
    view = lab_around(tiny(vocab_size=260), byte_tokenizer()).view()
    tokens = torch.randint(3, 250, (80, 4), generator=torch.Generator().manual_seed(0))
    with Session(view, PROMPTS, 0) as whole:
        for step in tokens:
            whole.advance(step)
        last = whole.logits
        alone = view.module(input_ids=torch.tensor([[*PROMPTS[1], *tokens[:, 1].tolist()]])).logits[0, -1]
        torch.testing.assert_close(last[1], alone.float(), atol=1e-4, rtol=1e-4)
    rows = torch.tensor([3, 1])
    with Session(view, PROMPTS, 0) as part:
        for i, step in enumerate(tokens):
            if i == 10:
                part.keep(rows)
            part.advance(step if i < 10 else step[rows])
        torch.testing.assert_close(part.logits, last[rows], atol=1e-5, rtol=1e-5)


def test_batches_are_even_and_within_their_limits(monkeypatch):
    monkeypatch.setattr(generation, "ROWS", 3)
    monkeypatch.setattr(generation, "TOKENS", 40)
    assert list(batches([2, 9, 4, 4, 30, 1], 5)) == [[4], [1, 2], [3, 0, 5]]
    assert list(batches([], 5)) == []
    assert sorted(i for part in batches([7] * 10, 5) for i in part) == list(range(10))


def test_phases_reach_the_model_and_its_mode_comes_back():
    lab = lab_around(tiny(vocab_size=260), byte_tokenizer())
    view, seen = lab.view(), []
    from contextlib import nullcontext

    view.phases.append(lambda name: seen.append(name) or nullcontext())
    view.module.train()
    generate(view, PROMPTS, lab.renderer, 2)
    assert seen == ["generate"] and view.module.training
    list(lab.scorer.losses(view, [{"ids": [5, 6, 7], "labels": [-100, 6, 7], "key": "0"}]))
    assert seen == ["generate", "score"]
    trainable = Lora(rank=2).attach(view)
    assert len(view.phases) == 2
    trainable.detach()
    assert len(view.phases) == 1
