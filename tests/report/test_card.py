"""The model card: what the Hub reads of it, and what it never says."""

import pytest
from huggingface_hub import ModelCard

from helpers.finished import finished
from luthier.report.card import Score, base_of, front, loading
from luthier.testing.models import byte_tokenizer, tiny


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "Small-Base"
    tiny(vocab_size=260, layers=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    return folder


def test_the_card_of_a_run_names_base_licence_results_and_how_to_load(base_folder, tmp_path):
    run = finished(tmp_path / "r", str(base_folder))
    text = (run / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "Small-Base" and data.license == "mit" and data.library_name == "peft"
    assert data.pipeline_tag == "text-generation" and data.base_model_relation == "adapter"
    told = {r.metric_type: r for r in data.eval_results}
    assert told["loss"].dataset_name == "eval.jsonl" and told["loss"].metric_value > 0
    assert str(base_folder) not in text.split("<details>")[0]
    snippet = text.split("```python\n")[1].split("```")[0].replace('model="out"', f"model={str(run)!r}")
    found: dict = {}
    exec(snippet, found)  # what the card says loads the model
    assert type(found["model"].model).__name__ == "LlamaForCausalLM"
    assert any("lora" in n for n, _ in found["model"].model.named_modules())


@pytest.mark.parametrize(
    "model, shown, name",
    [
        ("builtin:smollm2-135m", "SmolLM2-135M-Instruct (dequantised from its Q4_1 GGUF)", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/name@main", "org/name@main", "org/name"),
        ("x/y.gguf", "my model.gguf (dequantised)", "my-model"),
        ("gone", "/home/me/models/gone", "gone"),
    ],
)  # fmt: skip
def test_a_base_is_named_as_the_hub_names_it(model, shown, name):
    assert base_of(model, shown).name == name


def test_a_snapshot_in_the_hubs_cache_has_the_hubs_name(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert base_of(str(folder), str(folder)).name == "org/name"


def test_front_matter_is_what_the_hub_reads():
    lines = front(
        base_of("org/name", "org/name"), "mine", "merge", False, ("lora",), "text-generation", ["org/rows"],
        [Score("text-generation", "org/rows", True, "exact_match", 0.5)],
    )  # fmt: skip
    data = ModelCard("\n".join(lines)).data
    assert data.datasets == ["org/rows"] and data.tags == ["luthier", "lora"] and data.model_name == "mine"
    assert data.to_dict()["model-index"][0]["results"][0]["metrics"] == [
        {"type": "exact_match", "value": 0.5, "name": "exact match"}
    ]
    assert "license" not in data.to_dict()


def test_a_form_of_luthiers_own_is_loaded_with_luthier():
    assert loading("out", "adapter", False, "text-generation")[1] == 'luthier generate out "a question"'
