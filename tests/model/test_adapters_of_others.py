"""LoRA adapters that peft wrote elsewhere: as a model (merged), and as a start (kept)."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.commands import luthier, write
from helpers.finished import finished
from luthier.model.loading import load_model, load_tokenizer, locate
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.export import export

IDS = torch.tensor([[5, 9, 30, 7, 99]])


@pytest.fixture
def base(tmp_path):
    tiny("llama", vocab_size=260, layers=2, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base, name="theirs", config=None, **more):
    """An adapter with random factors, in a folder beside the base."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or LoraConfig(**settings))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    model.save_pretrained(base.parent / name)
    return base.parent / name


def edit(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def theirs(base, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_an_adapter_as_a_model_is_merged_into_its_base(how, base):
    folder = adapter(base, **how)
    view = load_model(locate(str(folder)), device="cpu")
    torch.testing.assert_close(logits(view.module), theirs(base, folder), rtol=1e-4, atol=1e-5)
    assert float((logits(view.module) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-3
    assert not any("lora" in n for n, _ in view.module.named_modules())
    assert view.base != load_model(locate(str(base)), device="cpu").base


def test_pickled_factors_are_read_too(base):
    folder = adapter(base)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    whole = theirs(base, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(
        logits(load_model(locate(str(folder)), device="cpu").module), whole, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["base", "/somewhere/else/base", "../base"])
def test_the_base_is_found_beside_the_adapter(name, base):
    folder = adapter(base)
    edit(folder, base_model_name_or_path=name)
    found = locate(str(folder))
    assert found.adapter == str(folder) and load_model(found, device="cpu").anatomy.num_parameters


def test_a_base_on_the_hub_is_asked_for_with_its_revision(base):
    folder = adapter(base)
    edit(folder, base_model_name_or_path="org/name", revision="v2")
    assert locate(str(folder))[:2] == ("org/name", "v2")
    edit(folder, base_model_name_or_path="/gone/far")
    with pytest.raises(
        RecipeError, match="names /gone/far, which is not on this machine; write there where the model lies"
    ):
        locate(str(folder))
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(RecipeError, match="names no base model; write base_model_name_or_path into it"):
        locate(str(folder))


@pytest.mark.parametrize(
    "values, what",
    [
        ({"bias": "lora_only"}, r"a LoRA with trained biases \(bias: lora_only\)"),
        ({"alora_invocation_tokens": [1, 2]}, r"an activated LoRA \(aLoRA\)"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "a LoRA over repeated layers"),
        ({"peft_type": "PROMPT_TUNING"}, "a PROMPT_TUNING adapter, and only LoRA can be taken up"),
    ],
)
def test_other_kinds_are_refused_by_name_before_anything_is_read(values, what, base):
    folder = adapter(base)
    edit(folder, **values)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=f"is {what}.*; merge it with peft"):
        locate(str(folder))
    told = luthier("check", write(base.parent / "r", str(folder)), cwd=base.parent)
    assert told.returncode == 2 and "merge it with peft" in told.stderr


def test_ia3_is_refused(base):
    folder = adapter(base, config=IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(RecipeError, match="is a IA3 adapter"):
        locate(str(folder))


def test_an_adapter_that_fits_in_part_is_refused(base):
    folder = adapter(base)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != first}, file)
    with pytest.raises(RecipeError, match="does not fit its base model .the first name without a counterpart"):
        load_model(locate(str(folder)), device="cpu")
    save_file({**tensors, first.replace("layers.0", "layers.9"): tensors[first].clone()}, file)
    with pytest.raises(RecipeError, match="does not fit its base model .*layers.9"):
        load_model(locate(str(folder)), device="cpu")
    file.write_bytes(b"cut")
    with pytest.raises(RecipeError, match="does not fit its base model"):
        load_model(locate(str(folder)), device="cpu")
    file.unlink()
    with pytest.raises(RecipeError, match="holds no adapter_model.safetensors"):
        locate(str(folder))


def test_the_adapters_own_tokenizer_is_used(base):
    folder = adapter(base)
    tokenizer = byte_tokenizer("{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(locate(str(folder))).chat_template == tokenizer.chat_template
    shutil.rmtree(folder)
    assert load_tokenizer(locate(str(adapter(base)))).chat_template == byte_tokenizer().chat_template


def test_a_run_on_a_merged_adapter_names_it_as_its_base(base):
    folder = adapter(base)
    run = finished(base.parent / "r", str(folder))
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert export(run, "hf", base.parent / "whole")["difference"] < 0.05
    told = luthier("check", write(base.parent / "q", str(folder), quantize="nf4"), cwd=base.parent)
    assert told.returncode == 2 and "an adapter cannot be merged into packed weights" in told.stderr


# --- as a start ---


def test_an_adapter_as_a_start_is_kept_in_the_result(base):
    folder = adapter(base, use_rslora=False)
    run = finished(base.parent / "r", str(base), start=str(folder), tuner={"lora": {"rank": 2}}, dtype="float32")
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    ours = load_file(run / "adapter_model.safetensors")
    for name, t in load_file(
        folder / "adapter_model.safetensors"
    ).items():  # its factors lie in the first rows and columns
        kept = ours[name][:4] if "lora_A" in name else ours[name][:, :4]
        scale = kept.norm() / t.norm()
        torch.testing.assert_close(kept, t * scale, rtol=1e-4, atol=1e-5)
    assert float((theirs(base, run) - theirs(base, folder)).abs().max()) > 1e-3  # and it was trained
    before = json.loads((run / "run.json").read_text())["before"]["loss"]["value"]
    merged = finished(base.parent / "m", str(folder), dtype="float32")
    assert json.loads((merged / "run.json").read_text())["before"]["loss"]["value"] == pytest.approx(before, rel=1e-5)


def test_a_run_goes_on_from_a_run(base):
    first = finished(base.parent / "a", str(base), dtype="float32")
    second = finished(base.parent / "b", str(base), start=str(first), dtype="float32")
    losses = [json.loads((r / "run.json").read_text()) for r in (first, second)]
    assert losses[1]["before"]["loss"]["value"] == pytest.approx(losses[0]["after"]["loss"]["value"], rel=1e-5)
    assert losses[1]["after"]["loss"]["value"] < losses[1]["before"]["loss"]["value"]
    assert export(second, "hf", base.parent / "whole")["difference"] < 1e-4


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"start": "nowhere"}, "start: nowhere: holds no adapter"),
        ({"start": "dora"}, "start: dora: is a LoRA with use_dora, on which nothing can be trained as it stands"),
        ({"start": "biased"}, "is a LoRA with trained biases"),
    ],
)
def test_a_start_that_cannot_be_taken_up_is_refused_by_check(keys, what, base):
    adapter(base, "dora", use_dora=True)
    edit(adapter(base, "biased"), bias="all")
    told = luthier("check", write(base.parent, str(base), **keys), cwd=base.parent)
    assert told.returncode == 2 and what in " ".join(told.stderr.split())


def test_a_start_of_another_model_is_refused(base):
    other = base.parent / "other"
    tiny("llama", seed=5, vocab_size=260, layers=2, max_position_embeddings=512).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    first = finished(base.parent / "a", str(other))
    with pytest.raises(
        RecipeError, match="start: .*this update was trained on .*; name the model that it was trained on"
    ):
        finished(base.parent / "b", str(base), start=str(first))
