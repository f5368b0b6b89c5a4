"""A frozen base in 4 bits: what may be tuned beside it, and into what it is merged.

bitsandbytes runs on CPUs too, so this needs no GPU.
"""

import json

import pytest
import torch

from helpers.commands import luthier, write
from luthier.data.batch import collate
from luthier.model.additions import is_packed
from luthier.model.loading import load_model, load_tokenizer, locate
from luthier.objectives.base import Forward
from luthier.objectives.caft import Caft
from luthier.support.errors import LuthierError
from luthier.testing.models import byte_tokenizer, rows_of, tiny
from luthier.tuned.export import export
from luthier.tuned.open import open_run
from luthier.tuners import Adapter, Full, GreenTrainer, Layerwise, Lora, Spiel
from luthier.update import Dense, Replace, Update


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Widths of whole quantisation blocks, as real models have."""
    folder = tmp_path_factory.mktemp("model64")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    tiny("llama", vocab_size=260, layers=2, eos_token_id=2, bos_token_id=0, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def packed(model_folder):
    located = locate(model_folder)
    return load_model(located, tokenizer=load_tokenizer(located), quantize="nf4")


def dequantised(model_folder, packed):
    """A plain model of the numbers that the 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = load_model(locate(model_folder))
    with torch.no_grad():
        for x in packed.anatomy.block_linears:
            weight = packed.weight(x.name)
            plain.weight(x.name).copy_(dequantize_4bit(weight.data, weight.quant_state).view(x.shape))
    return plain


def nll(view):
    return Forward(collate(rows_of((30, 22), answer=12)), view).nll().sum()


def test_it_is_packed_and_known_by_the_weights_it_was_made_from(packed, model_folder):
    located = locate(model_folder)
    plain = load_model(located, tokenizer=load_tokenizer(located))
    assert all(is_packed(packed.weight(x.name)) for x in packed.anatomy.block_linears)
    assert not is_packed(packed.head_weight)
    assert packed.base == plain.base
    assert packed.anatomy.parameters == plain.anatomy.parameters and packed.layout == plain.layout == "flat"


@pytest.mark.parametrize("tuner", [Lora(rank=4), Lora(rank=4, dropout=0.3), Adapter(rank=4, init_std=0.02)])
def test_loss_and_gradients_are_those_of_the_numbers_that_the_bits_stand_for(tuner, packed, model_folder):
    results = []
    for view in (packed, dequantised(model_folder, packed)):
        with torch.no_grad():
            nll(view)  # an evaluation first, as every run has
        trainable = tuner.attach(view)
        view.module.train()
        torch.manual_seed(0)
        loss = nll(view)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in trainable.parameters()]))
    (ours, ours_grads), (theirs, theirs_grads) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert any(float(g.abs().max()) > 0 for g in ours_grads)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "tuner", [Full(), Layerwise(freeze_blocks=1), Spiel(density=0.05), GreenTrainer(reselect_every=2)]
)
def test_what_moves_weights_is_refused(tuner, packed):
    with pytest.raises(LuthierError, match=r"model\.layers\..*weight is quantised; load the model in bf16 or float32"):
        tuner.attach(packed, total_steps=4)


def test_heads_copied_from_a_packed_block_are_refused(packed):
    with pytest.raises(LuthierError, match="caft: .* is quantised"):
        Caft().extend(packed)


@pytest.mark.parametrize("part", [Dense, Replace])
def test_nothing_is_merged_into_packed_weights(part, packed):
    name = packed.anatomy.block_linears[0].name
    update = Update(packed.base, (part({name: torch.ones(packed.anatomy.parameters[name])}),))
    with pytest.raises(LuthierError, match="is quantised"), update.bind(packed):
        pass
    with pytest.raises(LuthierError, match="is quantised"):
        update.merge_into(packed.module)
    low_rank = Lora(rank=2).attach(packed)
    with pytest.raises(LuthierError, match="is quantised"):
        low_rank.update().merge_into(packed.module)


def test_a_run_in_4_bits_is_merged_into_the_whole_weights(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder, quantize="nf4", epochs=2)
    done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["after"]["loss"]["value"] < run["before"]["loss"]["value"] and "no forecast" in done.stderr
    samples = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    said = json.loads(
        luthier(
            "generate", tmp_path / "out", samples[0]["prompt"], "--max-new-tokens", "6", "--json", cwd=tmp_path
        ).stdout
    )
    assert said[0]["answer"] == samples[0]["after"]
    export(tmp_path / "out", "hf", tmp_path / "merged")
    whole, update = load_model(locate(model_folder)), open_run(tmp_path / "out").update
    merged = load_model(locate(str(tmp_path / "merged")))
    for name, delta in update.dense().items():
        torch.testing.assert_close(merged.weight(name), whole.weight(name) + delta, atol=1e-6, rtol=0)


def test_check_refuses_tuners_that_move_weights(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder, quantize="nf4", tuner="full")
    refused = luthier("check", recipe, cwd=tmp_path)
    assert refused.returncode == 2
    assert "full reads or writes the weights themselves, and this model's are packed in 4 or 8 bits" in refused.stderr


def test_without_the_package_the_recipe_says_what_to_install(model_folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a))
    with pytest.raises(LuthierError, match=r"quantize: needs the package bitsandbytes; pip install 'luthier\[quant\]'"):
        load_model(locate(model_folder), quantize="nf4")
