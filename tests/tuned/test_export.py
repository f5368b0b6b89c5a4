"""What a finished run can become, and that it is still the same model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import luthier, rows, write
from helpers.finished import finished
from luthier.support.errors import LuthierError
from luthier.tuned.export import export
from luthier.tuned.gguf_file import gguf_name, permuted
from luthier.tuned.open import answers, open_run, scores


@pytest.fixture(scope="module", params=["lora", "full", "spiel"])
def run_folder(request, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write(folder, model_folder, train=rows(16), tuner=request.param)
    done = luthier("run", recipe, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_merged_folder_opens_with_transformers_and_equals_the_run(run_folder, tmp_path):
    result = export(run_folder, "hf", tmp_path / "m")
    assert result["difference"] < 1e-5
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        AutoTokenizer.from_pretrained(tmp_path / "m"),
    )
    run = open_run(run_folder)
    ids = torch.tensor([run.renderer.prompt_ids({"prompt": "say 7"})])
    assert (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "say 7"}], add_generation_prompt=True, return_dict=False
        )
        == ids[0].tolist()
    )
    with run.update.bind(run.view):
        torch.testing.assert_close(
            model(input_ids=ids).logits, run.view.module(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )
    text = (tmp_path / "m" / "README.md").read_text()
    assert text.startswith("---\nbase_model: ") and "license" not in text.split("---")[1]


def test_gguf_reads_back_as_the_run(run_folder, tmp_path):
    result = export(run_folder, "gguf", tmp_path / "g")
    assert result["difference"] < 0.02
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "g", gguf_file="model.gguf")
    run = open_run(run_folder)
    text = "say 7 <|im_end|> ok"
    assert tokenizer(text)["input_ids"] == run.renderer.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == run.renderer.tokenizer.chat_template
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "g" / "Modelfile").read_text()


@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_weights_of_half_precision_are_exported_without_its_rounding(model_folder, tmp_path, to):
    run = finished(tmp_path / "r", model_folder, dtype="bfloat16", tuner={"lora": {"rank": 4, "alpha": 64}})
    assert open_run(run).view.dtype == torch.bfloat16
    assert export(run, to, tmp_path / "x")["difference"] < 2e-3


@pytest.mark.parametrize("run_folder", ["lora"], indirect=True)  # whatever was tuned, files are read
def test_what_was_measured_before_is_read_without_a_model(run_folder, tmp_path, monkeypatch):
    from luthier.tuned import open as opening

    measured, scored = [], opening.scores
    monkeypatch.setattr(opening, "scores", lambda *words: measured.append(words) or scored(*words))

    def asked(*words):
        done = luthier("evaluate", run_folder, "--json", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    after = json.loads((run_folder / "run.json").read_text())["after"]
    assert {n: m["value"] for n, m in asked().items()} == {n: m["value"] for n, m in after.items()} and measured == []
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "say 5", "completion": "5 5"}) + "\n")
    first, again = asked("--data", other), asked("--data", other)
    assert first == again and len(measured) == 1 and first["loss"]["value"] != after["loss"]["value"]
    other.write_text(json.dumps({"prompt": "say 6", "completion": "6 6"}) + "\n")
    assert asked("--data", other) != first and len(measured) == 2


@pytest.mark.parametrize("run_folder", ["lora"], indirect=True)
def test_what_was_measured_before_is_read_without_torch(run_folder):
    import subprocess
    import sys

    code = (
        "import sys\nfrom luthier.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "evaluate", str(run_folder)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stderr == "False\n"


def test_evaluate_and_generate_see_the_tuned_model(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))  # measured anew, not read back
    after = json.loads((run_folder / "run.json").read_text())["after"]
    again = scores(run_folder, None, run_folder)
    assert {n: m["value"] for n, m in again.items()} == {
        n: pytest.approx(m["value"], rel=1e-4) for n, m in after.items()
    }
    samples = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    said = answers(run_folder, [s["prompt"] for s in samples], 6, base_too=True)
    assert [s["answer"] for s in said] == [s["after"] for s in samples]
    assert [s["base"] for s in said] == [s["before"] for s in samples]


def test_what_cannot_be_is_said(run_folder, tmp_path):
    with pytest.raises(LuthierError, match="there are hf, peft, gguf"):
        export(run_folder, "onnx", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    with pytest.raises(LuthierError, match="exists and is not empty"):
        export(run_folder, "hf", tmp_path / "full")
    with pytest.raises(LuthierError, match="is not a finished run"):
        open_run(tmp_path)
    (tmp_path / "update.json").write_text("{}")
    with pytest.raises(LuthierError, match="holds an update without a recipe"):
        open_run(tmp_path)
    if "lora" in str(run_folder):
        assert 0 <= export(run_folder, "peft", tmp_path / "p")["difference"] < 1e-4
    else:
        with pytest.raises(LuthierError, match="holds no low-rank adapter"):
            export(run_folder, "peft", tmp_path / "p")
        assert not (tmp_path / "p").exists() and not list(tmp_path.glob(".p.*"))


def test_a_spoilt_export_is_noticed_and_removed(run_folder, tmp_path, monkeypatch):
    from luthier.tuned import export as module

    whole = module._hf

    def spoilt(run, output, name):
        model = whole(run, output, name)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    monkeypatch.setattr(module, "_hf", spoilt)
    with pytest.raises(LuthierError, match=r"differs from the tuned model by .*; it was removed"):
        export(run_folder, "hf", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_names_and_rotary_order():
    assert gguf_name("model.layers.12.self_attn.q_proj.weight", "llama", 13) == "blk.12.attn_q.weight"
    with pytest.raises(LuthierError, match="no place in a llama file"):
        gguf_name("model.layers.0.experts.weight", "llama", 1)
    import numpy as np

    w = np.arange(8)[:, None]
    assert permuted(w, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_push_happens_only_when_asked_and_says_what_went_wrong(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    from luthier.tuned.export import push_to_hub

    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            if name == "no/token":
                raise LocalTokenNotFoundError("Token is required\nmore")
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    assert calls == [("me/mine", True), ("me/mine", str(tmp_path))]
    with pytest.raises(LuthierError, match=r"--push no/token: Token is required; .* log in with `hf auth login`"):
        push_to_hub(tmp_path, "no/token")
