"""A run from the command line: what it leaves, how it goes on, what it says."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from helpers.commands import LUTHIER, luthier, rows, write
from luthier.testing.models import byte_tokenizer, tiny


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = write(folder, model_folder)
    return folder, luthier("run", recipe, cwd=folder)


def test_a_run_leaves_what_was_promised(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    names = {p.name for p in (folder / "out").iterdir()}
    assert {
        "recipe.yaml", "run.json", "log.jsonl", "report.html", "samples.jsonl", "env.txt", "adapter_config.json",
        "adapter_model.safetensors", "update.json", "all_results.json", "README.md", "tokenizer.json",
    } <= names  # fmt: skip
    run = json.loads((folder / "out" / "run.json").read_text())
    assert (
        run["state"] == "done" and run["steps"] == 6 and run["after"]["loss"]["value"] < run["before"]["loss"]["value"]
    )
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log] == list(range(1, 7))
    assert {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens"} <= log[0].keys()


def test_its_recipe_holds_every_default_and_runs_again(finished):
    folder, _ = finished
    from luthier import recipe

    loaded = recipe.load_file(folder / "out" / "recipe.yaml")
    assert loaded.learning_rate == 0.01 and loaded.tuner.rank == 4 and loaded.adam_eps == 1e-8
    assert loaded == recipe.load_file(folder / "r.yaml")


def test_a_lora_run_opens_with_peft(finished, model_folder):
    from peft import PeftModel

    folder, _ = finished
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = base(input_ids=ids).logits
    tuned = PeftModel.from_pretrained(base, str(folder / "out"))
    assert not torch.equal(plain, tuned(input_ids=ids).logits)


def test_a_full_run_opens_with_transformers(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder, train=rows(8), tuner="full", evaluate=[])
    assert luthier("run", recipe, cwd=tmp_path).returncode == 0
    from luthier.tuned.open import open_run

    run, ids = open_run(tmp_path / "out"), torch.tensor([[5, 6, 7, 8]])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with run.update.bind(run.view):
        torch.testing.assert_close(
            whole(input_ids=ids).logits, run.view.module(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )


def test_trackers_are_fed_and_never_stop_a_run(monkeypatch, model_folder, tmp_path):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    from luthier import recipe as recipes
    from luthier.integrations import tracking
    from luthier.run.execute import run
    from luthier.support.errors import RecipeError

    seen = []

    class Good(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, logs["loss"]))

    class Bad(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            raise RuntimeError("server gone")

    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", {"good": Good, "bad": Bad, "wandb": Good})
    with pytest.raises(RecipeError, match="there is no tracker 'wandbb'"):
        tracking.check(["wandbb"])
    with pytest.raises(RecipeError, match="package of wandb is not installed"):
        tracking.check(["wandb"])
    monkeypatch.setattr(tracking, "check", lambda names: None)
    path = write(tmp_path, model_folder, report_to=["good", "bad"], max_steps=2, evaluate=[])
    done = run(recipes.load_file(path), tmp_path / "out", tmp_path, forecast=False)
    assert done["state"] == "done" and [s for s, _ in seen] == [1, 2]


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(finished):
    folder, _ = finished
    again = luthier("run", folder / "r.yaml", cwd=folder)
    assert again.returncode == 0 and "finished already" in again.stderr
    other = luthier("run", folder / "r.yaml", "learning_rate=0.02", cwd=folder)
    assert other.returncode == 2 and "holds the run of another recipe" in other.stderr


def test_interrupted_twice_it_saves_and_goes_on_to_the_same_weights(model_folder, tmp_path, monkeypatch):
    """Ctrl-C in step 2 and SIGTERM in step 4: the step ends, and the command that the run names goes on."""
    from luthier.cli.progress import Bar
    from luthier.update.files import load

    keys = {"train": rows(8), "max_steps": 6, "evaluate": []}
    recipes = {name: write(tmp_path / name, model_folder, **keys) for name in ("whole", "stopped")}
    folder, words, sent = tmp_path / "stopped", ["run", recipes["stopped"]], {}

    def step(self, entry, progress, total):
        if entry["step"] in sent:
            os.kill(os.getpid(), sent[entry["step"]])

    monkeypatch.setattr(Bar, "step", step)
    for at, number, code in ((2, signal.SIGINT, 130), (4, signal.SIGTERM, 143)):
        sent.clear()
        sent[at] = number
        stopped = luthier(*words, cwd=folder)
        assert stopped.returncode == code and f"stopped after step {at} of 6" in stopped.stderr, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert json.loads((folder / "out/run.json").read_text())["state"] == "stopped"
        words = told(stopped.stderr)
    sent.clear()
    for name, asked in (("whole", ["run", recipes["whole"]]), ("stopped", words)):
        done = luthier(*asked, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    ends = [load(tmp_path / name / "out").dense() for name in recipes]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.soak  # the same signals, from outside at any moment, to a process of its own
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_of_its_own_saves_and_ends_by_its_signal(number, code, model_folder, tmp_path):
    recipe, log = write(tmp_path, model_folder, epochs=40, evaluate=[]), tmp_path / "out/log.jsonl"
    child = subprocess.Popen([*LUTHIER, "run", str(recipe)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in said, said
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "stopped"


def told(stderr):
    """The arguments of the command that a stopped run says goes on with it."""
    line = next(x for x in stderr.splitlines() if x.startswith("continue with: "))
    return shlex.split(line.removeprefix("continue with: luthier "))


def test_max_time_saves_and_after_fresh_the_command_names_the_new_folder(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder, train=rows(8), max_steps=2, evaluate=[])
    for fresh in ([], ["--fresh"]):
        stopped = luthier("run", recipe, *fresh, "--max-time", "0", cwd=tmp_path)
        assert stopped.returncode == 0 and "stopped after step 0 of 2" in stopped.stderr, stopped.stderr
    command = told(stopped.stderr)
    assert "--fresh" not in command and f"output_dir={tmp_path / 'out-2'}" in command
    done = luthier(*command, "--max-time", "2h", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    states = {f: json.loads((tmp_path / f / "run.json").read_text())["state"] for f in ("out", "out-2")}
    assert states == {"out": "stopped", "out-2": "done"}


def test_a_second_process_in_the_same_folder_is_refused(model_folder, tmp_path):
    import fcntl

    recipe = write(tmp_path, model_folder)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 2 and "another process is working in this folder" in done.stderr


SPIEL = {"spiel": {"variant": "ma", "density": 0.05}}


def thing(i):
    return {"text": f"{'good' if i % 2 else 'poor'} thing {i}", "label": "yes" if i % 2 else "no"}


CLASSES = {"task": "classification", "epochs": 6, "evaluate": []}


@pytest.mark.parametrize("tuner", ["full", "adapter", "layerwise", "hft", "green-trainer", SPIEL], ids=str)
def test_classification_with_any_tuner_learns_its_head(tuner, model_folder, tmp_path):
    from luthier.recipe import load_file
    from luthier.run.execute import run

    train = [thing(i) for i in range(24)]
    path = write(tmp_path, model_folder, train=train, held=train[:8], tuner=tuner, **CLASSES)
    done = run(load_file(path), tmp_path / "out", tmp_path, forecast=False)
    assert done["after"]["loss"]["value"] < 0.5 * done["before"]["loss"]["value"]
    assert done["classes"] == ["no", "yes"] and done["after"]["accuracy"]["value"] == 1


def test_a_classifier_names_classes_and_is_scored_and_opened_by_others(model_folder, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from luthier.tuned.open import open_run

    train = [thing(i) for i in range(24)]
    recipe = write(tmp_path, model_folder, train=train, held=train[:8], **CLASSES)
    done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "out" / "run.json").read_text())["after"]
    assert after["accuracy"]["value"] == 1 == after["macro_f1"]["value"] and after["accuracy"]["rows"] == 8
    assert "accuracy" in (tmp_path / "out/report.html").read_text()
    samples = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(s["prompt"], s["wanted"], s["after"]) for s in samples] == [
        (r["text"], r["label"], r["label"]) for r in train[:8]
    ]
    asked = ("generate", tmp_path / "out", "good thing 5", "poor thing 4")
    named = json.loads(luthier(*asked, "--json", cwd=tmp_path).stdout)
    assert [x["answer"] for x in named] == ["yes", "no"] and all(0.5 < x["share"] <= 1 for x in named)
    assert luthier(*asked, cwd=tmp_path).stdout == "yes\nno\n"
    refused = luthier("generate", tmp_path / "out", "good", "--base", cwd=tmp_path)
    assert refused.returncode == 2 and "has no trained head" in refused.stderr
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))  # measured anew
    said = luthier("evaluate", tmp_path / "out", "--json", cwd=tmp_path)  # the new head starts as it did
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["loss"]["value"] == pytest.approx(after["loss"]["value"], abs=1e-3)
    tuned, ids = open_run(tmp_path / "out"), torch.tensor([[40, 41, 42, 43]])
    with tuned.update.bind(tuned.view), torch.no_grad():
        ours = tuned.view.module.eval()(input_ids=ids).logits
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2, dtype=tuned.view.dtype)
    base.config.pad_token_id = tuned.view.module.config.pad_token_id
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits.float(), ours.float(), atol=1e-4, rtol=1e-3)


def test_hostile_text_stays_text_in_the_report(model_folder, tmp_path):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    held = [{"prompt": bad, "completion": bad}]
    recipe = write(tmp_path, model_folder, train=[*held, *rows(3)], held=held, max_steps=1)
    done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")


def test_no_traceback_without_debug(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    plain, debug = luthier("run", recipe, cwd=tmp_path), luthier("run", recipe, "--debug", cwd=tmp_path)
    assert plain.returncode == debug.returncode == 2
    assert "train.jsonl:2: is a prompt without an answer" in plain.stderr and "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


def test_help_and_listing_load_no_torch(tmp_path):
    commands = [["--help"], ["methods"], ["methods", "lora"], ["methods", "--json"], ["env", "--help"]]
    code = (
        "import sys\nfrom luthier.cli import main\n"
        f"for words in {commands}:\n"
        "    sys.argv = ['luthier', *words]\n"
        "    try: main()\n    except SystemExit as done: assert not done.code, done.code\n"
        "    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.split() == ["False"] * len(commands), done.stderr
    listed = json.loads(luthier("methods", "--json", cwd=tmp_path).stdout)
    assert {"lora", "sft", "scdp", "lemo"} <= {m["name"] for m in listed}
    assert luthier("methods", "lroa", cwd=tmp_path).returncode == 2


def test_schema_accepts_recipes_and_refuses_unknown_keys(tmp_path):
    schema = json.loads(luthier("schema", cwd=tmp_path).stdout)
    assert "tuner" in schema["properties"] and schema["additionalProperties"] is False
    jsonschema.validate({"model": "a/b", "data": {"train": "x"}, "tuner": {"lora": {"rank": 3}}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "a/b", "data": {"train": "x"}, "tuner": {"lora": {"rnk": 3}}}, schema)


def test_check_reports_rows_targets_and_destinations(model_folder, tmp_path):
    recipe = write(tmp_path, model_folder)
    result = json.loads(luthier("check", recipe, "--json", cwd=tmp_path).stdout)
    assert result["train"]["rows"] == 24 and result["train"]["without_stop"] == 0
    assert result["matched"] == {"all-linear": 14} and result["destinations"] == []
    supervised = "".join(t for t, on in result["rows"][0] if on)
    assert supervised == "0 0<|im_end|>"
    remote = luthier("check", recipe, "model=org/name", cwd=tmp_path)
    assert remote.returncode == 2 and "cannot be loaded" in remote.stderr


def test_a_model_without_a_template_is_trained_on_plain_text(tmp_path):
    folder = tmp_path / "plain"
    tiny("llama", vocab_size=260, layers=2).save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    recipe = write(tmp_path, str(folder))
    result = json.loads(luthier("check", recipe, "--json", cwd=tmp_path).stdout)
    assert "".join(t for t, _ in result["rows"][0]) == "say 00 0<|im_end|>"
    refused = luthier("check", recipe, "data.template=chat", cwd=tmp_path)
    assert refused.returncode == 2 and "no chat template" in refused.stderr


def test_check_forecasts_and_the_run_says_how_far_off_it_was(finished):
    folder, done = finished
    run = json.loads((folder / "out/run.json").read_text())
    assert run["forecast"]["trained_weights"] == run["trained_weights"]
    assert abs(run["forecast_miss"]["memory"]) < 0.25
    assert "forecast off by" in done.stderr and "Forecast, and how far off" in (folder / "out/report.html").read_text()
    said = luthier("check", folder / "r.yaml", cwd=folder).stdout
    assert "memory: " in said and " of training" in said and "trained " in said
    assert "memory: " not in luthier("check", folder / "r.yaml", "--no-forecast", cwd=folder).stdout


FOREIGN = '''
from typing import ClassVar
from luthier.objectives.base import Objective, Term
class Half(Objective):
    """Half the loss."""
    share: float = 0.5
    def loss(self, fwd):
        return {"half": Term(fwd.nll().sum(), "tokens", self.share)}
class Other: pass
'''


def test_code_from_a_recipe_runs_only_where_the_command_line_allows_it(model_folder, tmp_path):
    sys.modules.pop("mine", None)  # another test's
    recipe = write(tmp_path, model_folder, objective={"mine:Half": {"share": 0.25}}, max_steps=1, evaluate=[])
    (tmp_path / "mine.py").write_text(FOREIGN)
    refused = luthier("run", recipe, cwd=tmp_path)
    assert refused.returncode == 2 and "add --allow-code if you trust it" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = luthier("run", recipe, "--allow-code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mine:Half" in (tmp_path / "out/recipe.yaml").read_text()
    (tmp_path / "out/evaluations.json").unlink()  # what was measured before is read, and runs nothing
    assert luthier("evaluate", tmp_path / "out", cwd=tmp_path).returncode == 2
    assert luthier("evaluate", tmp_path / "out", "--allow-code", cwd=tmp_path).returncode == 0
    for objective, words in (
        ("mine:Other", "derive from Objective"), ("mine:Nobody", "cannot be imported"), ("no.such:Half", "cannot be imported"),
        ({"mine:Half": {"shar": 1}}, "did you mean share?"),
    ):  # fmt: skip
        words_of = ("check", write(tmp_path, model_folder, objective=objective), "--allow-code", "--no-forecast")
        said = luthier(*words_of, cwd=tmp_path)
        assert said.returncode == 2 and words in said.stderr, said.stderr


def test_a_models_own_code_is_not_run_unasked(model_folder, tmp_path, monkeypatch):
    import shutil

    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "surprise", "auto_map": {"AutoConfig": "configuration_surprise.Surprise"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    code = (
        f"from transformers import LlamaConfig\nopen({str(marker)!r}, 'w').close()\n"
        "class Surprise(LlamaConfig):\n    model_type = 'surprise'\n"
    )
    (folder / "configuration_surprise.py").write_text(code)
    said = luthier("check", write(tmp_path / "a", str(folder)), cwd=tmp_path)
    assert (
        said.returncode == 2 and "needs Python code of its own, which luthier does not run by default" in said.stderr
    ), said.stderr
    recipe = write(tmp_path / "a", str(folder), trust_remote_code=True)  # the key alone must not be enough
    said = luthier("check", recipe, cwd=tmp_path)
    assert said.returncode == 2 and "add --allow-code" in said.stderr and not marker.exists()
    luthier("check", recipe, "--allow-code", cwd=tmp_path)
    assert marker.exists()


BRISK = {"learning_rate": 0.01, "max_steps": 3}
HEADS = {"name": "heads", "tuner": "frozen", "objective": {"caft": {"stage": "heads", "ahead": 2}}, **BRISK}
TUNE = {"tuner": {"lora": {"rank": 4}}, "objective": {"caft": {"ahead": 2, "weight": 0.5}}, **BRISK}
STAGES = {"stages": [HEADS, {"name": "tune", "carry": "heads", **TUNE}]}


def staged(folder, model, **more):
    path = write(folder, model, **{"pipeline": {"stages": STAGES}, **more})
    values = YAML().load(path.read_text())
    for key in ("tuner", "batch_size", "learning_rate"):
        values.pop(key)
    YAML().dump(values, path)
    return path


def test_stages_run_hand_on_and_are_taken_up_after_a_kill(model_folder, tmp_path):
    from safetensors.torch import load_file

    keys = {"train": rows(12), "evaluate": []}
    done = luthier("run", staged(tmp_path / "a", model_folder, **keys), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stage   heads" in done.stderr and "stage   tune" in done.stderr
    for extra in (["--max-time", "0"], []):  # stopped at once, inside the first stage; then to the end
        path = staged(tmp_path / "b", model_folder, **keys)
        again = luthier("run", path, *extra, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "b/out/heads/checkpoint-3/COMPLETE").exists()
    a, b = (load_file(tmp_path / x / "out/adapter_model.safetensors") for x in ("a", "b"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_stages_with_other_tuners_leave_one_update_that_holds_them_all(model_folder, tmp_path):
    tuners = [{"lora": {"rank": 2}}, "hft", "hft"]
    stages = [
        {"name": f"s{i}", "tuner": t, "start": f"s{i - 1}" if i else "base", **BRISK} for i, t in enumerate(tuners)
    ]
    path = staged(tmp_path, model_folder, pipeline={"stages": {"stages": stages}}, evaluate=[])
    done = luthier("run", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header = json.loads((tmp_path / "out/update.json").read_text())
    assert [p["kind"] for p in header["parts"]] == ["lowrank", "dense"] and "largest difference" in done.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["after"]["loss"]["value"] < run["before"]["loss"]["value"]


def test_what_a_pipeline_would_not_read_is_refused(model_folder, tmp_path):
    for change, words in (
        ("learning_rate=0.1", "learning_rate: is not read beside pipeline stages; set it in the stages"),
        ("tuner=full", "tuner: is not read beside pipeline stages"),
        ("data.pool=x.jsonl", "data.pool: is not read by task causal-lm; remove it"),
    ):
        said = luthier("check", staged(tmp_path, model_folder), change, cwd=tmp_path)
        assert said.returncode == 2 and words in said.stderr, said.stderr
    stages = [{"name": "a", "start": "b"}]
    said = luthier("check", write(tmp_path, model_folder, pipeline={"stages": {"stages": stages}}), cwd=tmp_path)
    assert said.returncode == 2 and "start of a names 'b', which is no earlier stage" in said.stderr, said.stderr


def test_keys_that_nothing_reads_are_refused(model_folder, tmp_path):
    for change, words in (
        (["max_steps=2", "epochs=3"], "epochs: is not read beside max_steps"),
        (["~data.eval"], "evaluate: has no rows to evaluate on"),
        (["evaluate=[rouge, rouge]"], "evaluate.1: rouge measures rouge1, as rouge does; keep one"),
        (["evaluate=[pass-at-k: {k: [2]}]"], "evaluate.0.pass-at-k.k: [2] does not lie in 1 to samples = 1"),
        (["evaluate=[forgetting: {general: no.jsonl}]"], "forgetting.general: there is no file no.jsonl"),
        (["task=classification", "evaluate=[rouge]"], "evaluate.0.rouge.task: rouge does not work on classification"),
        (["data.train_split=all"], "data.train_split: is for Hub data sets"),
        (["load_best=false"], "load_best: needs evaluations during training"),
        (["revision=main"], "revision: is for Hub models"),
        (["data.pool=x.jsonl"], "data.pool: is read by pipelines only"),
    ):
        said = luthier("check", write(tmp_path, "nowhere"), *change, cwd=tmp_path)
        assert said.returncode == 2 and words in said.stderr, said.stderr


def test_standing_still_is_said_once_with_the_place(capsys):
    from rich.console import Console

    from luthier.cli.progress import Watch

    watch = Watch(Console(stderr=True, width=200), patience=0.05)
    watch.start()
    watch.at("rendering f.jsonl:7")
    time.sleep(0.2)
    watch.stop()
    assert capsys.readouterr().err.count("the last thing that started: rendering f.jsonl:7") == 1


def test_peak_memory_is_the_runs_own_and_not_that_of_the_process_before(model_folder, tmp_path):
    import torch

    from luthier import recipe
    from luthier.run.execute import run
    from luthier.run.forecast import peak_memory

    large = torch.ones(100_000_000)
    del large
    earlier = peak_memory()
    path = write(tmp_path, model_folder, train=rows(8), held=rows(4, 100), max_steps=2)
    told = run(recipe.load_file(path), tmp_path / "out", tmp_path, forecast=False)
    assert told["peak_memory_bytes"] < earlier - 200_000_000


def test_self_training_from_the_command_line_uses_the_pool(model_folder, tmp_path):
    words = lambda i: f"{'good' if i % 2 else 'poor'} thing {i}"  # noqa: E731
    train = [{"text": words(i), "label": "yes" if i % 2 else "no"} for i in range(12)]
    method = {"list": {"rounds": 1, "unlabelled_steps": 6, "labelled_epochs": 3, "rank": 4, "learning_rate": 0.01}}
    path = write(tmp_path, model_folder, train=train, held=train[:4], task="classification", pipeline=method)
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": words(i)}) + "\n" for i in range(40, 60)))
    values = YAML().load(path.read_text())
    for key in ("tuner", "batch_size", "learning_rate", "evaluate"):
        values.pop(key)
    values["data"]["pool"] = "pool.jsonl"
    YAML().dump(values, path)
    done = luthier("run", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [x for x in done.stderr.splitlines() if x.startswith("stage")] == [
        "stage   teacher", "stage   labels-1", "stage   student-1", "stage   round-1",
    ]  # fmt: skip
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["state"] == "done" and run["after"]["loss"]["value"] < run["before"]["loss"]["value"]
    values["data"].pop("pool")
    YAML().dump(values, path)
    said = luthier("run", path, "output_dir=other", cwd=tmp_path)
    assert said.returncode == 2 and "data.pool: is missing, and the pipeline labels its rows" in said.stderr, (
        said.stderr
    )
