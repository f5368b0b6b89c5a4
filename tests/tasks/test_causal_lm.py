"""Causal language modelling: what is asked and wanted of every shape of row, and which tokens are supervised."""

import pytest
from transformers import AutoModelForCausalLM

from luthier.data.batch import IGNORE
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.support.errors import RecipeError
from luthier.tasks.causal_lm import CausalLm
from luthier.testing.models import byte_tokenizer, tiny

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def rendered(values):
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer)
    maker = CausalLm().maker(renderer, tiny().config, {})
    (row,) = prepare([Row("f:1", values)], renderer, maker=maker, max_length=200).rows
    return tokenizer, row


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"messages": TURNS}, ("two", "second")),
        ({"text": "t"}, ("", "t")),
        ({"text": "t", "prompt": "p", "completion": "c"}, ("p", "c")),
    ],
)
def test_the_last_question_and_its_answer_are_asked_and_wanted(values, asked):
    assert CausalLm().asked(Row("f:1", values), Renderer(byte_tokenizer())) == asked


@pytest.mark.parametrize("turns", [TURNS[:3], TURNS[1:2]])
def test_a_conversation_that_does_not_end_in_an_answer_to_a_question_is_refused(turns):
    with pytest.raises(RecipeError, match="f:1: does not end in an answer to a question"):
        CausalLm().asked(Row("f:1", {"messages": turns}), Renderer(byte_tokenizer()))


@pytest.mark.parametrize(
    ("values", "taught"),
    [
        ({"prompt": "say", "completion": "yes"}, ["yes"]),
        ({"messages": TURNS}, ["first", "second"]),
        ({"text": "whole"}, ["hole"]),
    ],
)
def test_answers_are_supervised_and_questions_are_not(values, taught):
    """Every token of a text is trained on but the first, which nothing predicts."""
    tokenizer, row = rendered(values)
    on = [i for i, y in zip(row["ids"], row["labels"], strict=True) if y != IGNORE]
    off = [i for i, y in zip(row["ids"], row["labels"], strict=True) if y == IGNORE]
    said, unsaid = tokenizer.decode(on), tokenizer.decode(off)
    assert all(words in said and words not in unsaid for words in taught)
    assert not any(q in said for q in ("say", "one", "two"))
    assert all(y in (IGNORE, i) for i, y in zip(row["ids"], row["labels"], strict=True))


def test_it_loads_a_model_with_the_head_of_a_language_model():
    assert CausalLm().auto(tiny().config) is AutoModelForCausalLM
