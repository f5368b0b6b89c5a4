"""Answers are plain greedy whatever generation_config.json says, except for its ends; caches change with what matters."""

import json

import pytest

from luthier.data.rendering import Renderer
from luthier.inference.generation import generate
from luthier.inference.services import lab_around
from luthier.model.loading import Ends, load_config, load_ends, locate
from luthier.model.view import ModelView
from luthier.recipe import load
from luthier.run.evaluations import known, remember
from luthier.run.ready import tokens_and_config
from luthier.support.errors import RecipeError
from luthier.testing.models import TEMPLATE, byte_tokenizer, tiny


@pytest.fixture
def folder(tmp_path):
    tiny(vocab_size=260, layers=2).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def settings(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    located = locate(str(folder))
    return load_ends(located, load_config(located))


def test_ends_come_from_the_generation_settings(folder):
    assert settings(folder, eos_token_id=[7, 9], stop_strings=["\n\n"], repetition_penalty=1.1) == Ends(
        (7, 9), ("\n\n",)
    )
    assert settings(folder, eos_token_id=7, stop_strings="END") == Ends((7,), ("END",))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 4]}))
    located = locate(str(folder))
    assert load_ends(located, load_config(located)) == Ends((3, 4))


def test_an_option_that_the_template_does_not_read_is_refused(folder):
    byte_tokenizer().save_pretrained(folder)
    asked = f"model: {folder}\ndata: {{train: x.jsonl, template_options: {{enable_thinking: false}}}}\n"
    with pytest.raises(
        RecipeError, match="data.template_options.enable_thinking: the chat template reads no such variable"
    ):
        tokens_and_config(load(asked, "r"), folder)
    byte_tokenizer(TEMPLATE + "{{ enable_thinking }}").save_pretrained(folder)
    assert tokens_and_config(load(asked, "r"), folder)[1].options == {"enable_thinking": False}


def test_damaged_settings_are_named(folder):
    (folder / "generation_config.json").write_text("{")
    located = locate(str(folder))
    with pytest.raises(RecipeError, match="generation_config.json cannot be read"):
        load_ends(located, load_config(located))


def test_several_ends_and_stop_strings_end_an_answer():
    view, tokenizer = ModelView(tiny(vocab_size=260, layers=2).eval()), byte_tokenizer()
    prompts = [tokenizer("hello")["input_ids"]]
    (whole,) = generate(view, prompts, Renderer(tokenizer), 8)
    (cut,) = generate(view, prompts, Renderer(tokenizer, ends=range(3, 260)), 8)
    assert whole.tokens == 8 and not whole.stopped and cut.stopped and not cut.tokens and not cut.text
    text = whole.text[1:3]
    (stopped,) = generate(view, prompts, Renderer(tokenizer, stop_strings=("never there", text)), 8)
    assert stopped.stopped and stopped.text == whole.text[: whole.text.index(text)]


def test_a_plain_model_brings_its_ends():
    model = tiny(vocab_size=260)
    model.generation_config.eos_token_id, model.generation_config.stop_strings = [7, 2], "STOP"
    renderer = lab_around(model, byte_tokenizer()).renderer
    assert 7 in renderer.stop_ids and renderer.stop_strings == ("STOP",)


def test_stored_scores_change_with_the_files_of_the_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: m\n")
    state = {"state": "done", "eval_file": "builtin:requests", "update_digest": "d", "model_files": str(folder)}
    (run / "run.json").write_text(json.dumps(state))
    remember(run, None, {"loss": 1.0})
    assert known(run, None) == {"loss": 1.0}
    for name in ("config.json", "generation_config.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(before.replace("{", '{"more": 1,', 1))
        assert known(run, None) is None
        (folder / name).write_text(before)
    assert known(run, None) == {"loss": 1.0}
