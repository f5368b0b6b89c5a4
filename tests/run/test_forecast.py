"""The forecast: depths and lists it cuts, what it counts, what follows from it."""

import json

import pytest
import torch

from luthier import recipe as recipes
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.objectives.sft import Sft
from luthier.run import forecast as fc
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.tasks.classification import Classification
from luthier.testing.models import byte_tokenizer, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.full import Full


def a_recipe(**keys):
    return recipes.load(
        json.dumps(
            {"model": "a/b", "data": {"train": "x.jsonl"}, **({} if "pipeline" in keys else {"batch_size": 4}), **keys}
        )
    )


@pytest.fixture(scope="module")
def data():
    rows = [Row(str(i), {"prompt": "p" * (10 + i % 7), "completion": "c" * (5 + i % 3)}) for i in range(40)]
    return prepare(rows, Renderer(byte_tokenizer()), max_length=200)


def test_depths_are_whole_periods_and_lists_are_cut():
    assert fc.depths(tiny("llama", layers=12).config) == (1, 4)
    assert fc.depths(tiny("llama", layers=4).config) == (4, 4)
    assert fc.depths(tiny("gemma3", layers=12).config) == (2, 4)
    assert fc.depths(tiny("gpt2", layers=9).config) == (1, 4)
    cut = fc.with_layers(tiny("gemma3", layers=12).config, 4)
    assert cut.num_hidden_layers == 4 and len(cut.layer_types) == 4
    assert type(tiny("gemma3"))(cut).model.layers[3].self_attn.is_sliding is False


@pytest.mark.parametrize("tuner", ["full", {"lora": {"rank": 4}}, {"spiel": {"num_weights": 500}}])
def test_weights_state_and_activations_of_a_deep_model_follow_from_a_shallow_one(tuner, data):
    """The extrapolated bytes are those of the whole model, measured with the same counters."""
    config = tiny("llama", layers=12, vocab_size=300).config
    recipe = a_recipe(tuner=tuner, gradient_checkpointing=False)
    got = fc.forecast(recipe, config, byte_tokenizer(), {"train": data})
    (whole,) = fc.measure(recipe, config, byte_tokenizer(), {"train": data}, 12)
    assert got.weights == whole.weights
    assert got.activations == pytest.approx(whole.activations, rel=1e-3)
    if tuner != {"spiel": {"num_weights": 500}}:  # whose entries do not grow with depth
        assert got.trained_weights == whole.trained and got.update == whole.update
        assert got.trained_state == pytest.approx(whole.state, rel=0.06, abs=20_000)


def test_live_bytes_are_weights_masters_moments_and_what_is_kept():
    before = fc.live_bytes()
    view = view_of()
    view.module.to(torch.bfloat16)
    n = view.anatomy.num_parameters
    loop = Loop(view, rows_of(), Full().attach(view), Sft(), TrainSettings(max_steps=2, batch_size=4))
    loop.step()
    # bf16 weights and their stored base, float32 masters and two moments
    assert fc.live_bytes() - before == pytest.approx(n * (2 + 2 + 4 + 8), rel=0.05)


def test_checkpointing_is_chosen_only_where_memory_would_not_do(monkeypatch, data):
    config, recipe = tiny("llama", layers=3, vocab_size=300).config, a_recipe()
    monkeypatch.setattr(fc, "available_memory", lambda: 10**15)
    chosen, plain = fc.resolved(recipe, config, byte_tokenizer(), {"train": data})
    assert chosen.gradient_checkpointing is False
    monkeypatch.setattr(fc, "available_memory", lambda: 1)
    chosen, saving = fc.resolved(recipe, config, byte_tokenizer(), {"train": data})
    assert chosen.gradient_checkpointing is True and saving.activations < 0.6 * plain.activations
    assert (
        fc.resolved(a_recipe(gradient_checkpointing=False), config, byte_tokenizer(), {"train": data})[
            0
        ].gradient_checkpointing
        is False
    )


def test_a_full_disk_is_forecast(monkeypatch, model_folder, tmp_path):
    import shutil
    from types import SimpleNamespace

    from luthier.run.execute import run

    rows = [{"prompt": "a", "completion": "b"}] * 4
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = a_recipe(model=str(model_folder), max_steps=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        LuthierError, match=r"output_dir: .* needs about .* 1 kB are free; choose a folder on another disk"
    ):
        run(recipe, tmp_path / "out", tmp_path)


