"""Runs within a run: equal to runs of their own, carried out once, charged, stopped and refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.commands import luthier, rows, write
from luthier import recipe as recipes
from luthier.data.store import Row, Rows
from luthier.recipe import load_file as load_recipe
from luthier.run import nested
from luthier.run.execute import run
from luthier.run.nested import NestedRuns
from luthier.run.rows import given_rows
from luthier.step.lab import Lab, Nested
from luthier.support.cache import cache_folder
from luthier.support.errors import LuthierError, RecipeError
from luthier.training.loop import Interrupted

SHORT = {"max_steps": 2, "evaluate": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def outer(model_folder, tmp_path):
    return load_recipe(write(tmp_path, model_folder, **SHORT))


def test_a_nested_run_is_that_run_and_is_carried_out_once(outer, tmp_path, monkeypatch):
    lab = replace(Lab(), nested=NestedRuns(outer, tmp_path, processes=0))
    wanted = [
        Nested({"max_steps": 3}, keep=True), Nested({"max_steps": 1}),
        Nested({"max_steps": 3}, keep=True),
    ]  # fmt: skip
    three, one, again = lab.run(*wanted)
    alone = run(outer.model_copy(update={"max_steps": 3}), tmp_path / "alone", tmp_path)
    assert three.metrics["loss"] == alone["after"]["loss"]["value"] == again.metrics["loss"] != one.metrics["loss"]
    stored = load_file(tmp_path / "alone/adapter_model.safetensors")
    (part,) = three.update.parts
    assert sum(float(t.double().square().sum()) for t in part.tensors().values()) == pytest.approx(
        sum(float(t.double().square().sum()) for t in stored.values()), rel=1e-12
    )
    assert one.update is None and (three.progress.step, one.progress.step) == (3, 1)
    # Each is charged, whether it was carried out or read: an equal cost is not a matter of luck.
    assert lab.ledger.flops["nested"] == 2 * three.progress.flops["train"] + one.progress.flops["train"] > 0
    assert len(list((cache_folder() / "nested").iterdir())) == 2
    monkeypatch.setattr(NestedRuns, "_carry_out", lambda *_: pytest.fail("it was carried out before"))
    assert lab.run(*wanted[:2])[1].metrics == one.metrics


def test_other_rows_or_files_or_weights_are_other_runs(outer, tmp_path, monkeypatch):
    runs = NestedRuns(outer, tmp_path)
    some = Rows.of([Row(f"f:{i}", r) for i, r in enumerate(rows(6))])
    plain = runs._place(Nested({}))
    assert plain == NestedRuns(outer, tmp_path)._place(Nested({}))
    found = {
        plain, runs._place(Nested({}, some)), runs._place(Nested({}, some.take(np.arange(5)))),
        runs._place(Nested({}, some.weighing(np.arange(6.0)))), runs._place(Nested({"seed": 1})),
        runs._place(Nested({}, keep=True)),
    }  # fmt: skip
    assert len(found) == 6
    held = tmp_path / "eval.jsonl"
    held.write_text(held.read_text().replace("say 100", "say 101"))
    assert runs._place(Nested({})) != plain
    monkeypatch.setattr(nested, "code_key", lambda *_: "another")
    assert runs._place(Nested({})) not in found


def test_rows_and_their_weights_are_what_it_trains_on(outer, tmp_path):
    """Weights of 0 leave rows out: the run equals one on the others alone."""
    given = [Row(f"f:{i}", r) for i, r in enumerate(rows(4))]
    lab = replace(Lab(), nested=NestedRuns(outer, tmp_path, processes=0))
    settings = {"max_steps": 1, "shuffle": False}
    weighed = Rows.of(given).weighing(np.array([1.0, 0.0, 0.0, 1.0]))
    chosen = Rows.of([given[0], given[3]])
    a, b, c = lab.run(Nested(settings, weighed), Nested(settings, chosen), Nested(settings, Rows.of(given)))
    assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-6)
    assert abs(c.metrics["loss"] - b.metrics["loss"]) > 1e-4


def test_what_cannot_be_is_refused_and_what_fails_is_said(outer, tmp_path):
    runs = NestedRuns(outer, tmp_path, processes=0)
    with pytest.raises(RecipeError, match="nested run:1: max_stepz: there is no such key"):
        runs([Nested({"max_stepz": 3})])
    with pytest.raises(LuthierError, match="nested run with {'data': {'max_length': 2}}: "):
        runs([Nested({"data": {"max_length": 2}})])
    with pytest.raises(LuthierError, match="nothing here carries out nested runs"):
        Lab().run(Nested({}))


def test_a_request_to_stop_is_heard_between_two_looks(outer, tmp_path):
    runs = NestedRuns(outer, tmp_path, stop=lambda: True)
    with pytest.raises(Interrupted):
        runs([Nested({"max_steps": 5000, "data": {"train": "train.jsonl"}})])


CURATOR = '''
import numpy as np

from luthier.curation.base import Curator
from luthier.step.lab import Nested


class Halves(Curator):
    """Keeps the half of the rows that teaches more: two nested runs. Cost: two short runs."""

    def curate(self, table, lab):
        first = np.arange(len(table)) < len(table) // 2
        how = {"max_steps": 2, "evaluate": []}
        done = lab.run(*(Nested(how, table.rows.take(np.flatnonzero(half))) for half in (first, ~first)))
        losses = [o.metrics["loss"] for o in done]
        chosen = first if losses[0] < losses[1] else ~first
        return table.keep(np.flatnonzero(chosen), np.where(first, *losses), "half")
'''


def test_a_curator_learns_by_nested_runs_and_what_they_took_is_in_the_ledger(model_folder, tmp_path):
    """Half of the rows are noise; held-out rows are like the other half. The recipe's own code reaches the workers."""
    good = [{"prompt": "say", "completion": "aaaaaaaa"}] * 8
    bad = [{"prompt": "say", "completion": "zqxjvkwp"}] * 8
    (tmp_path / "halves_of_mine.py").write_text(CURATOR)
    path = write(tmp_path, model_folder, train=bad + good, held=good[:4], curate=["halves_of_mine:Halves"], **SHORT)
    done = luthier("run", path, "--allow-code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "out/run.json").read_text())
    assert [(k["step"], k["rows"], k["of"]) for k in state["curated"]] == [("halves-of-mine", 8, 16)]
    decided = json.loads((tmp_path / "out/curation.json").read_text())
    assert decided[0]["reasons"] == {"half": 16}
    assert state["census"]["rows"] == 8 and state["after"]["loss"]["value"] < state["before"]["loss"]["value"]
    runs = [json.loads(f.read_text()) for f in (tmp_path / "cache/nested").glob("*/run/run.json")]
    assert len(runs) == 2 and state["spent"]["flops"]["curate"] == sum(r["spent"]["flops"]["train"] for r in runs)
    written = [Path(f).read_text() for f in (tmp_path / "cache/nested").glob("*/rows.jsonl")]
    assert sorted(w.count("aaaaaaaa") for w in written) == [0, 8]


def test_a_nested_run_has_no_nested_runs(model_folder, tmp_path):
    (tmp_path / "halves_of_mine.py").write_text(CURATOR)
    recipe = load_recipe(write(tmp_path, model_folder, curate=["halves_of_mine:Halves"], **SHORT), code=tmp_path)
    with pytest.raises(LuthierError, match="nothing here carries out nested runs"):
        run(recipe, tmp_path / "inner", tmp_path, nested=False)
    assert NestedRuns(recipe, tmp_path).asked(Nested({})).curate == []


def test_a_pipelines_pool_and_stages_are_left_out(model_folder, tmp_path):
    stages = {"stages": {"stages": [{"name": "a"}]}}
    values = {"model": model_folder, "data": {"train": "x.jsonl"}, "pipeline": stages, "pace": {"length": 0.5}}
    asked = NestedRuns(recipes.load(json.dumps(values)), tmp_path).asked(Nested({"tuner": "full"}))
    assert asked.pipeline is None and asked.pace.length == 1.0 and asked.tuner.key() == "full"


def words(path):
    return [json.loads(x)["prompt"] for x in Path(path).read_text().splitlines()]


def test_a_share_holds_out_the_same_rows_in_every_nested_run(model_folder, tmp_path):
    """A nested run on the recipe's own rows sets the same ones apart; one on other rows is scored on these, too."""
    data = {"train": "train.jsonl", "eval": 0.25}
    outer = load_recipe(write(tmp_path, model_folder, train=rows(24), data=data, **SHORT))
    given = given_rows(outer.data, tmp_path, outer.task.shapes)
    held, trained = ([r.values["prompt"] for r in part] for part in (given.held, given.rows))
    assert len(held) == 6 and not set(held) & set(trained)
    runs = NestedRuns(outer, tmp_path, processes=0)
    half = Nested({"max_steps": 1}, given.rows.take(np.arange(9)))
    asked = [runs.asked(Nested(c)) for c in ({}, {"seed": 5}, {"data": {"max_length": 200}})]
    for one in asked:
        inner = given_rows(one.data, tmp_path, one.task.shapes)
        assert [r.values["prompt"] for r in inner.held] == held
        assert [r.values["prompt"] for r in inner.rows] == trained
    assert words(runs.asked(half, Path("rows")).data.eval) == held
    lab = replace(Lab(), nested=runs)
    whole, part = lab.run(Nested({"max_steps": 1}), half)
    (folder,) = [f.parent for f in (cache_folder() / "nested").glob("*/rows.jsonl") if len(words(f)) == 9]
    assert not set(words(folder / "rows.jsonl")) & set(held)
    alone = run(outer.model_copy(update={"max_steps": 1}), tmp_path / "alone", tmp_path)
    assert whole.metrics["loss"] == alone["after"]["loss"]["value"] != part.metrics["loss"]


@pytest.mark.parametrize("change", [{"limit": 12}, {"eval": 0.5}, {"train": "eval.jsonl"}, {"eval_by": "completion"}])
def test_a_nested_run_that_would_hold_out_other_rows_is_refused(change, model_folder, tmp_path):
    data = {"train": "train.jsonl", "eval": 0.25}
    repeated = [{**r, "completion": str(i % 5)} for i, r in enumerate(rows(24))]
    outer = load_recipe(write(tmp_path, model_folder, train=repeated, data=data, **SHORT))
    (name,) = change
    with pytest.raises(RecipeError, match=rf"nested run: data: with a change of {name} it would hold out other rows"):
        NestedRuns(outer, tmp_path).asked(Nested({"data": change}))
    plain = load_recipe(write(tmp_path / "b", model_folder, **SHORT))  # held-out rows in a file: nothing to mix up
    assert NestedRuns(plain, tmp_path / "b").asked(Nested({"data": {"limit": 12}})).data.limit == 12


def test_a_nested_run_may_set_a_share_of_its_own_rows_apart(model_folder, tmp_path):
    outer = load_recipe(write(tmp_path, model_folder, **SHORT))
    some = Rows.of([Row(f"f:{i}", r) for i, r in enumerate(rows(6))])
    assert NestedRuns(outer, tmp_path).asked(Nested({"data": {"eval": 0.5}}, some), Path("rows")).data.eval == 0.5
