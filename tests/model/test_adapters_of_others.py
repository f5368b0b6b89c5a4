"""LoRA adapters that peft wrote elsewhere: as a model (merged), and as a start (kept)."""

import json
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.commands import luthier, write
from helpers.finished import finished
from luthier.model.adapter_folder import MERGED, config_in, tensors_in
from luthier.model.loading import load_model, load_tokenizer, locate
from luthier.model.weights import save
from luthier.recipe import load
from luthier.run.ready import start_folder, started_from
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.export import export
from luthier.tuned.open import open_run

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
        ({"alora_invocation_tokens": [1, 2]}, r"an activated LoRA \(aLoRA\)"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "a LoRA over repeated layers"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "a LoRA with init_lora_weights: pissa_niter_4, and peft draws its start",
        ),
        ({"init_lora_weights": "corda"}, "a LoRA with init_lora_weights: corda, and peft needs the rows"),
        ({"peft_type": "PROMPT_TUNING"}, "a PROMPT_TUNING adapter, which is not taken up: LORA, ADALORA, "),
    ],
)
@pytest.mark.parametrize("key", ["model", "start"])
def test_other_kinds_are_refused_by_name_before_anything_is_read(key, values, what, base):
    folder = adapter(base)
    edit(folder, **values)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=f"{key}: .*is {what}.*; give its base model"):
        config_in(folder, key)
    recipe = write(base.parent / "r", **{"model": str(base), key: str(folder)})
    told = luthier("check", recipe, cwd=base.parent)
    assert told.returncode == 2 and f"{key}: {folder}: is a" in " ".join(told.stderr.split())


# --- every kind that peft can merge ---

