"""What was measured is read again, under a key of everything that went into it; a damaged file is measured anew."""

from dataclasses import replace

import pytest
import torch

from luthier.data.rendering import Renderer
from luthier.evaluation import Calibration, Loss, Rouge
from luthier.run.score_cache import exam_key, kept, read
from luthier.testing.models import TEMPLATE, byte_tokenizer


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exam(exam_of):
    return exam_of([{"prompt": f"p{i}", "completion": "answer " * (i + 1)} for i in range(3)])


def test_it_is_measured_once(exam, own_cache):
    first = kept("k", exam, [Loss()])
    weight = exam.view.head_weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(0.5)
        again, anew = kept("k", replace(exam), [Loss()]), kept("other", replace(exam), [Loss()])
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert again.as_dict() == first.as_dict()
    assert anew.measures["loss"].value != first.measures["loss"].value
    assert read("k") is not None and read("never") is None
    assert sorted(f.stem for f in (own_cache / "scores").iterdir()) == ["k", "other"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"measures": [{}], "samples": []}', '{"measures": 3, "samples": []}'])
def test_a_damaged_file_is_measured_anew(exam, own_cache, text):
    first = kept("k", exam, [Loss()])
    (own_cache / "scores/k.json").write_text(text)
    assert read("k") is None
    assert kept("k", replace(exam), [Loss()]).measures["loss"].value == first.measures["loss"].value
    assert read("k").measures["loss"].value == first.measures["loss"].value


def test_the_key_changes_with_all_that_went_in(exam):
    def key(exam=exam, evaluators=(), model="m", rows="r"):
        return exam_key(exam, [Loss(), *evaluators], model, rows)

    said = Renderer(exam.renderer.tokenizer, "Be brief.", exam.renderer.plain)
    keys = [
        key(), key(model="n"), key(rows="s"), key(evaluators=[Calibration()]), key(replace(exam, lab=replace(exam.lab, seed=1))),
        key(replace(exam, lab=replace(exam.lab, text=said))), key(evaluators=[Rouge(rows=2)]), key(evaluators=[Rouge(rows=3)]),
    ]  # fmt: skip
    tokenizer = exam.renderer.tokenizer
    for other in (
        Renderer(tokenizer, ends=(5,)),
        Renderer(tokenizer, stop_strings=("\n",)),
        Renderer(byte_tokenizer(TEMPLATE + " ")),
    ):
        keys.append(key(replace(exam, lab=replace(exam.lab, text=other))))
    config, theta = exam.view.module.config, exam.view.module.config.rms_norm_eps
    config.rms_norm_eps = 0.5
    keys.append(key())
    config.rms_norm_eps = theta
    before = exam.view.module.dtype
    exam.view.module.to(torch.bfloat16)
    keys.append(key())
    exam.view.module.to(before)
    assert len(set(keys)) == len(keys) and key() == keys[0]
