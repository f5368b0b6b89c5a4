"""Rows of several sources in a comparison: a file for each, with its weight; a command gets one file or none."""

import json

import pytest

from luthier.comparison.plan import checked, load, recipe_of
from luthier.comparison.rows import written
from luthier.data.reading import ANSWERED
from luthier.run.rows import given_rows, training_rows
from luthier.support.errors import RecipeError

TRAIN = [{"path": "a.jsonl", "weight": 2, "limit": 20}, {"path": "b.csv", "columns": {"prompt": "q"}}]


def rows(n, start=0):
    return "".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(start, start + n))


def plan_of(folder, search, arms):
    (folder / "a.jsonl").write_text(rows(30))
    (folder / "b.csv").write_text("q,completion\n" + "".join(f"{i},x\n" for i in range(50, 60)))
    (folder / "e.jsonl").write_text(rows(2, 90))
    values = {"recipe": {"model": "a/b", "data": {"train": TRAIN, "eval": "e.jsonl"}}, "arms": arms, "search": search}
    return checked(values, "c", {})


@pytest.mark.parametrize("search", [None, {"rows": 10}])
def test_every_source_gets_a_file_and_keeps_its_weight(tmp_path, search):
    plan = plan_of(tmp_path, search, {"x": {}})
    recipe = recipe_of(plan, "x")
    files = written(plan, {"x": recipe}, tmp_path, tmp_path / "out")["x"]
    put = files.put_into(recipe, files.eval)
    assert [(s.weight, s.columns, s.limit) for s in put.data.sources] == [(2.0, {}, None), (1.0, {}, None)]
    left, _, mix = training_rows(put.data, tmp_path, ANSWERED)
    prompts = {r.values["prompt"] for r in left}
    whole = {*map(str, range(20)), *map(str, range(50, 60))}
    assert [o.weight for o in mix.origins] == [2.0, 1.0] and len(left) == len(prompts) == (30 if search is None else 20)
    chosen = set() if search is None else {json.loads(x)["prompt"] for x in files.valid.read_text().splitlines()}
    assert prompts | chosen == whole and not prompts & chosen
    first = [r.values["prompt"] for r in left if r.key.startswith(put.data.sources[0].path)]
    assert first and all(int(p) < 20 for p in first)


def test_a_command_cannot_mix(tmp_path):
    plan = plan_of(tmp_path, None, {"x": {}, "theirs": {"command": "train {train} {output}", "like": "x"}})
    with pytest.raises(
        RecipeError, match=r"arm theirs: data\.train: holds several sources, which a command cannot mix"
    ):
        written(plan, {a: recipe_of(plan, a) for a in plan.arms}, tmp_path, tmp_path / "out")


def test_paths_of_sources_move_with_the_recipes_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/r.yaml").write_text(json.dumps({"model": "a/b", "data": {"train": [{"path": "t.jsonl"}]}}))
    (tmp_path / "sub/t.jsonl").write_text("{}")
    (tmp_path / "c.yaml").write_text("recipe: sub/r.yaml\narms: {x: {}}\n")
    assert load(tmp_path / "c.yaml")[0].recipe["data"] == {"train": [{"path": str(tmp_path / "sub/t.jsonl")}]}


def prompts_in(file):
    return [json.loads(x)["prompt"] for x in file.read_text().splitlines()]


def test_a_share_of_held_out_rows_is_the_same_in_every_arm_and_never_trained_on(tmp_path):
    """Also where arms keep other fields, mix sources or search for a learning rate."""
    plan_of(tmp_path, None, {"x": {}})
    (tmp_path / "w.jsonl").write_text(
        "".join(json.dumps({**json.loads(x), "weight": 2.0}) + "\n" for x in rows(40).split("\n") if x)
    )
    arms = {
        "plain": {}, "seeded": {"seed": 3, "learning_rate": 0.1}, "kept": {"data.keep": ["weight"]},
        "short": {"data.max_length": 50},
    }  # fmt: skip
    recipe = {"model": "a/b", "data": {"train": "w.jsonl", "eval": 0.25}}
    plan = checked({"recipe": recipe, "arms": arms, "search": {"rows": 10}}, "c", {})
    recipes = {a: recipe_of(plan, a, base=tmp_path) for a in arms}
    files = written(plan, recipes, tmp_path, tmp_path / "out")
    held = prompts_in(files["plain"].eval)
    assert len(held) == 10 and {f.eval for f in files.values()} == {files["plain"].eval}
    for arm, mine in files.items():
        put = mine.put_into(recipes[arm], mine.eval)
        given = given_rows(put.data, tmp_path, ANSWERED)
        trained, chosen = [r.values["prompt"] for r in given.rows], prompts_in(mine.valid)
        assert [r.values["prompt"] for r in given.held] == held
        assert sorted([*held, *trained, *chosen], key=int) == [str(i) for i in range(40)]


def test_an_arm_that_would_hold_out_other_rows_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows(40))
    recipe = {"model": "a/b", "data": {"train": "a.jsonl", "eval": 0.25}}
    plan = checked({"recipe": recipe, "arms": {"x": {}, "y": {"data.limit": 20}}, "search": None}, "c", {})
    with pytest.raises(RecipeError, match="arm y: data.eval: holds other rows than another arm's"):
        written(plan, {a: recipe_of(plan, a) for a in plan.arms}, tmp_path, tmp_path / "out")
