"""The folder of a run: which recipe it holds, and how another one differs from it."""

import pytest

from luthier import recipe
from luthier.recipe.text import as_yaml
from luthier.run.folder import RunFolder, choose_folder, recipe_hash
from luthier.support.errors import LuthierError

TEXT = "model: m\ndata: {train: t.jsonl, limit: 3}\ntuner: {lora: {rank: 4}}\noutput_dir: out\n"


def test_a_changed_recipe_is_refused_with_each_key_that_differs(tmp_path):
    first = recipe.load(TEXT)
    place = RunFolder(tmp_path / "out")
    place.path.mkdir()
    place.write("recipe.yaml", as_yaml(first.as_dict()))
    place.note(recipe_hash=recipe_hash(first))
    assert choose_folder(first, "r", False, tmp_path) == tmp_path / "out"
    other = recipe.load(TEXT, overrides=["tuner.lora.rank=8", "learning_rate=0.5", "~data.limit", "save_steps=7"])
    with pytest.raises(LuthierError) as refused:
        choose_folder(other, "r", False, tmp_path)
    assert str(refused.value) == (
        f"output_dir: {tmp_path / 'out'} holds the run of another recipe (data.limit is 3 there, null here; "
        "learning_rate is 0.001 there, 0.5 here; tuner.lora.rank is 4 there, 8 here); choose another folder, or use --fresh"
    )
    assert choose_folder(other, "r", True, tmp_path) == tmp_path / "out-2"
