"""`luthier compare` from the command line: whole, killed and continued, with failing and foreign arms."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from helpers.commands import LUTHIER, luthier, rows, write
from helpers.finished import finished
from luthier.tuned.export import export

HERE = ("--processes", "0")  # in this process, which has torch already
KEYS = {"evaluate": [{"exact-match": {"rows": 4, "max_new_tokens": 4}}], "max_steps": 8, "output_dir": None}
# A tenth of the usual search, so that a test takes seconds.
PLAN = """recipe: r.yaml
seeds: 2
budget: {flops: 2.0e8}
search: {trials: 2, rows: 10}
"""


def plan(folder, model, arms, **keys):
    write(folder, model, train=rows(60), held=rows(8, 100), **{**KEYS, **keys})
    (folder / "c.yaml").write_text(PLAN + "arms: " + json.dumps(arms) + "\n")
    return folder / "c.yaml"


def events(done):
    return [x.split()[1] for x in done.stderr.splitlines() if x.startswith("done ")]


@pytest.fixture(scope="module")
def compared(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    path = plan(folder, model_folder, {"lora": {}, "full": {"tuner": "full"}})
    return folder, luthier("compare", path, "--json", *HERE, cwd=folder)


def test_a_comparison_says_who_is_better_at_equal_cost(compared):
    folder, done = compared
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    lora, full = said["arms"]
    assert [a["seeds"] for a in said["arms"]] == [[0, 1], [0, 1]] and lora["arm"] == "lora"
    assert full["levels"]["loss"]["outcome"] in ("held", "not held", "inconclusive")
    assert {"loss", "bits_per_byte", "exact_match", "general_loss", "canaries"} <= set(full["levels"])
    for arm in said["arms"]:
        assert arm["spent"]["flops"] == pytest.approx(2e8, rel=0.1), "equal cost, to a step of fourteen"
        assert arm["spent"]["search_runs"] == 3 and arm["learning_rate"] is not None
    page = (folder / "runs/compare-c/report.html").read_text()
    for question in ("Which arm is better", "how sure is that", "What it cost", "What was forgotten", "Run it again"):
        assert question in page
    assert "luthier compare" in page and "<script" not in page
    at_edge = [a["arm"] for a in said["arms"] if a["at_edge"]]
    assert at_edge and f"The learning rate of {' and '.join(at_edge)} is at the edge of those tried" in page


def test_its_runs_are_those_of_any_run_without_weights(compared, model_folder):
    folder, _ = compared
    place = next((folder / "runs/compare-c/arms/lora").glob("seed-0-*"))
    assert not list(place.glob("*.safetensors")) and (place / "report.html").exists()
    refused = luthier("generate", place, "hello", cwd=folder)
    assert refused.returncode == 2 and "kept scores and no weights" in refused.stderr
    run = json.loads((place / "run.json").read_text())
    assert run["row_tokens"] == run["tokens"] and run["spent"]["flops"]["train"] > 0


def test_the_first_short_run_of_an_arm_only_steps(compared):
    """It examines the untouched model, which every run needs, and writes no answers, pages or weights."""
    folder, _ = compared
    for place in folder.glob("runs/compare-c/arms/*/measure-*"):
        assert {f.name for f in place.iterdir()} == {
            "run.json",
            "recipe.yaml",
            "env.txt",
            "curation.json",
            "log.jsonl",
            ".lock",
        }
        run = json.loads((place / "run.json").read_text())
        assert run["steps"] == 4 and "after" not in run and run["before"]["loss"]["value"] > 0
    seconds = [
        json.loads(p.read_text())["evaluation_seconds"] for p in folder.glob("runs/compare-c/arms/*/measure-*/run.json")
    ]
    assert seconds[0] == seconds[1] > 0, "what an examination takes is known where the cache answers, too"


def test_finished_runs_are_never_run_twice_and_more_seeds_add_only_theirs(compared):
    folder, _ = compared
    again = luthier("compare", folder / "c.yaml", *HERE, cwd=folder)
    assert again.returncode == 0 and events(again) == [] and "10 done before" in again.stderr
    now = luthier("compare", folder / "c.yaml", "--so-far", "--json", cwd=folder)
    assert events(now) == [] and json.loads(now.stdout)["arms"] == json.loads(compared[1].stdout)["arms"]
    assert "Not finished" not in (folder / "runs/compare-c/report.html").read_text()
    more = luthier("compare", folder / "c.yaml", "--seeds", "3", *HERE, cwd=folder)
    assert events(more) and {e.split("/")[1] for e in events(more)} == {"seed-2"}, more.stderr


def test_a_failed_arm_is_reported_and_the_others_go_on(compared, model_folder, tmp_path):
    arms = {"lora": {}, "wild": {"tuner": "full", "learning_rate": 1e30, "on_nan": "stop"}, "full": {"tuner": "full"}}
    path = plan(tmp_path, model_folder, arms)
    words = ("compare", path, "search=null", "seeds=[0]")
    done = luthier(*words, *HERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "failed: wild" in done.stdout and "lower learning_rate" in done.stdout
    assert "wild" in (tmp_path / "runs/compare-c/report.html").read_text()
    strict = luthier(*words, "--strict", *HERE, cwd=tmp_path)
    assert strict.returncode == 1 and events(strict) == []


def assert_goes_on(path, said):
    """A stopped comparison is judged as far as it is, and the same command does only what is left."""
    seen, folder = said.count("\ndone "), path.parent
    now = luthier("compare", path, "--so-far", cwd=folder)
    assert not events(now) and "Not finished: lora has " in now.stdout, now.stderr
    assert now.stdout.endswith("report.html\n")
    last = luthier("compare", path, *HERE, cwd=folder)
    assert last.returncode == 0, last.stderr
    before = int(re.search(r"(\d+) done before", last.stderr).group(1))
    assert seen <= before <= seen + 2 and len(events(last)) == 10 - before, last.stderr


def test_ctrl_c_while_a_worker_trains_keeps_what_is_done(model_folder, tmp_path, monkeypatch):
    from luthier.cli.progress import Bar

    path, say, timers = plan(tmp_path, model_folder, {"lora": {}, "full": {"tuner": "full"}}), Bar.say, []

    def saying(self, text):
        say(self, text)
        if text.startswith("done ") and not timers:
            timers.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
            timers[0].start()

    monkeypatch.setattr(Bar, "say", saying)
    stopped = luthier("compare", path, "--processes", "1", cwd=tmp_path)
    assert stopped.returncode == 130 and "continue with: luthier compare" in stopped.stderr, stopped.stderr
    assert 1 <= len(events(stopped)) < 10
    assert_goes_on(path, stopped.stderr)


@pytest.mark.soak  # the same from outside; SIGKILL leaves workers that still save
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside_at_any_moment_it_goes_on(ending, model_folder, tmp_path):
    path = plan(tmp_path, model_folder, {"lora": {}, "full": {"tuner": "full"}})
    with (tmp_path / "err").open("w") as err:
        child = subprocess.Popen([*LUTHIER, "compare", str(path)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err)
        until = time.monotonic() + 120
        while time.monotonic() < until and (tmp_path / "err").read_text().count("done ") < 3:
            time.sleep(0.05)
        child.send_signal(ending)
        code = child.wait(90)
    assert code == (-9 if ending == signal.SIGKILL else 130)
    assert_goes_on(path, (tmp_path / "err").read_text())


def test_a_dry_run_says_what_it_will_take(model_folder, tmp_path):
    path = plan(tmp_path, model_folder, {"lora": {}, "full": {"tuner": "full"}})
    done = luthier("compare", path, "--dry-run", "--json", *HERE, cwd=tmp_path)
    assert done.returncode == 0 and "expect  8 runs" in done.stderr and "budget  200 MFLOP a run" in done.stderr
    left = json.loads(done.stdout)["forecast"]
    assert (
        left["runs"] == 8 and left["flops"] == pytest.approx(2 * (2 + 2 * 0.25) * 2e8, rel=0.2) and left["seconds"] > 0
    )
    assert {e.split("/")[1] for e in events(done)} == {"measure"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("~recipe.data.eval",), "evaluate: has no rows to evaluate on"),
        (("primary=rouge1",), "nothing in arm lora measures rouge1"),
        (("search.rows=50",), "50 of 60 rows to choose a learning rate"),
        (("recipe.torch_compile=true",), "arm lora: torch_compile: hides the FLOPs from the ledger"),
        (("arms.lora.task=classification",), "arm lora"),
        (("recipe.learning_rat=1",), "there is no such key"),
        (("--processes", "2", "--budget", "seconds=5"), "a budget in seconds is only fair"),
    ],
)
def test_faults_are_named_before_anything_is_trained(model_folder, tmp_path, change, words):
    path = plan(tmp_path, model_folder, {"lora": {}, "full": {"tuner": "full"}})
    said = luthier("compare", path, *change, cwd=tmp_path)
    assert said.returncode == 2 and words in said.stderr, said.stderr
    assert not [e for e in events(said) if "measure" not in e]


TRL = """
import sys, json
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, train, output, seed, rate, steps, batch = sys.argv[1:]
config = SFTConfig(output_dir=output + "/work", max_steps=int(steps), learning_rate=float(rate), seed=int(seed), use_cpu=True,
                   per_device_train_batch_size=int(batch), report_to="none", save_strategy="no", completion_only_loss=True,
                   bf16=False, disable_tqdm=True, max_length=64)
