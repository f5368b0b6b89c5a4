"""Models made from local text: they read it, they are made once, and both sides share a tokenizer."""

import torch

from luthier.demos.local import Pretraining, Shape, byte_tokenizer, opened, pieces, pretrained, python_sources, rendered
from luthier.inference.scoring import mean_loss, row_scores
from luthier.support.rng import Streams

TEXTS = {"letters": "abcabcabc" * 300, "digits": "0123456789" * 300}
TINY = Shape(16, 2, 2, 1, 32)
ROWS = pieces(TEXTS, dict.fromkeys(TEXTS, 1.0), 1600, 40, Streams(0))


def test_any_text_comes_back_from_its_bytes():
    tokenizer, text = byte_tokenizer(), "héllo\n 'wörld'  \t☃ <|endoftext"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 257


def test_pieces_come_from_their_sources_in_their_shares():
    rows = pieces(TEXTS, {"letters": 3.0, "digits": 1.0}, 400, 20, Streams(0))
    got = [r["text"] for r in rows]
    letters = [p for p in got if p[0] in "abc"]
    assert all(len(p) == 20 and p in TEXTS["letters" if p[0] in "abc" else "digits"] for p in got)
    assert 260 < len(letters) < 340
    assert rows == pieces(TEXTS, {"digits": 1.0, "letters": 3.0}, 400, 20, Streams(0))
    assert rows != pieces(TEXTS, {"letters": 3.0, "digits": 1.0}, 400, 20, Streams(1))


def test_a_model_is_made_once_and_has_read_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    pretraining, steps = Pretraining(steps=120, batch=8, rate=1e-2), []
    folder = pretrained(ROWS, TINY, pretraining, steps.append)
    assert len(steps) == 120 and steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert pretrained(ROWS, TINY, pretraining, steps.append) == folder and len(steps) == 120
    view, larger = opened(folder), opened(pretrained(ROWS, TINY._replace(layers=3), pretraining._replace(steps=1)))
    assert view.base.tokenizer == larger.base.tokenizer and view.base.weights != larger.base.weights
    rows = rendered([{"text": "abcabcabcabcabc"}] * 4, view.tokenizer)
    wrong = rendered([{"text": "acbacbacbacbacb"}] * 4, view.tokenizer)
    seen, unseen = (mean_loss(row_scores(view, r, 1000)) for r in (rows, wrong))
    assert seen < unseen - 0.5
    short = [pretrained(ROWS, TINY, pretraining._replace(steps=1, seed=seed)) for seed in (0, 1)]
    assert opened(short[0]).base.weights != opened(short[1]).base.weights


def test_the_same_pretraining_gives_the_same_model(tmp_path, monkeypatch):
    pretraining, made = Pretraining(steps=5, batch=4), []
    for name in ("a", "b"):
        monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / name))
        torch.manual_seed(len(made))  # whatever ran before
        made.append(opened(pretrained(ROWS, TINY, pretraining)).base.weights)
    assert made[0] == made[1]


def test_rows_with_answers_supervise_the_answer_and_its_end():
    row = rendered([{"prompt": "ab\n", "completion": "cd"}], byte_tokenizer())[0]
    assert row["labels"][:3] == [-100] * 3 and row["labels"][3:] == row["ids"][3:] and row["ids"][-1] == 0


def test_every_python_brings_several_kinds_of_text():
    found = python_sources()
    assert len(found) == 5 and all(len(t) > 200_000 for t in found.values())
