"""What a collaboration gives can be asked, scored and exported by itself, far from the folder it was made in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from helpers.collaborations import recipe
from helpers.commands import luthier
from luthier import recipe as recipes
from luthier.demos.private import NAMES
from luthier.federation.folder import Workspace
from luthier.federation.outcome import FILE, read_given, write_outcome
from luthier.inference.generation import generate
from luthier.support.errors import LuthierError
from luthier.tuned.export import export
from luthier.tuned.open import answers, open_run, scores
from luthier.update.files import load

NAME, SYSTEM = NAMES[0], "You answer at once."


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    recipe(folder, collaborate="one-shot")
    agreed = recipes.load_file(folder / "r.yaml")
    data = agreed.data.model_copy(update={"system": SYSTEM, "max_length": 300})
    return Workspace.create(agreed.model_copy(update={"data": data}), folder, folder / "c")


@pytest.fixture(scope="module")
def update(workspace):
    rows = workspace.rendered(workspace.rows(f"{NAME}.jsonl", workspace.path.parent))
    return workspace.protocol.alone(NAME, workspace.contract, workspace.lab, rows)


@pytest.fixture
def folder(workspace, update, tmp_path):
    return write_outcome(workspace, "model", update, tmp_path / "given", NAME)


def test_it_is_asked_as_all_parties_asked(folder, workspace, update):
    prompts = [r.values["prompt"] for r in list(workspace.rows(f"{NAME}-held.jsonl", workspace.path.parent))[:3]]
    ids = [workspace.lab.renderer.prompt_ids({"prompt": p}) for p in prompts]
    assert workspace.lab.renderer.tokenizer.decode(ids[0]).count(SYSTEM) == 1
    with update.bind(workspace.first):
        expected = [c.text for c in generate(workspace.first, ids, workspace.lab.renderer, 8)]
    untouched = [c.text for c in generate(workspace.first, ids, workspace.lab.renderer, 8)]
    found = answers(folder, prompts, 8, base_too=True)
    assert [f["answer"] for f in found] == expected and [f["base"] for f in found] == untouched


def test_it_is_scored_on_own_rows(folder, workspace, update):
    held = workspace.path.parent / f"{NAME}-held.jsonl"
    expected = workspace.loss("model", update, workspace.rendered(workspace.rows(held.name, held.parent)))
    assert scores(folder, held.name, held.parent)["loss"]["value"] == pytest.approx(expected, rel=1e-4)
    assert scores(folder, str(held), folder)["loss"]["value"] == pytest.approx(expected, rel=1e-4), (
        "a path that is whole stays"
    )
    with pytest.raises(LuthierError, match="name rows with --data"):
        scores(folder, None, folder)


def test_it_is_exported_with_a_card(folder, workspace, update, tmp_path):
    assert export(folder, "peft", tmp_path / "peft")["difference"] < 1e-4
    assert export(folder, "hf", tmp_path / "hf")["difference"] < 1e-5
    ids = torch.tensor([workspace.lab.renderer.prompt_ids({"prompt": "a"})])
    with update.bind(workspace.first):
        expected = workspace.first.module(input_ids=ids).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for card, relation, library in ((folder, "adapter", "peft"), (tmp_path / "hf", "merge", "transformers")):
        found = front(card)
        assert found["base_model_relation"] == relation and found["library_name"] == library
        assert found["base_model"] == Path(workspace.first.name).name and "one-shot" in found["tags"]
        assert workspace.contract.digest[:16] in (card / "README.md").read_text()


def front(folder):
    return YAML(typ="safe", pure=True).load((folder / "README.md").read_text().split("---\n")[1])


def test_the_commands_take_it(folder, workspace):
    asked = luthier("generate", folder, "Wake me", "--max-new-tokens", 4, "--json", cwd=folder.parent)
    assert asked.returncode == 0 and json.loads(asked.stdout)[0]["prompt"] == "Wake me", asked.stderr
    none = luthier("evaluate", folder, cwd=folder.parent)
    assert none.returncode == 2 and "name rows with --data" in none.stderr


def test_another_model_in_its_place_is_refused(folder, workspace, tmp_path):
    shutil.copytree(workspace.models["model"], tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    stored = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**stored, "model": str(tmp_path / "other")}))
    with pytest.raises(LuthierError, match="this update was trained on"):
        answers(folder, ["a"], 2)
    (folder / FILE).write_text(json.dumps({**stored, "model": str(tmp_path / "gone")}))
    with pytest.raises(LuthierError, match=r"given.json: model: .*gone.*write its path"):
        open_run(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"luthier": 1}', '{"luthier": 2}'])
def test_a_damaged_file_is_named(folder, text):
    (folder / FILE).write_text(text)
    with pytest.raises(LuthierError, match=r"given\.json: cannot be read"):
        read_given(folder)


def test_a_model_that_is_not_at_hand_is_named_in_the_card_all_the_same(workspace, update, tmp_path):
    folder = write_outcome(workspace, "model", update, tmp_path / "g", NAME, model_here=False)
    assert front(folder)["base_model"] == Path(workspace.first.name).name
    assert load(folder).digest() == update.digest()
