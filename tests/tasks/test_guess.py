"""The task of a plain model, by its head and by the way it reads."""

import pytest

from luthier.tasks.guess import usual_task
from luthier.testing.models import view_of


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "masked-lm"), ("roberta", "masked-lm"),
        ("bert-classifier", "classification"),
    ],
)  # fmt: skip
def test_the_head_and_the_way_of_reading_decide(kind, task):
    assert usual_task(view_of(kind)).key() == task
