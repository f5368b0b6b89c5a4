"""The folder of a run: which recipe it holds, and how another one differs from it."""

import json

import pytest

from helpers.commands import luthier, write
from luthier import recipe
from luthier.recipe.text import as_yaml
from luthier.run.folder import RunFolder, choose_folder, has_work, recipe_hash
from luthier.support.errors import LuthierError

TEXT = "model: m\ndata: {train: t.jsonl, limit: 3}\ntuner: {lora: {rank: 4}}\noutput_dir: out\n"


def test_a_changed_recipe_is_refused_with_each_key_that_differs(tmp_path):
    first = recipe.load(TEXT)
    place = RunFolder(tmp_path / "out")
    place.path.mkdir()
    place.write("recipe.yaml", as_yaml(first.as_dict()))
    place.note(recipe_hash=recipe_hash(first))
    place.log({"step": 1})
    assert choose_folder(first, "r", False, tmp_path) == tmp_path / "out"
    other = recipe.load(TEXT, overrides=["tuner.lora.rank=8", "learning_rate=0.5", "~data.limit", "save_steps=7"])
    with pytest.raises(LuthierError) as refused:
        choose_folder(other, "r", False, tmp_path)
    assert str(refused.value) == (
        f"output_dir: {tmp_path / 'out'} holds the run of another recipe (data.limit is 3 there, null here; "
        "learning_rate is 0.001 there, 0.5 here; tuner.lora.rank is 4 there, 8 here); choose another folder, or use --fresh"
    )
    assert choose_folder(other, "r", True, tmp_path) == tmp_path / "out-2"


def test_a_folder_whose_run_did_nothing_is_taken_by_the_corrected_recipe(model_folder, tmp_path):
    path = write(tmp_path / "a", "no/such", max_steps=1, evaluate=[])
    failed = luthier("run", path, cwd=path.parent, HF_HUB_OFFLINE="1")
    assert failed.returncode == 2 and (path.parent / "out/run.json").exists()
    RunFolder(path.parent / "out").note(signal=15)
    done = luthier("run", path, f"model={model_folder}", cwd=path.parent)
    assert done.returncode == 0, done.stderr
    state = json.loads((path.parent / "out/run.json").read_text())
    assert state["state"] == "done" and "signal" not in state
    refused = luthier("run", path, f"model={model_folder}", "max_steps=2", cwd=path.parent)
    assert refused.returncode == 2 and "max_steps is 1 there, 2 here" in refused.stderr


@pytest.mark.parametrize("left", ["log.jsonl", "before.json", "update.json", "checkpoint-2"])
def test_whatever_a_run_left_is_work(left, tmp_path):
    for name in ("run.json", "recipe.yaml", ".lock", "curation.json"):
        (tmp_path / name).touch()
    assert not has_work(tmp_path)
    (tmp_path / left).mkdir() if left.startswith("checkpoint") else (tmp_path / left).touch()
    assert has_work(tmp_path)
