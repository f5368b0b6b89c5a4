"""Loss and bits a byte against transformers' own loss."""

import math

import pytest
import torch

from luthier.data.batch import IGNORE
from luthier.evaluation import Loss

ROWS = [{"prompt": "say one", "completion": "the first"}, {"prompt": "say two", "completion": "thé second answer"}]


def test_loss_is_the_models_own_over_all_supervised_tokens(exam_of):
    exam = exam_of(ROWS)
    loss, bits = Loss().evaluate(exam)
    nats = []
    for row in exam.rows:
        ids, labels = torch.tensor([row["ids"]]), torch.tensor([row["labels"]])
        mean = exam.view.module(input_ids=ids, labels=labels).loss
        nats.append(float(mean) * int((labels[0, 1:] != IGNORE).sum()))
    tokens = sum(sum(y != IGNORE for y in r["labels"]) for r in exam.rows)
    assert loss.value == pytest.approx(sum(nats) / tokens, rel=1e-5) and not loss.higher
    size = len(b"the first") + len("thé second answer".encode())
    assert bits.value == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    assert loss.keys == ("1", "2") and loss.stats[:, 0] == pytest.approx(nats, rel=1e-5)


def test_without_rows_there_is_nothing_to_measure(exam_of):
    assert Loss().evaluate(exam_of([])) == []