LORAS = {
    "rslora": {"use_rslora": True}, "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "both": {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"}, "eva": {"init_lora_weights": "eva"},
    "whole embedding": {"modules_to_save": ["embed_tokens"]}, "whole head": {"modules_to_save": ["lm_head"]},
    "both tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "whole norm": {"modules_to_save": ["norm"]}, "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]}, "tokens": {"trainable_token_indices": [9, 30]}, "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"}, "bias of B": {"lora_bias": True, "target_modules": ["q_proj"]},
    "kasa": {"kasa_config": KasaConfig()}, "velora": {"velora_config": VeloraConfig(num_groups=4)},
}  # fmt: skip
TWO = {"target_modules": ["q_proj", "down_proj"]}
OTHERS = {
    "ADALORA": {**TWO, "total_step": 10}, "IA3": {**TWO, "feedforward_modules": ["down_proj"]}, "LOHA": TWO, "LOKR": TWO,
    "VERA": TWO, "OFT": {**TWO, "oft_block_size": 4, "r": 0}, "HRA": TWO, "BOFT": {**TWO, "boft_block_size": 4}, "LN_TUNING": {},
    "FOURIERFT": {**TWO, "n_frequency": 20}, "RANDLORA": TWO, "DELORA": TWO,
    "MISS": {**TWO, "r": 4}, "TRAINABLE_TOKENS": {"token_indices": [9, 30], "target_modules": ["embed_tokens"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biases") / "base"
    tiny("llama", vocab_size=260, layers=2, attention_bias=True, max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def trained(base, config):
    """A folder with an adapter of this kind, every parameter of which was moved."""
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(base.parent / "of_this_kind")
    return base.parent / "of_this_kind"


def started(base, start):
    """The logits of a run's model before its first step."""
    located = locate(str(base))
    view = load_model(located, device="cpu", tokenizer=load_tokenizer(located))
    recipe = load(json.dumps({"model": str(base), "start": str(start), "data": {"train": "x.jsonl"}}))
    with started_from(recipe, base, view).bind(view):
        return logits(view.module)


def kinds():
    lora = {"r": 4, "lora_alpha": 8, **TWO}
    listed = [("LORA", name, {**lora, **more}) for name, more in LORAS.items()] + [(n, n, m) for n, m in OTHERS.items()]
    for kind, name, more in listed:
        yield pytest.param(partial(PEFT_TYPE_TO_CONFIG_MAPPING[kind], task_type="CAUSAL_LM", **more), id=name)


@pytest.mark.parametrize("config", kinds())
def test_a_model_and_a_start_have_the_logits_that_peft_has(config, with_biases):
    folder = trained(with_biases, config())
    whole = theirs(with_biases, folder)
    assert float((whole - logits(AutoModelForCausalLM.from_pretrained(with_biases))).abs().max()) > 1e-4
    torch.testing.assert_close(
        logits(load_model(locate(str(folder)), device="cpu").module), whole, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(started(with_biases, folder), whole, rtol=1e-5, atol=1e-5)


def test_the_table_names_every_kind_that_is_taken():
    assert {"LORA", *OTHERS} == set(MERGED)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_tables_cannot_have_a_low_rank_difference(module, tmp_path):
    """Merged, it would change the other one as well; so far this was done in silence."""
    sizes = {"vocab_size": 260, "layers": 2, "max_position_embeddings": 512}
    tiny("llama", tie_word_embeddings=True, **sizes).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "base", target_modules=["q_proj", module], init_lora_weights=False)
    why = "its head and its embedding are one weight, and the adapter changes only one of them"
    with pytest.raises(RecipeError, match=f"model: .*gives other logits than beside them .*{why}"):
        load_model(locate(str(folder)), device="cpu")
    with pytest.raises(RecipeError, match=f"start: .*{why}"):
        finished(tmp_path / "r", str(tmp_path / "base"), start=str(folder))


def test_a_table_that_an_adapter_brings_whole_is_no_longer_tied(tmp_path):
    sizes = {"vocab_size": 260, "layers": 2, "max_position_embeddings": 512}
    tiny("llama", tie_word_embeddings=True, **sizes).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    folder = trained(tmp_path / "base", LoraConfig(**TWO, modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"))
    whole = theirs(tmp_path / "base", folder)
    view = load_model(locate(str(folder)), device="cpu")
    torch.testing.assert_close(logits(view.module), whole, rtol=1e-5, atol=1e-5)
    save(view.module, tmp_path / "again")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), whole, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(
        RecipeError, match="start: .*changes only one of the model's embedding and head.*set model to this adapter"
    ):
        finished(tmp_path / "r", str(tmp_path / "base"), start=str(folder))


def test_an_adapter_with_more_tokens_says_how_to_enlarge_the_model(base):
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(264)
    larger.save_pretrained(base.parent / "larger")
    byte_tokenizer().save_pretrained(base.parent / "larger")
    folder = trained(
        base.parent / "larger", LoraConfig(**TWO, modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    )
    what = r"was trained with 264 tokens, and the model has 260; enlarge the model with resize_token_embeddings\(264\)"
    edit(folder, base_model_name_or_path=str(base))
    with pytest.raises(RecipeError, match=f"model: .*{what}.*in base_model_name_or_path in its adapter_config.json"):
        load_model(locate(str(folder)), device="cpu")
    with pytest.raises(RecipeError, match=f"start: .*{what}.*in model"):
        finished(base.parent / "a", str(base), start=str(folder))
    with torch.no_grad():
        torch.testing.assert_close(started(base.parent / "larger", folder), theirs(base.parent / "larger", folder))


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


def test_a_run_goes_on_from_an_adapter_that_is_no_plain_lora(base):
    folder = trained(base, LoraConfig(**TWO, use_dora=True, task_type="CAUSAL_LM"))
    run = finished(base.parent / "r", str(base), start=str(folder), dtype="float32")
    state, update = json.loads((run / "run.json").read_text()), open_run(run).update
    assert [p.kind for p in update.parts] == ["dense", "lowrank"] and state["base"]["name"] == str(base)
    assert set(update.parts[0].names()) == {
        f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    merged = json.loads((finished(base.parent / "m", str(folder), dtype="float32") / "run.json").read_text())
    assert state["before"]["loss"]["value"] == pytest.approx(merged["before"]["loss"]["value"], rel=1e-5)
    assert state["after"]["loss"]["value"] < state["before"]["loss"]["value"]
    assert export(run, "hf", base.parent / "whole")["difference"] < 1e-4


def test_a_run_goes_on_from_a_classifier_with_its_head(tmp_path):
    sizes = {"vocab_size": 260, "layers": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    tiny("llama", **sizes).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    for name, more in {"plain": {}, "dora": {"use_dora": True}}.items():
        model = get_peft_model(plain, LoraConfig(**TWO, **more, task_type="SEQ_CLS"))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / name)
        whole, plain = logits(model), model.unload()
        located, head = locate(str(tmp_path / "base")), AutoModelForSequenceClassification
        view = load_model(located, head, device="cpu", labels=["a", "b"], tokenizer=load_tokenizer(located))
        keys = {"model": str(tmp_path / "base"), "start": name, "task": "classification", "data": {"train": "x.jsonl"}}
        update = started_from(load(json.dumps(keys)), tmp_path, view)
        assert [p.kind for p in update.parts] == [{"plain": "lowrank", "dora": "dense"}[name], "replace"]
        with update.bind(view):
            torch.testing.assert_close(logits(view.module), whole, rtol=1e-5, atol=1e-5)


# --- by an id on the Hub ---


@pytest.fixture
def hub(base, monkeypatch):
    """A cache of the Hub with two adapters, at two revisions; there is no network."""
    cache = base.parent / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, scale in (("a" * 40, 8), ("b" * 40, 16)):
        shutil.copytree(
            adapter(base, f"at {revision[0]}", lora_alpha=scale), cache / "models--org--theirs/snapshots" / revision
        )
    refs = cache / "models--org--theirs/refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (refs / "v2").write_text("b" * 40)
    (cache / "models--org--none/snapshots" / ("c" * 40)).mkdir(parents=True)
    (cache / "models--org--none/refs").mkdir()
    (cache / "models--org--none/refs/main").write_text("c" * 40)
    return cache


@pytest.mark.parametrize("name, folder", [("org/theirs", "at a"), ("org/theirs@v2", "at b")])
def test_an_adapter_on_the_hub_is_a_start_and_a_model_like_a_folder(name, folder, base, hub):
    whole = theirs(base, base.parent / folder)
    torch.testing.assert_close(started(base, name), whole, rtol=1e-5, atol=1e-5)
    located = locate(name)
    assert (located.path, located.shown) == (str(base), name)
    torch.testing.assert_close(logits(load_model(located, device="cpu").module), whole, rtol=1e-4, atol=1e-5)


def test_a_folder_wins_over_an_id_on_the_hub(base, hub, monkeypatch):
    mine = adapter(base, "org/theirs", lora_alpha=2)
    monkeypatch.chdir(base.parent)
    torch.testing.assert_close(started(base, "org/theirs"), theirs(base, mine), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, what",
    [
        (
            "org/gone",
            r"start: org/gone: cannot be loaded \(.+\); check the name; for a gated model run `hf auth login`; without",
        ),
        ("org/theirs@v3", r"start: org/theirs@v3: cannot be loaded \(.+\); check the name"),
        ("org/none", r"start: org/none: holds no adapter \(adapter_config.json\)"),
        ("gone", "start: gone: holds no adapter"),
    ],
)
def test_an_adapter_that_the_hub_does_not_have_costs_a_sentence(name, what, base, hub):
    recipe = load(json.dumps({"model": str(base), "start": name, "data": {"train": "x.jsonl"}}))
    with pytest.raises(RecipeError, match=what) as told:
        start_folder(recipe, base)
    assert "\n" not in str(told.value)


def test_a_run_starts_from_the_hub_as_from_a_folder(base, hub):
    run = finished(base.parent / "r", str(base), start="org/theirs@v2", dtype="float32")
    state = json.loads((run / "run.json").read_text())
    there = finished(base.parent / "s", str(base), start=str(base.parent / "at b"), dtype="float32")
    assert state["before"] == json.loads((there / "run.json").read_text())["before"]


@pytest.mark.parametrize(
    "keys, what",
    [
        ({"start": "nowhere"}, "start: nowhere: holds no adapter"),
        (
            {"start": "dora", "quantize": "nf4"},
            "start: dora: is no plain LoRA, so it would have to be added to weights",
        ),
        ({"start": "biased", "quantize": "nf4"}, "start: biased: is no plain LoRA"),
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


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty or cut short"), ([1], "does not hold tensors by name"), ({"a": 1}, "tensors by name")],
)
def test_a_pickle_that_holds_no_tensors_is_said(content, says, tmp_path):
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=says):
        tensors_in(tmp_path)