def test_a_recipe_whose_miniature_does_not_work_runs_without_a_forecast(tmp_path):
    """More entries than four layers have, and fewer than the model's twelve."""
    from luthier.run.execute import run
    from luthier.testing.models import byte_tokenizer as tokenizer

    model = tiny("llama", layers=12, vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    recipe, said = a_recipe(model=str(tmp_path / "model"), max_steps=1, tuner={"spiel": {"num_weights": 60_000}}), []
    done = run(recipe, tmp_path / "out", tmp_path, say=said.append)
    assert done["state"] == "done" and "forecast" not in done
    assert any("no forecast (tuner.spiel.density: asks for 60000 entries of the" in line for line in said), said


LIST = {"rounds": 1, "unlabelled_steps": 4, "unlabelled_batch": 4, "labelled_epochs": 1.0, "rank": 4}


@pytest.mark.parametrize("kind", ["stages", "list"])
def test_a_pipelines_stages_are_forecast_by_a_pipeline_in_small(kind, caplog, monkeypatch):
    """The longest stage's memory, all stages' seconds; what checkpoints hold is added up."""
    if kind == "stages":
        two = [
            {"name": "a", "tuner": {"lora": {"rank": 4}}, "max_steps": 9},
            {"name": "b", "tuner": "full", "start": "a"},
        ]
        recipe = a_recipe(pipeline={"stages": {"stages": two}})
        rows = [Row(str(i), {"prompt": "p" * 9, "completion": "c" * 5}) for i in range(24)]
        sets = {"train": prepare(rows, Renderer(byte_tokenizer()), max_length=200)}
        names, steps = ["a", "b"], [9, 3]
    else:
        recipe = a_recipe(pipeline={"list": LIST}, task="classification", data={"train": "x.jsonl", "pool": "y.jsonl"})
        rows = [Row(str(i), {"text": "t" * (5 + i % 4), "label": "ab"[i % 2]}) for i in range(8)]
        maker = Classification().maker(Renderer(byte_tokenizer()), tiny("llama").config, {"a": 0, "b": 1})
        labelled = prepare(rows, Renderer(byte_tokenizer()), max_length=200, maker=maker)
        pool = [Row(f"p{i}", {"text": "u" * (5 + i % 4)}) for i in range(8)]
        bare = Classification().maker(
            Renderer(byte_tokenizer()), tiny("llama").config, {"a": 0, "b": 1}, labelled=False
        )
        unlabelled = prepare(pool, Renderer(byte_tokenizer()), max_length=200, maker=bare)
        sets = {"train": labelled, "labelled": labelled, "unlabelled": unlabelled}
        names, steps = ["teacher", "labels", "student", "round"], [2, None, 4, 2]
    config = tiny("llama", layers=6, vocab_size=300).config
    config.num_labels = 2
    measured, measure = [], fc.measure
    monkeypatch.setattr(fc, "measure", lambda *words: measured.append(measure(*words)) or measured[-1])
    whole = fc.forecast(recipe, config, byte_tokenizer(), sets)
    low, high = measured
    tokens = sets["train"].epoch_tokens / len(rows)
    for found, count in zip(high, steps, strict=True):
        batch = 8 if kind == "stages" else 4
        assert found.tokens == pytest.approx(tokens * (len(rows) if count is None else count * batch), rel=0.01)
        assert found.seconds_per_token > 0 and (found.trained > 0) is (count is not None)
    assert len(high) == len(names)
    each = [fc.grown(a, b, 6) for a, b in zip(low, high, strict=True)]
    view_bytes = sum(p.nbytes for p in recipe.task.auto(config).from_config(config).parameters())
    assert whole.weights == pytest.approx(view_bytes, rel=0.02)
    assert whole.trained_state == sum(s.trained_state for s in each)
    assert whole.memory_bytes == max(s.memory_bytes for s in each) and 0 < whole.seconds == sum(s.seconds for s in each)
    assert not caplog.records, "a small pool and a random teacher are no news of a miniature"


def test_stages_at_another_pace_are_forecast_at_it(data):
    stages = [{"name": "a", "tuner": {"lora": {"rank": 4}}, "max_steps": 10}]
    config = tiny("llama", layers=2, vocab_size=300).config
    recipes_ = [a_recipe(pipeline={"stages": {"stages": stages}}, pace={"length": x}) for x in (1.0, 0.5)]
    whole, half = (fc.measure(r, config, byte_tokenizer(), {"train": data}, 2)[0].tokens for r in recipes_)
    assert half == whole / 2
