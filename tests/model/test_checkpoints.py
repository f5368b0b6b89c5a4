"""Checkpoints as they come: shards, pickles, damaged files, missing and surplus weights, float16, and what others quantised."""

import importlib.util
import json
import logging
import os
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from helpers.commands import luthier, write
from helpers.finished import finished
from luthier.model.loading import load_config, load_model, load_tokenizer, locate
from luthier.model.quantised import INFERENCE_ONLY, NOT_OPENED, PACKAGES, refuse_method
from luthier.model.weights import FOUND, refuse_damaged, save
from luthier.support.errors import RecipeError
from luthier.testing.architectures import NEXT_TOKEN, tiny_model
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.export import export

IDS = torch.tensor([[5, 9, 30, 7, 99]])


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    return tiny("llama", vocab_size=260, layers=2, **sizes).eval()


@pytest.fixture
def folder(model, tmp_path):
    """A checkpoint in four shards."""
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def opened(folder, **how):
    return load_model(locate(str(folder)), device="cpu", **how)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def one_file(folder, change=None, **more):
    """The weights in one file, changed."""
    tensors = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = change(tensors) if change else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, **more)
    return tensors


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


# --- files ---


def test_shards_and_pickles_give_the_same_model(model, folder, tmp_path):
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(opened(folder).module), logits(model))
    pickled = tmp_path / "bin"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    assert torch.equal(logits(opened(pickled).module), logits(model))
    halves = [dict(part) for part in (list(model.state_dict().items())[:9], list(model.state_dict().items())[9:])]
    for i, half in enumerate(halves):
        torch.save(half, pickled / f"part{i}.bin")
    (pickled / "pytorch_model.bin").unlink()
    where = {n: f"part{i}.bin" for i, half in enumerate(halves) for n in half}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(logits(opened(pickled).module), logits(model))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(zipped, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"a": Harmful()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RecipeError, match=r"would run code when it is read.*; take a checkpoint in safetensors"):
        opened(folder)
    if zipped:  # found before it is read, so by check too
        with pytest.raises(
            RecipeError, match=r"pytorch_model.bin: is a pickle that would run code when it is read \(posix.mkdir\)"
        ):
            refuse_damaged(folder)
    assert not (tmp_path / "made by a pickle").exists()


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def damage(folder, how):
    """Returns what the sentence must say."""
    shard = first_shard(folder)
    whole = shard.read_bytes()
    if how == "missing":
        shard.unlink()
        return f"{shard.name}: 1 of"
    if how == "cut":
        shard.write_bytes(whole[:-7])
        return rf"{shard.name}: has {len(whole) - 7} bytes, and its header says {len(whole)}"
    if how == "longer":
        shard.write_bytes(whole + b"!")
        return rf"{shard.name}: has {len(whole) + 1} bytes"
    if how == "cut in the header":
        shard.write_bytes(whole[:20])
        return f"{shard.name}: is cut short or damaged"
    if how == "empty":
        shard.write_bytes(b"")
        return f"{shard.name}: is cut short or damaged"
    if how == "header":
        shard.write_bytes(whole[:8] + b"!" + whole[9:])
        return f"{shard.name}: its header is damaged"
    if how == "pointer":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        return f"{shard.name}: is a pointer of git-lfs, not the weights; run git lfs pull"
    if how == "index":
        (folder / "model.safetensors.index.json").write_text("{")
        return "model.safetensors.index.json: cannot be read as a list of shards"
    assert how == "none"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return r"holds no weights \(model.safetensors"


