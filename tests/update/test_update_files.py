"""Updates on disk: where they are written, what peft would read otherwise, what is checked when they are read again."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.support.errors import LuthierError
from luthier.testing.architectures import tiny_model
from luthier.testing.models import tiny, view_of
from luthier.update import Dense, LowRank, Prompt, Replace, Update, files
from luthier.update.base import PeftFolder
from luthier.update.files import load, peft_misreads, save_update, verify_update

Q = "model.layers.0.self_attn.q_proj.weight"
VIEW = view_of()
FACTORS = LowRank({Q: torch.ones(2, 32)}, {Q: torch.ones(32, 2)}, {Q: 0.5})


def of(*parts):
    return Update(VIEW.base, parts)


def test_folders_are_made_and_written_a_second_time(tmp_path):
    for value in (1.0, 2.0):
        save_update(of(Dense({Q: torch.full((32, 32), value)})), tmp_path / "some/where")
        again = load(tmp_path / "some/where")
        assert torch.equal(again.dense()[Q], torch.full((32, 32), value)) and again.chart is None


def test_what_pefts_folder_does_not_hold_is_written_as_ours(tmp_path):
    for i, more in enumerate((Prompt(torch.ones(3, 32)), Replace({"model.norm.weight": torch.ones(32)}))):
        save_update(of(FACTORS, more), tmp_path / str(i), VIEW)
        assert not (tmp_path / str(i) / "adapter_config.json").exists()
        assert [p.kind for p in load(tmp_path / str(i)).parts] == ["lowrank", more.kind]
    save_update(of(FACTORS), tmp_path / "alone", VIEW)
    assert (tmp_path / "alone" / "adapter_config.json").exists() and load(tmp_path / "alone").chart is None


@pytest.mark.parametrize(("format", "shown"), [(2, "2"), (None, "None"), ("1", "'1'")])
def test_another_format_is_refused(format, shown, tmp_path):
    save_update(of(Dense({Q: torch.ones(32, 32)})), tmp_path)
    header = json.loads((tmp_path / "update.json").read_text())
    assert header["format"] == 1
    (tmp_path / "update.json").write_text(json.dumps({**header, "format": format}))
    with pytest.raises(LuthierError, match=rf"update\.json: format is {shown}, this luthier reads 1; open it with the"):
        load(tmp_path)


def test_a_header_is_read_up_to_the_limit(tmp_path, monkeypatch):
    save_update(of(Dense({Q: torch.ones(32, 32)})), tmp_path)
    size = (tmp_path / "update.json").stat().st_size
    monkeypatch.setattr(files, "MAX_HEADER", size)
    load(tmp_path)
    monkeypatch.setattr(files, "MAX_HEADER", size - 1)
    with pytest.raises(LuthierError, match=rf"update\.json: is larger than {size - 1} bytes"):
        load(tmp_path)


# --- what peft would read otherwise ---


def adapter(module, kind="LORA", **more):
    factors = {f"base_model.model.{module}.lora_A.weight": torch.ones(2, 32),
               f"base_model.model.{module}.lora_B.weight": torch.ones(32, 2)}  # fmt: skip
    return PeftFolder({"peft_type": kind, "r": 2, "target_modules": [module], **more}, factors)


@pytest.mark.parametrize(
    ("saved", "misread"),
    [(None, False), (["classifier"], False), (["pooler"], False), (["dense"], True), (["ooler"], True)],
    ids=["no head", "the model's own head", "further down", "many of this name", "the end of a name"],
)
def test_a_head_is_for_peft_where_one_module_has_its_name(saved, misread):
    model = tiny("bert-classifier")
    shared = adapter("bert.encoder.layer.0.attention.self.query", modules_to_save=saved)
    assert peft_misreads(model, shared) == misread


def test_experts_that_are_stacked_take_the_names_of_other_layers():
    model = tiny_model("deepseek_v3")
    for module, misread in (
        ("model.layers.0.self_attn.o_proj", False),
        ("model.layers.0.mlp.down_proj", True),  # left out without a word
        ("model.layers.0.mlp.gate_proj", True),  # an error of peft's
    ):
        assert peft_misreads(model, adapter(module)) == misread
        assert not peft_misreads(model, adapter(module, "IA3")), "only LoRA's names are turned"


def test_what_peft_would_misread_is_written_as_ours(tmp_path, monkeypatch):
    for misread in (True, False):
        monkeypatch.setattr(files, "peft_misreads", lambda model, shared, misread=misread: misread)
        save_update(of(FACTORS), tmp_path / f"{misread}", VIEW)
        assert (tmp_path / f"{misread}" / "adapter_config.json").exists() != misread
        save_update(of(FACTORS), tmp_path / f"{misread} without a model")
        assert (tmp_path / f"{misread} without a model" / "adapter_config.json").exists()


# --- what is checked after a run ---


class Said:
    """A view whose states are given: of the live model, of the base, of the reloaded update.

    heads   its task head's values
    logits  what its language-model head makes of the last state
    """

    def __init__(self, live, base, reloaded, dtype, heads=None, logits=None):
        self.device, self.dtype, self.module, self.heads, self.logits = "cpu", dtype, nn.Identity(), heads, logits
        self.anatomy = SimpleNamespace(task_head=["score.weight"] if heads else [], head="lm_head" if logits else None)
        self.states, self.now = {"live": live, "base": base, "reloaded": reloaded}, "live"

    def trace(self, batch):
        return SimpleNamespace(hidden=[None, torch.tensor(self.states[self.now])])

    def weight(self, name):
        return nn.Parameter(torch.tensor([[self.heads[self.now]]]))

    def head_logits(self, hidden):
        assert hidden.tolist() == self.states[self.now][-1:]
        return torch.tensor([[self.logits[self.now]]])

    def detach(self):
        self.now = "base"

    @contextmanager
    def bind(self, view):
        assert view is self and self.now == "base"
        self.now = "reloaded"
        yield
        self.now = "base"


@pytest.mark.parametrize(
    ("live", "base", "reloaded", "dtype", "worst"),
    [
        # 1e-4 of the largest state, 8: at most 8e-4
        ([-8.0, 0.5], [-8.0, 1.5], [-7.9993, 0.4999], torch.float32, 7e-4),
        ([-8.0, 0.5], [-8.0, 1.5], [-7.9991, 0.5], torch.float32, None),
        # states below 1 count as 1: at most 1e-4
        ([0.5, 0.25], [0.0, 0.25], [0.50009, 0.25], torch.float32, 9e-5),
        ([0.5, 0.25], [0.0, 0.25], [0.50015, 0.25], torch.float32, None),
        # exactly at the limit: 0.25 of 4
        ([4.0, 0.0], [5.0, 0.0], [3.0, 0.0], torch.bfloat16, 1.0),
    ],
)
def test_the_reloaded_update_is_the_live_one_up_to_rounding(live, base, reloaded, dtype, worst, monkeypatch, tmp_path):
    view = Said(live, base, reloaded, dtype)
    monkeypatch.setattr(files, "load", lambda folder: view)
    row = {"ids": [1, 2], "labels": [1, 2], "key": "the first"}
    if worst is None:
        with pytest.raises(LuthierError, match="what was saved is not what was trained"):
            verify_update(tmp_path, view.detach, view, row)
    else:
        assert verify_update(tmp_path, view.detach, view, row) == pytest.approx(worst, rel=1e-2)
    assert view.now == "base"


@pytest.mark.parametrize(("reloaded", "words"), [(0.5, None), (0.6, "what was saved is not what was trained")])
def test_a_task_head_is_compared_too(reloaded, words, monkeypatch, tmp_path):
    same = [1.0, 2.0]
    view = Said(same, same, same, torch.float32, {"live": 0.5, "base": 0.25, "reloaded": reloaded})
    monkeypatch.setattr(files, "load", lambda folder: view)
    row = {"ids": [1, 2], "labels": [1, 2], "key": "the first"}
    with pytest.raises(LuthierError, match=words) if words else nullcontext():
        assert verify_update(tmp_path, view.detach, view, row) == 0.0


@pytest.mark.parametrize(("reloaded", "words"), [(0.5, None), (0.6, "what was saved is not what was trained")])
def test_logits_are_compared_where_the_head_alone_has_changed(reloaded, words, monkeypatch, tmp_path):
    same = [1.0, 2.0]
    view = Said(same, same, same, torch.float32, logits={"live": 0.5, "base": 0.25, "reloaded": reloaded})
    monkeypatch.setattr(files, "load", lambda folder: view)
    row = {"ids": [1, 2], "labels": [1, 2], "key": "the first"}
    with pytest.raises(LuthierError, match=words) if words else nullcontext():
        assert verify_update(tmp_path, view.detach, view, row) == 0.0


def test_the_model_that_was_trained_is_not_the_base(monkeypatch, tmp_path):
    view = Said([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], torch.float32)
    monkeypatch.setattr(files, "load", lambda folder: view)
    with pytest.raises(LuthierError, match="the tuned model equals the base model on the first; nothing was learnt"):
        verify_update(tmp_path, view.detach, view, {"ids": [1, 2], "labels": [1, 2], "key": "the first"})
