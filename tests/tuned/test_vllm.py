"""Which adapters vLLM loads, by the rules of its loader."""

import json

import pytest

from helpers.finished import finished
from luthier.tuned.export import export
from luthier.tuned.vllm import RANKS, rank_to_serve, refused_by_vllm

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]


def test_a_plain_adapter_loads():
    assert refused_by_vllm(CONFIG, NAMES) is None
    assert refused_by_vllm({**CONFIG, "r": 512}, NAMES) is None


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"peft_type": "IA3"}, "IA3 is not LoRA"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"modules_to_save": ["score"]}, "it holds whole modules (modules_to_save)"),
        ({"use_dora": True}, "it uses DoRA"),
        ({"bias": "all"}, "it holds biases"),
        ({"rank_pattern": {"q_proj": 4}}, "its layers have different ranks or alphas"),
        ({"alpha_pattern": {"q_proj": 4}}, "its layers have different ranks or alphas"),
        ({"r": 513}, "rank 513 is larger than 512"),
    ],
)
def test_the_reason_of_each_refusal(changed, why):
    assert (refused_by_vllm({**CONFIG, **changed}, NAMES) or "").startswith(why)


@pytest.mark.parametrize(
    "name, why",
    [
        (f"{LAYER}.lora_magnitude_vector", f"it does not know the tensor {LAYER}.lora_magnitude_vector"),
        (f"{LAYER}.bias", f"it does not know the tensor {LAYER}.bias"),
        ("base_model.model.lm_head.lora_A.weight", "it has no adapter for lm_head in most models"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "it has no adapter for embed_tokens in most models"),
    ],
)
def test_a_tensor_that_it_does_not_take(name, why):
    assert refused_by_vllm(CONFIG, [*NAMES, name]) == why


@pytest.mark.parametrize("rank, served", [(1, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)])
def test_the_rank_to_serve_is_the_next_that_vllm_knows(rank, served):
    assert rank_to_serve({"r": rank}) == served and served in RANKS


def test_an_export_says_whether_it_loads(model_folder, tmp_path):
    run = finished(tmp_path, model_folder)
    assert export(run, "peft", tmp_path / "a")["vllm"] == "loads with --max-lora-rank 8"
    config = json.loads((run / "adapter_config.json").read_text())
    assert refused_by_vllm(config, NAMES) is None
    heads = finished(tmp_path / "h", model_folder, tuner={"lora": {"rank": 4, "targets": ["q_proj", "lm_head"]}})
    assert export(heads, "peft", tmp_path / "b")["vllm"] == (
        "refuses it: it has no adapter for lm_head in most models; export with --to hf"
    )
