"""Fields of rows and several sources, from a recipe to a finished run."""

import json

import pytest

from helpers.commands import luthier, rows, write
from luthier.recipe import load_file
from luthier.run.execute import run
from luthier.support.errors import RecipeError


def log(folder):
    return [json.loads(x)["loss"] for x in (folder / "log.jsonl").read_text().splitlines()]


def losses(tmp_path, name, model, train, data, **keys):
    """The steps' losses of a run, or what it said where it was refused."""
    folder = tmp_path / name
    data = {"train": "train.jsonl", "eval": "eval.jsonl", **data}
    path = write(folder, model, train=train, evaluate=[], max_steps=3, data=data, **keys)
    try:
        run(load_file(path), folder / "out", folder, forecast=False, judge=False)
    except RecipeError as error:
        return str(error)
    return log(folder / "out")


def test_a_weight_of_the_users_reaches_the_loss(model_folder, tmp_path):
    weighed = [{**r, "weight": w} for r, w in zip(rows(8), [1, 0, 2, 1] * 2, strict=True)]
    ones = [{**r, "weight": 1.0} for r in rows(8)]
    plain = losses(tmp_path, "plain", model_folder, ones, {})
    assert losses(tmp_path, "ones", model_folder, ones, {"keep": ["weight"]}) == plain
    assert losses(tmp_path, "weighed", model_folder, weighed, {"keep": ["weight"]}) != plain
    assert losses(tmp_path, "unkept", model_folder, weighed, {}) == plain
    refused = losses(tmp_path, "missing", model_folder, [*weighed, *rows(1)], {"keep": ["weight"]})
    assert "train.jsonl:9: has no field 'weight', which data.keep names" in refused
    assert "or write data.fill: {weight: VALUE}" in refused
    filled = losses(tmp_path, "filled", model_folder, rows(8), {"keep": ["weight"], "fill": {"weight": 1}})
    assert filled == plain


def test_check_and_the_run_list_the_sources(model_folder, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(6, 50)))
    train = [{"path": "train.jsonl"}, {"path": "more.jsonl", "weight": 3}]
    path = write(
        tmp_path, model_folder, train=rows(18), evaluate=[], data={"train": train, "eval": "eval.jsonl"}, max_steps=6,
    )  # fmt: skip
    said = json.loads(luthier("check", path, "--json", "--no-forecast", cwd=tmp_path).stdout)
    assert said["sources"] == [
        {"name": "train.jsonl", "rows": 18, "share": 0.5}, {"name": "more.jsonl", "rows": 6, "share": 0.5},
    ]  # fmt: skip
    assert (
        "source more.jsonl: 6 rows, 50.0% of the draws" in luthier("check", path, "--no-forecast", cwd=tmp_path).stdout
    )
    done = luthier("run", path, cwd=tmp_path)
    assert done.returncode == 0 and "source  more.jsonl: 6 rows, 50.0% of the draws" in done.stderr, done.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["sources"] == said["sources"] and run["census"]["rows"] == 24
    assert "Source more.jsonl" in (tmp_path / "out/report.html").read_text()


def test_two_files_of_weight_one_train_as_one_file(model_folder, tmp_path):
    whole = losses(tmp_path, "one", model_folder, rows(8), {})
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(3, 5)))
    two = losses(tmp_path, "two", model_folder, rows(5), {"train": [{"path": "train.jsonl"}, {"path": "more.jsonl"}]})
    assert two == whole


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_forecasts_tokens_are_those_of_the_draws(model_folder, tmp_path, epochs):
    """Rows of one source are longer, and it is drawn more than its size: tokens of an epoch follow the draws."""
    from luthier import recipe
    from luthier.run.ready import gather

    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "say " * 20, "completion": "so"}) + "\n")
    train = [{"path": "train.jsonl"}, {"path": "long.jsonl", "weight": 9}]
    path = write(tmp_path, model_folder, train=rows(9), data={"train": train}, evaluate=[], epochs=epochs)
    done = gather(recipe.load_file(path), tmp_path).data.train
    assert done.rows.mixture.draws == (5, 5)
    short, long = done.rows.lengths[:9].mean(), done.rows.lengths[9]
    assert done.epoch_tokens == pytest.approx(5 * short + 5 * long) and done.epoch_tokens > done.census.tokens
