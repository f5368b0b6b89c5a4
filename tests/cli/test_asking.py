"""What `luthier generate` and `luthier evaluate` read and print: lines, conversations, draws, intervals, the base model."""

import io
import json
import sys

import pytest

from helpers.commands import luthier
from helpers.finished import finished
from luthier.cli import asking
from luthier.support.errors import LuthierError
from luthier.tuned import open as opening
from luthier.tuned.open import open_run


@pytest.fixture(scope="module")
def run_folder(model_folder, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("asked"), model_folder)


def typed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_lines_of_standard_input_are_asked_one_by_one(run_folder, tmp_path, monkeypatch):
    typed(monkeypatch, "say 7\n\nsay 8\n")
    done = luthier("generate", run_folder, "--json", "--max-new-tokens", 4, cwd=tmp_path)
    said = json.loads(done.stdout)
    named = luthier("generate", run_folder, "say 7", "say 8", "--json", "--max-new-tokens", 4, cwd=tmp_path)
    assert [s["prompt"] for s in said] == ["say 7", "say 8"] and said == json.loads(named.stdout)
    typed(monkeypatch, " \n")
    nothing = luthier("generate", run_folder, cwd=tmp_path)
    assert nothing.returncode == 2 and nothing.stderr.startswith("luthier: generate: there is nothing to ask")


def test_a_conversation_sees_its_earlier_turns(run_folder, tmp_path, monkeypatch):
    seen = []

    def prompt_ids(self, values, _before=opening.Renderer.prompt_ids):
        seen.append([(m["role"], m["content"]) for m in values["messages"]])
        return _before(self, values)

    monkeypatch.setattr(opening.Renderer, "prompt_ids", prompt_ids)
    typed(monkeypatch, "say 7\n\nsay 8\n/new\nsay 9\n")
    done = luthier("generate", run_folder, "--chat", "--json", "--max-new-tokens", 4, cwd=tmp_path)
    first, second, third = (json.loads(line) for line in done.stdout.splitlines())
    assert [x["prompt"] for x in (first, second, third)] == ["say 7", "say 8", "say 9"] and done.returncode == 0
    assert seen[1] == [("user", "say 7"), ("assistant", first["answer"]), ("user", "say 8")]
    assert seen[0] == [("user", "say 7")] and seen[2] == [("user", "say 9")]
    refused = luthier("generate", run_folder, "say 7", "--chat", cwd=tmp_path)
    assert refused.returncode == 2 and "--chat: reads standard input" in refused.stderr


def test_draws_follow_the_options(run_folder, tmp_path):
    def asked(*options):
        done = luthier("generate", run_folder, "say 7", "--json", "--max-new-tokens", 12, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]["answer"]

    drawn = asked("--temperature", 3, "--seed", 1)
    assert drawn == asked("--temperature", 3, "--seed", 1) != asked("--temperature", 3, "--seed", 2)
    assert asked() == asked("--temperature", 0) != drawn
    assert asked("--top-p", 1e-6, "--temperature", 1) == asked()


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(LuthierError, match="holds bytes that are no text in the encoding of this terminal; set"):
        asking.lines(["fine", b"say \xff".decode("utf-8", "surrogateescape")])
    assert asking.lines(["say \u00fc", " "]) == ["say \u00fc"]


def test_options_of_draws_become_keys_of_the_recipe():
    changed = asking.changes(0.5, 0.9, 3)
    assert (changed["decode"].key(), changed["decode"].temperature, changed["decode"].top_p) == ("sample", 0.5, 0.9)
    assert changed["seed"] == 3 and asking.changes(None, None, None) == {}
    assert asking.changes(0, None, None)["decode"].key() == "greedy"
    with pytest.raises(LuthierError, match="--top-p: is not read with --temperature 0"):
        asking.changes(0, 0.5, None)


def test_an_evaluation_has_counts_intervals_and_the_base_beside_it(run_folder, tmp_path, monkeypatch):
    (tmp_path / "other.jsonl").write_text(
        '{"prompt": "say 3", "completion": "3 3"}\n{"prompt": "say 4", "completion": "4 4"}\n'
    )
    done = luthier("evaluate", run_folder, "--data", "other.jsonl", "--json", cwd=tmp_path)
    loss = json.loads(done.stdout)["loss"]
    change = loss["change"]
    assert loss["rows"] == 2 and loss["low"] < loss["value"] < loss["high"]
    assert (
        change["value"] == pytest.approx(loss["value"] - loss["base"])
        and change["low"] < change["value"] < change["high"]
    )
    told = luthier("evaluate", run_folder, "--data", "other.jsonl", cwd=tmp_path).stdout.splitlines()
    assert told[0].split() == ["measure", "base", "tuned", "95%", "change", "over"]
    line = next(x for x in told if x.startswith("loss"))
    assert f"{loss['base']:.4f}" in line and f"{loss['value']:.4f}" in line and "2 rows, nats a token" in line
    alone = json.loads(
        luthier("evaluate", run_folder, "--data", "other.jsonl", "--no-base", "--json", cwd=tmp_path).stdout
    )
    assert (alone["loss"]["base"], alone["loss"]["change"]) == (None, None)
    assert alone["loss"]["value"] == pytest.approx(loss["value"])


def test_the_command_in_the_report_runs_from_any_folder(run_folder, tmp_path):
    """`recipe.yaml` in a run names rows that lie beside the recipe it was copied from."""
    assert f"luthier run {run_folder.resolve()}/recipe.yaml --fresh" in (run_folder / "report.html").read_text()
    done = luthier("check", run_folder / "recipe.yaml", "--no-forecast", "--json", "~output_dir", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"] == json.loads((run_folder / "run.json").read_text())["census"]


def test_what_a_run_was_made_from_is_open_again(run_folder):
    assert open_run(run_folder).recipe.data.train == "train.jsonl"
