"""What a checkpoint says besides weights: generation settings, use_cache, and tokenizers of another size than the embedding."""

import json

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import luthier, rows, write
from helpers.finished import finished
from luthier.data.store import TokenRows, token_batch
from luthier.model.weights import save
from luthier.recipe import load_file
from luthier.run.ready import tokens_and_config
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.export import export

SETTINGS = {
    "eos_token_id": [2, 7], "stop_strings": ["\n\n", "END"], "do_sample": False, "temperature": 0.6, "top_p": 0.9,
    "repetition_penalty": 1.1, "max_length": 100,
}  # fmt: skip


def model_in(folder, size=260, **more):
    tiny("llama", vocab_size=size, layers=2, max_position_embeddings=512, **more).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_generation_settings_and_use_cache_are_kept_in_what_is_saved(tmp_path):
    folder = model_in(tmp_path / "m", use_cache=True)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    run = finished(tmp_path, str(folder), tuner="full", dtype="float32")
    export(run, "hf", tmp_path / "hf")
    for place in (run, tmp_path / "hf"):
        said = json.loads((place / "generation_config.json").read_text())
        assert SETTINGS.items() <= said.items()
        assert json.loads((place / "config.json").read_text())["use_cache"] is True


def test_generation_settings_are_saved_even_if_they_contradict_each_other(tmp_path):
    model = tiny("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    save(model, tmp_path)
    assert model.generation_config.temperature == 0.6
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.6
    classifier = tiny("llama-classifier")  # has no such settings
    save(classifier, tmp_path / "classifier")
    assert not (tmp_path / "classifier" / "generation_config.json").exists()


def with_more_tokens(folder, *words):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(w, special=False) for w in words])
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("where", ["train", "held"])
def test_a_token_without_an_embedding_is_found_by_check_with_its_row(where, tmp_path):
    folder = model_in(tmp_path / "m")
    assert with_more_tokens(folder, "<one>", "<two>").convert_tokens_to_ids("<two>") == 261
    path = write(tmp_path, str(folder))
    assert luthier("check", path, cwd=tmp_path).returncode == 0  # no row has these tokens
    bad = rows(5)
    bad[3]["completion"] = "is <two>"
    refused = luthier("check", write(tmp_path, str(folder), **{where: bad}), cwd=tmp_path)
    wanted = (
        "token '<two>' has id 261, and the model embeds 260 tokens; use the model's own tokenizer, or enlarge the model"
    )
    assert refused.returncode == 2 and wanted in " ".join(refused.stderr.split())
    name = {"train": "train.jsonl:4", "held": "eval.jsonl:4"}[where]
    assert name in refused.stderr


def test_an_enlarged_model_takes_the_new_tokens(tmp_path):
    folder = model_in(tmp_path / "m")
    tokenizer = with_more_tokens(folder, "<one>", "<two>")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    bad = rows(8)
    bad[3]["completion"] = "is <two>"
    assert luthier("check", write(tmp_path, str(folder), train=bad), cwd=tmp_path).returncode == 0


def test_an_embedding_and_a_head_padded_beyond_the_tokenizer_are_trained_and_kept(tmp_path):
    folder = model_in(tmp_path / "m", size=320)
    run = finished(tmp_path, str(folder), tuner="full", dtype="float32", evaluate=[{"exact-match": {"rows": 2}}])
    saved = AutoModelForCausalLM.from_pretrained(run)
    assert saved.lm_head.weight.shape[0] == saved.config.vocab_size == 320
    assert len(AutoTokenizer.from_pretrained(run)) == 260


def test_a_padding_token_without_an_embedding_is_not_used(tmp_path):
    folder = model_in(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 260
    tokenizer.save_pretrained(folder)
    recipe = load_file(write(tmp_path, str(folder)))
    assert tokens_and_config(recipe, tmp_path)[1].tokenizer.pad_token_id == tokenizer.eos_token_id
    finished(tmp_path, str(folder), evaluate=[{"exact-match": {"rows": 4}}])


def test_the_first_row_with_an_id_beyond_is_named():
    items = [
        {"key": k, "ids": ids, "labels": ids, "row": {}} for k, ids in (("a", [1, 2]), ("b", []), ("c", [3, 9, 8]))
    ]
    import pyarrow as pa

    both = pa.Table.from_batches([token_batch(items[:2]), token_batch(items[2:])])
    found = TokenRows(both)
    assert found.beyond(8) == ("c", 9) and found.beyond(3) == ("c", 3) and found.beyond(2) == ("a", 2)
    assert found.beyond(10) is None and TokenRows(both.slice(1, 1)).beyond(1) is None
    assert TokenRows(both.combine_chunks()).beyond(3) == ("c", 3)
    assert TokenRows(both.slice(2)).beyond(9) == ("c", 9)
    assert torch.tensor(found[2]["ids"]).max() == 9
