"""A comparison's file and words: what it means, and what is refused with line and key."""

import json

import pytest

from luthier.cli.compare import budget_from, planned, searching, seeds_from
from luthier.comparison.plan import Search, load, recipe_of, slug, varied, with_seed
from luthier.support.errors import LuthierError, RecipeError

BASE = {"model": "a/b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
FILE = """recipe: {model: a/b, data: {train: t.jsonl, eval: e.jsonl}}
arms:
  small: {tuner: {lora: {rank: 4}}, learning_rate: 0.01}
  large: {tuner.lora.rank: 64}
seeds: 3
"""


def test_a_file_with_arms(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)
    plan, base = load(tmp_path / "c.yaml")
    assert plan.seeds == (0, 1, 2) and plan.base_arm == "small" and base == tmp_path
    small, large = recipe_of(plan, "small"), recipe_of(plan, "large")
    assert (small.tuner.rank, small.learning_rate, large.tuner.rank) == (4, 0.01, 64)


def test_a_recipe_named_by_path_keeps_its_own_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/r.yaml").write_text("model: a/b\ndata: {train: t.jsonl, eval: e.jsonl}\n")
    (tmp_path / "sub/t.jsonl").write_text("{}")
    (tmp_path / "c.yaml").write_text("recipe: sub/r.yaml\narms: {x: {}}\n")
    plan, _ = load(tmp_path / "c.yaml")
    assert plan.recipe["data"] == {"train": str(tmp_path / "sub/t.jsonl"), "eval": "e.jsonl"}


def test_vary_makes_an_arm_a_value_and_every_combination():
    plan = varied(BASE, ["tuner=lora,{spiel: {density: 0.05}}", "learning_rate=0.1,1e-3"])
    assert list(plan.arms) == ["lora 0.1", "lora 0.001", "spiel 0.1", "spiel 0.001"]
    assert recipe_of(plan, "spiel 0.001").tuner.density == 0.05
    named = varied(BASE, ["tuner={lora: {rank: 4}},{lora: {rank: 8}}"])
    assert list(named.arms) == ["lora rank=4", "lora rank=8"] and recipe_of(named, "lora rank=8").tuner.rank == 8
    own = varied({**BASE, "tuner": {"lora": {"rank": 4}}}, ["tuner=lora,full"])
    assert list(own.arms) == ["lora", "full"] and recipe_of(own, "lora").tuner.rank == 4
    lists = varied(BASE, ["curate=[],[random: {keep_fraction: 0.5}]"])
    assert list(lists.arms) == ["none", "random keep_fraction=0.5"] and len(recipe_of(lists, "none").curate) == 0


def test_words_on_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)
    for name, rank in (("r", 4), ("s", 8)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**BASE, "tuner": {"lora": {"rank": rank}}}))
    plan, _, name = planned([str(tmp_path / "c.yaml"), "budget.flops=1e9", "margin=0.1"], [], {"seeds": [7]})
    assert (plan.budget.amount, plan.margin, plan.seeds, name) == (1e9, 0.1, (7,), "c")
    plan, _, name = planned([str(tmp_path / "r.yaml"), str(tmp_path / "s.yaml"), "learning_rate=0.5"], [], {})
    assert name == "r-s" and [recipe_of(plan, a).tuner.rank for a in ("r", "s")] == [4, 8]
    assert recipe_of(plan, "s").learning_rate == 0.5
    plan, base, _ = planned([str(tmp_path / "r.yaml"), "batch_size=2"], ["tuner=lora,full"], {"primary": "loss"})
    assert list(plan.arms) == ["lora", "full"] and recipe_of(plan, "full").batch_size == 2 and base == tmp_path
    assert budget_from("flops=1e13") == {"flops": 1e13} and budget_from(None) is None
    assert seeds_from("3") == [0, 1, 2] and seeds_from("4,9") == [4, 9] and seeds_from(None) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("arms: {}", "nothing to compare"),
        ("baseline: none", "there is no arm 'none'; known are small, large"),
        ("budgett: 3", "c.yaml:6: budgett: there is no such key"),
        ("budget: {flops: 1, tokens: 2}", "write exactly one of"),
        ("budget: {flops: -1}", "c.yaml:6: budget.flops"),
        ("seeds: [1, 1]", "holds a seed twice"),
        ("search: {trials: 0}", "c.yaml:6: search.trials"),
        ("arms: {a: {command: x}}", "name an arm of luthier in like"),
        (
            "arms: {a: {command: x, like: b}, b: {command: y}}\nbudget: {flops: 1}",
            "'b' names no arm of this comparison",
        ),
        ("arms: {'a b': {}, a-b: {}}", "two names are the same folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, words):
    key = change.split(":")[0]
    gone = (key, "  ") if key == "arms" else (key,)
    text = "".join(x + "\n" for x in FILE.splitlines() if not x.startswith(gone))
    (tmp_path / "c.yaml").write_text(text + change + "\n")
    with pytest.raises(RecipeError) as refused:
        load(tmp_path / "c.yaml")
    assert words in str(refused.value), refused.value


def test_a_wrong_arm_is_named():
    plan = varied(BASE, ["tuner=lora,nosuch"])
    with pytest.raises(RecipeError, match="arm nosuch.*there is no tuner called 'nosuch'"):
        recipe_of(plan, "nosuch")
    for words, vary, message in (
        ([], [], "names no recipe"),
        (["x"], ["tuner"], "cannot be read"),
        (["a=1"], [], "names no recipe"),
    ):
        with pytest.raises(RecipeError, match=message):
            planned(words, vary, {})
    with pytest.raises(RecipeError, match="names no values"):
        varied(BASE, ["tuner"])
    for wrong in ("flops", "flops=many"):
        with pytest.raises(LuthierError, match="write flops=1e13"):
            budget_from(wrong)
    with pytest.raises(LuthierError, match="write how many"):
        seeds_from("few")


def test_a_seed_reaches_every_methods_own_draws():
    recipe = recipe_of(varied(BASE, ["tuner={spiel: {seed: 5}}"]), "spiel")
    moved = with_seed(recipe, 3)
    assert (moved.seed, moved.tuner.seed, recipe.tuner.seed) == (3, 8, 5)


def test_names_become_folders():
    assert slug("spiel density=0.05 / x") == "spiel-density=0.05-x" and slug("../..") == "arm"


def test_rows_of_the_search_are_an_option():
    assert searching(Search(trials=2), True, 12) == Search(trials=2, rows=12)
    assert searching(Search(), False, None) is None and searching(Search(), True, None) == Search()
    with pytest.raises(LuthierError, match="--search-rows 12: is not read without a search"):
        searching(Search(), False, 12)
    with pytest.raises(LuthierError, match=r"--search-rows 12: is not read beside search\.data"):
        searching(Search(data="x.jsonl"), True, 12)