rows = load_dataset("json", data_files=train, split="train").select_columns(["prompt", "completion"])
trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(model), config, train_dataset=rows,
                     processing_class=AutoTokenizer.from_pretrained(model),
                     peft_config=LoraConfig(r=4, target_modules="all-linear"))
trainer.train()
trainer.save_model(output)
"""


def test_what_a_command_leaves_is_scored_as_a_run_is(model_folder, tmp_path):
    """One command leaves a peft adapter, another a whole model: both are a finished run's, whose loss is known."""
    run = finished(tmp_path / "run", model_folder, held=rows(8, 100))
    export(run, "hf", tmp_path / "whole")
    loss = json.loads((run / "run.json").read_text())["after"]["loss"]["value"]
    copy = f"{sys.executable} -c 'import shutil, sys; shutil.copytree(*sys.argv[1:])'"
    commands = {"adapter": f"{copy} {run} {{output}}", "whole": f"{copy} {tmp_path / 'whole'} {{output}}"}
    arms = {"lora": {}, **{name: {"command": c, "like": "lora"} for name, c in commands.items()}}
    done = luthier(
        "compare", plan(tmp_path, model_folder, arms), "search=null", "seeds=[0]", "--json", *HERE, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lora, *theirs = json.loads(done.stdout)["arms"]
    for arm in theirs:
        assert arm["levels"]["loss"]["value"]["value"] == pytest.approx(loss, rel=1e-5), arm["arm"]
        assert arm["levels"]["loss"]["base"] == lora["levels"]["loss"]["base"] > loss
        assert arm["spent"]["steps"] == lora["spent"]["steps"] and arm["spent"]["flops"] == pytest.approx(2e8, rel=0.1)
        assert set(arm["levels"]) == set(lora["levels"])


@pytest.mark.soak  # importing trl takes long; what a command leaves is tested above
def test_an_arm_of_trls_is_trained_and_scored_on_the_same_rows(model_folder, tmp_path):
    pytest.importorskip("trl")
    command = f"{sys.executable} trl_arm.py {{model}} {{train}} {{output}} {{seed}} {{learning_rate}} {{steps}} {{batch_size}}"
    arms = {"lora": {}, "trl": {"command": command, "like": "lora", "learning_rate": 0.01}}
    path = plan(tmp_path, model_folder, arms)
    (tmp_path / "trl_arm.py").write_text(TRL)
    done = luthier("compare", path, "search=null", "seeds=[0]", "--json", *HERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lora, trl = json.loads(done.stdout)["arms"]
    assert trl["spent"]["steps"] == lora["spent"]["steps"] and trl["spent"]["flops"] == pytest.approx(2e8, rel=0.1)
    assert trl["levels"]["loss"]["value"]["value"] < trl["levels"]["loss"]["base"], "it learnt"
    assert set(trl["levels"]) == set(lora["levels"])


def test_a_command_that_fails_is_told_with_its_last_words(model_folder, tmp_path):
    exits = f"{sys.executable} -c 'raise SystemExit(\"no such trainer\")'"
    commands = {"bad": exits, "empty": f"{sys.executable} -c pass", "typo": "x {modle}"}
    arms = {"lora": {}, **{name: {"command": c, "like": "lora"} for name, c in commands.items()}}
    done = luthier("compare", plan(tmp_path, model_folder, arms), "search=null", "seeds=[0]", *HERE, cwd=tmp_path)
    for words in ("no such trainer", "left no model in", "asks for 'modle'"):
        assert words in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1 and Path(tmp_path / "runs/compare-c/report.html").exists(), "nothing is left to compare"


TWO = {
    "pipeline": {"stages": {"stages": [
        {"name": "a", "tuner": {"lora": {"rank": 4}}, "learning_rate": 0.01, "batch_size": 4, "epochs": 1.0},
        {"name": "b", "tuner": "full", "start": "a", "learning_rate": 0.002, "batch_size": 2, "max_steps": 10},
    ]}}
}  # fmt: skip


def test_a_pipeline_is_compared_at_equal_cost_with_its_rates_searched(model_folder, tmp_path):
    """An arm in stages beside a plain one: its stages keep their shares of steps and of rates, whatever the budget."""
    write(tmp_path, model_folder, train=rows(60), held=rows(8, 100))
    shared = {"model": model_folder, "data": {"train": "train.jsonl", "eval": "eval.jsonl"}}
    plain = {"tuner": {"lora": {"rank": 4}}, "learning_rate": 0.01, "batch_size": 4}
    values = {
        "recipe": shared, "arms": {"plain": plain, "two": TWO}, "seeds": 2, "budget": {"flops": 2.0e8},
        "search": {"trials": 2, "rows": 10},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    done = luthier("compare", "c.yaml", "--json", *HERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [a["seeds"] for a in said["arms"]] == [[0, 1], [0, 1]]
    for arm in said["arms"]:
        assert arm["spent"]["flops"] == pytest.approx(2e8, rel=0.1), arm["arm"]
    runs = {}
    for place in (tmp_path / "runs/compare-c/arms/two").iterdir():
        runs[place.name.rpartition("-")[0]] = (
            json.loads((place / "run.json").read_text()), YAML(typ="safe", pure=True).load((place / "recipe.yaml").read_text())
        )  # fmt: skip
    whole = [s["steps"] for s in runs["seed-0"][0]["stages"]]
    assert whole[0] / whole[1] == pytest.approx(13 / 10, rel=0.1)  # 50 rows of 60 train, in steps of 4
    assert [s["steps"] for s in runs["measure"][0]["stages"]] == [4, 4]
    rates = [runs[f"trial-{i}"][1]["pace"]["learning_rate"] for i in range(2)]
    assert rates == pytest.approx([1.0, 1 / 3]), "of both stages"
    seeds = [s["seed"] for s in runs["seed-1"][1]["pipeline"]["stages"]["stages"]]
    assert seeds == [1, 1] and runs["seed-0"][0]["after"] != runs["seed-1"][0]["after"]
    capped = {**values, "arms": {"two": {**TWO, "pace": {"max_steps": 3}}}}
    (tmp_path / "c.yaml").write_text(json.dumps(capped))
    refused = luthier("compare", "c.yaml", *HERE, cwd=tmp_path)
    assert refused.returncode == 2 and "pace.max_steps: caps the stages" in refused.stderr