@pytest.mark.parametrize(
    "how", ["missing", "cut", "longer", "cut in the header", "empty", "header", "pointer", "index", "none"]
)
def test_a_damaged_file_is_named_in_one_sentence(how, folder):
    wanted = damage(folder, how)
    with pytest.raises(RecipeError, match=wanted) as told:
        opened(folder)
    assert "\n" not in str(told.value) and told.value.remedy


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"PK\x03\x04 cut", b"\x80\x02 cut"])
def test_a_damaged_pickle_is_refused_in_one_sentence(data, folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(RecipeError, match="damaged") as told:
        opened(folder)
    assert "\n" not in str(told.value)


def test_a_header_that_promises_more_than_the_file_allocates_nothing(folder):
    first_shard(folder).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(RecipeError, match="header does not fit in the file"):
        opened(folder)


# --- weights ---


def test_missing_weights_are_refused_by_name(folder):
    one_file(folder, lambda t: {n: v for n, v in t.items() if n != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(
        RecipeError, match=r"lack 1 weights that LlamaForCausalLM needs, the first is model.layers.1.mlp.up_proj.weight"
    ):
        opened(folder)


def test_a_trunk_without_its_head_is_no_language_model(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"lm_head.weight; take a complete checkpoint; .* it is of LlamaModel"):
        opened(tmp_path)


def test_a_tied_head_is_not_missing(tmp_path):
    tied = tiny("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(opened(tmp_path).module, IDS % 97), logits(tied.eval(), IDS % 97))


def test_surplus_weights_are_said_and_a_whole_file_says_nothing(folder, caplog):
    opened(folder)
    assert not [r for r in caplog.records if r.name.startswith("luthier")]
    one_file(folder, lambda t: {**t, "model.layers.7.x": torch.zeros(2), "extra": torch.zeros(1)})
    with caplog.at_level(logging.WARNING, logger="luthier"):
        opened(folder)
    assert (
        "2 weights in its files have no place in LlamaForCausalLM and are left out, the first is extra" in caplog.text
    )


def test_weights_of_another_shape_are_named(folder):
    edit(folder, vocab_size=250)
    with pytest.raises(RecipeError, match=r"is \(260, 64\) in its files, and \(250, 64\) by its config.json"):
        opened(folder)


def classifier(folder, **how):
    return load_model(locate(str(folder)), AutoModelForSequenceClassification, device="cpu", **how)


def test_a_new_head_need_not_be_in_the_files_and_a_stated_one_must_be(folder, tmp_path):
    assert classifier(folder, labels=["a", "b"]).anatomy.task_head == ["score.weight"]
    tiny("llama-classifier", num_labels=3).save_pretrained(tmp_path / "c")
    one_file(tmp_path / "c", lambda t: {n: v for n, v in t.items() if n != "score.weight"})
    with pytest.raises(RecipeError, match="lack 1 weights that LlamaForSequenceClassification needs.*score.weight"):
        classifier(tmp_path / "c")
    assert classifier(tmp_path / "c", labels=["x", "y"]).classes == ["x", "y"]  # drawn anew, as other names are


def test_a_new_head_hides_no_other_weight_of_the_wrong_shape(tmp_path):
    tiny("llama-classifier", num_labels=3).save_pretrained(tmp_path)
    edit(tmp_path, vocab_size=90)
    with pytest.raises(RecipeError, match=r"embed_tokens.weight is \(97, 32\) in its files"):
        classifier(tmp_path, labels=["x", "y"])


# --- dtypes ---


def test_float16_is_loaded_in_float32_with_every_value_as_it_was(model, tmp_path, caplog):
    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="luthier"):
        view = opened(tmp_path)
    assert view.dtype == torch.float32 and "is stored in float16, and is loaded in float32" in caplog.text
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(view.weight(n), t.float()) for n, t in stored.items())
    assert opened(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path).dtype == torch.float32


def test_mixed_dtypes_lose_no_bit_unless_the_configuration_says_one(folder):
    def mixed(tensors):
        return {n: t.bfloat16() if "norm" in n else t for n, t in tensors.items()}

    stored = one_file(folder, mixed, dtype=None)
    view = opened(folder)
    assert {p.dtype for p in view.module.parameters()} == {torch.float32}
    assert all(torch.equal(view.weight(n), t.float()) for n, t in stored.items())
    edit(folder, dtype="bfloat16")
    assert {p.dtype for p in opened(folder).module.parameters()} == {torch.bfloat16}


# --- quantised by others ---


@pytest.mark.parametrize(
    "said, why",
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "by GPTQ in 3 bits, and luthier reads 2, 4, 8"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "by GPTQ in the layout marlin, and luthier reads",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "by AWQ in the layout gemv, and luthier reads gemm"),
        ({"quant_method": "awq", "bits": 8, "version": "gemm"}, "by AWQ in 8 bits, and luthier reads 4"),
        ({"quant_method": "hqq", "quant_config": {}}, "by HQQ, which this version of transformers cannot open"),
        ({"quant_method": "exl2", "bits": 4.0}, "by EXL2, which this version of transformers cannot open"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "by ModelOpt, which this version of transformers cannot open",
        ),
        ({"quant_method": "spqr"}, "by SpQR, which transformers opens for inference only"),
        ({"quant_method": "eetq"}, "by EETQ, and luthier cannot train beside its layers"),
        ({"bits": 4}, "by a method that config.json does not name, which this version of transformers cannot open"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name_from_the_configuration_alone(said, why, folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    edit(folder, quantization_config=said)
    located = locate(str(folder))
    with pytest.raises(RecipeError, match=f"is quantised {why}.*; take the model that it was made from") as told:
        refuse_method(load_config(located), located.shown)
    assert "\n" not in str(told.value)
    with pytest.raises(RecipeError, match=f"is quantised {why}"):
        opened(folder)


@pytest.mark.parametrize("method", PACKAGES)
def test_a_package_that_is_missing_is_named(method, folder, monkeypatch):
    edit(
        folder,
        quantization_config={"quant_method": method, **({"load_in_4bit": True} if method == "bitsandbytes" else {})},
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=f"quantised by {method}, and the package {PACKAGES[method][0]} is not installed; pip"
    ):
        refuse_method(load_config(locate(str(folder))), "x")


def test_what_is_said_of_transformers_is_so():
    for method in INFERENCE_ONLY:
        assert object.__new__(AUTO_QUANTIZER_MAPPING[method]).is_trainable is False
    for method in NOT_OPENED:
        quantizer = object.__new__(AUTO_QUANTIZER_MAPPING[method])
        quantizer.quantization_config = SimpleNamespace(quant_method=method)
        with pytest.raises(NotImplementedError):  # transformers has the name, and no code that opens such files
            quantizer.get_quantize_ops()


def test_other_places_where_a_method_is_named(folder):
    located = locate(str(folder))
    (folder / "quantize_config.json").write_text('{"bits": 3}')
    with pytest.raises(RecipeError, match="is quantised by GPTQ in 3 bits"):
        refuse_method(load_config(located), located.shown, folder=located.path)
    (folder / "quantize_config.json").write_text('{"bits": ')
    with pytest.raises(RecipeError, match="quantize_config.json: cannot be read"):
        refuse_method(load_config(located), located.shown, folder=located.path)
    (folder / "quantize_config.json").unlink()
    refuse_method(load_config(located), located.shown, folder=located.path)
    edit(folder, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(RecipeError, match="is quantised by MLX"):
        refuse_method(load_config(located), located.shown, folder=located.path)


@pytest.fixture(scope="module")
def packed_folders(model, tmp_path_factory):
    """The model in 4 and in 8 bits, as bitsandbytes saves it, stored in float16 as many are."""
    place = tmp_path_factory.mktemp("packed")
    model.save_pretrained(place / "plain")
    kinds = {
        "four": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16},
        "eight": {"load_in_8bit": True},
    }
    for name, kind in kinds.items():
        config = BitsAndBytesConfig(**kind)
        made = AutoModelForCausalLM.from_pretrained(place / "plain", quantization_config=config, dtype=torch.float16)
        made.save_pretrained(place / name)
        byte_tokenizer().save_pretrained(place / name)
    return place


@pytest.mark.parametrize("bits", ["four", "eight"])
def test_bitsandbytes_stays_packed_and_computes_in_bfloat16(bits, packed_folders, model):
    view = opened(packed_folders / bits)
    assert view.dtype == torch.bfloat16
    assert {view.weight(x.name).dtype for x in view.anatomy.block_linears} <= {torch.uint8, torch.int8}
    assert all(getattr(m, "compute_dtype", None) != torch.float16 for m in view.module.modules())
    assert float((logits(view.module) - logits(model)).abs().max()) < 0.1
    whole = opened(packed_folders / bits, unpack=True)
    assert whole.base == view.base
    assert all(whole.weight(x.name).is_floating_point() for x in whole.anatomy.block_linears)
    assert float((logits(view.module) - logits(whole.module)).abs().max()) < 0.02


def test_a_packed_checkpoint_is_not_packed_again(packed_folders):
    located = locate(str(packed_folders / "four"))
    with pytest.raises(RecipeError, match="quantize: .* is quantised already, by bitsandbytes; remove quantize"):
        load_model(located, tokenizer=load_tokenizer(located), quantize="nf4")


def test_fp8_becomes_plain_weights(model, folder):
    """DeepSeek's form: float8 with one scale for each block of 128 x 128."""
    plain = {}

    def pack(tensors):
        out = {}
        for name, t in tensors.items():
            if not name.endswith("_proj.weight"):
                out[name], plain[name] = t.bfloat16(), t.bfloat16()
                continue
            scale = t.abs().max() / 448.0
            out[name] = (t / scale).to(torch.float8_e4m3fn)
            out[f"{name}_scale_inv"] = scale.reshape(1, 1).float()
            plain[name] = (out[name].float() * scale).bfloat16()
        return out

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    one_file(folder, pack, quantization_config=said, dtype="bfloat16")
    view = opened(folder)
    assert view.dtype == torch.bfloat16 and len(plain) == len(dict(view.module.named_parameters()))
    assert all(torch.equal(view.weight(n), t) for n, t in plain.items())
    save(view.module, folder.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "again", dtype="auto")
    assert all(torch.equal(again.get_parameter(n), t) for n, t in plain.items())


def test_mxfp4_becomes_plain_weights(tmp_path):
    """GPT-OSS's form: 4 bits a number (sign, two of exponent, one of mantissa), and a power of two for each 32 of them."""
    folder = tmp_path / "m"
    tiny_model("gpt_oss", NEXT_TOKEN).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    plain = {}

    def pack(tensors):
        out = {}
        for name, t in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                out[name], plain[name] = t.bfloat16(), t.bfloat16()
                continue
            experts, inner, outer = t.shape
            codes = torch.randint(16, (experts, outer, inner // 32, 32), generator=generator)
            scales = torch.randint(118, 124, (experts, outer, inner // 32), generator=generator)
            out[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            out[f"{name}_scales"] = scales.to(torch.uint8)
            whole = values[codes] * (2.0 ** (scales - 127))[..., None]
            plain[name] = whole.reshape(experts, outer, inner).transpose(1, 2).bfloat16()
        return out

    one_file(folder, pack, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    view = opened(folder)
    assert sum(n.endswith("_proj") for n in plain) == 2 * len(view.anatomy.blocks)
    assert all(torch.equal(view.weight(n), t) for n, t in plain.items())
    save(view.module, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert all(torch.equal(again.get_parameter(n), t) for n, t in plain.items())


@pytest.mark.parametrize("bits", ["four", "eight"])
def test_an_adapter_on_a_packed_checkpoint_is_trained_reopened_and_merged_into_plain_weights(
    bits, packed_folders, tmp_path
):
    folder = str(packed_folders / bits)
    refused = luthier("check", write(tmp_path, folder, tuner="full"), cwd=tmp_path)
    assert refused.returncode == 2 and "this model's are packed in 4 or 8 bits; take plain weights" in refused.stderr
    run = finished(tmp_path, folder, learning_rate=0.01)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    told = export(run, "hf", tmp_path / "hf")
    assert told["difference"] < 0.05
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert whole.dtype == torch.bfloat16 and getattr(whole.config, "quantization_config", None) is None
    assert export(run, "gguf", tmp_path / "gguf")["difference"] < 0.02


# --- use_cache ---


def test_use_cache_is_saved_as_it_came(folder, tmp_path):
    edit(folder, use_cache=True)
    view = opened(folder)
    assert view.module.config.use_cache is False and view.module.__dict__[FOUND] is True
    save(view.module, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["use_cache"] is True
    assert view.module.config.use_cache is False
    edit(folder, use_cache=False)
    save(opened(folder).module, tmp_path / "off")
    assert json.loads((tmp_path / "off" / "config.json").read_text())["use_cache"] is False
