"""What `luthier check` refuses, which is what `luthier run` refuses: both ask the same function."""

import json

import pytest

from helpers.commands import luthier, rows, write
from luthier.cli.check import destinations
from luthier.recipe import load
from luthier.run import execute

HEADS = {"name": "heads", "tuner": "frozen", "objective": {"caft": {"stage": "heads", "ahead": 2}}, "max_steps": 1}
TUNE = {"name": "tune", "objective": {"caft": {"ahead": 2}}, "max_steps": 1}


def staged(*stages):
    return {"pipeline": {"stages": {"stages": list(stages)}}, "tuner": "lora"}


REFUSED = [
    ({"tuner": "frozen"}, "tuner.frozen: nothing trains: sft adds no trained modules to the frozen model"),
    ({"tuner": "frozen", "objective": {"caft": {"stage": "heads"}}}, "tuner.frozen: changes nothing of this model"),
    ({"objective": "caft"}, "objective.caft.stage: tune, with heads that no stage before has trained"),
    ({"objective": "distill", "task": "classification"}, "objective.distill: the rows have no soft labels"),
    (staged(HEADS), "stages.0.tuner: the last stage changes nothing of the model"),
    (staged({**HEADS, "objective": "sft"}, {"name": "b"}), "stages.0.tuner: nothing trains: sft adds no trained modules"),
    (staged(HEADS, TUNE), "stages.1.objective.stage: tune, with heads that no stage before has trained"),
    (staged(HEADS, {**TUNE, "carry": "heads", "tuner": "dept"}), "stages.1.objective: its heads read the text's own positions"),
    (staged({"name": "a"}, {**TUNE, "carry": "a"}), "stages.1.carry: 'a' trains no modules beside the model"),
    (staged({"name": "a", "epochs": 2, "max_steps": 2}), "stages.0.epochs: is not read beside max_steps"),
    ({"tuner": {"layerwise": {"freeze_blocks": 2}}}, "tuner.layerwise.freeze_blocks: 2 of 2 blocks; at most 1"),
    ({"tuner": {"peft": {"type": "OFT", "options": {"r": 3, "oft_block_size": 3}}}}, "tuner.peft.options: "),
    ({"tuner": {"peft": {"type": "LORA", "options": {"r": 0}}}}, "tuner.peft.options: "),
    ({"report_to": "wandbb"}, "report_to: there is no tracker 'wandbb'; did you mean wandb?"),
    ({"lr_scheduler_type": "constant", "warmup_fraction": 0.5}, "warmup_fraction: is not read by lr_scheduler_type constant"),
    (
        {"tuner": "fedkseed", "lr_scheduler_type": "constant", "warmup_fraction": 0, "max_grad_norm": 0.5},
        "tuner.fedkseed.max_grad_norm: is not read by fedkseed, whose steps take no gradient; remove it",
    ),
    ({"data": {"train": "train.jsonl", "system": "Be brief."}, "task": "classification"}, "data.system: is not read by rows"),
    ({"data": {"train": "texts.jsonl", "system": "Be brief."}}, "data.system: is not read by rows of plain text"),
    ({"output_dir": "taken"}, "taken holds the run of another recipe"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "says"), REFUSED, ids=[says[:50] for _, says in REFUSED])
def test_check_and_run_refuse_the_same_in_the_same_words(keys, says, model_folder, tmp_path, monkeypatch):
    classes = [{"text": f"row {i}", "label": ["a", "b"][i % 2]} for i in range(8)]
    train = classes if keys.get("task") else rows(8)
    (tmp_path / "taken").mkdir()
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "taken/run.json").write_text('{"recipe_hash": "another"}')
    (tmp_path / "taken/log.jsonl").write_text('{"step": 1}\n')
    path = write(tmp_path, model_folder, train=train, held=train[:2], evaluate=[], **keys)
    if "pipeline" in keys:
        path.write_text(path.read_text().replace("tuner: lora\n", "").replace("learning_rate: 0.01\n", "", 1))
        path.write_text(path.read_text().replace("\nbatch_size: 4\n", "\n", 1))
    monkeypatch.setattr(execute, "_before", lambda *_: pytest.fail("work began"))
    refused = {luthier(command, path, cwd=tmp_path).stderr.strip().splitlines()[-1] for command in ("check", "run")}
    assert len(refused) == 1
    (said,) = refused
    assert says in said and said.startswith("luthier: ") and "bug in luthier" not in said


def test_a_measure_whose_package_is_missing_is_refused(model_folder, tmp_path, monkeypatch):
    from luthier.method import base

    monkeypatch.setattr(base, "find_spec", lambda name: None)
    path = write(tmp_path, model_folder, evaluate=["rouge"])
    done = luthier("check", path, cwd=tmp_path)
    assert (
        "evaluate.0.rouge: rouge needs the package rouge_score, which is not installed; pip install 'luthier[eval]'"
        in (done.stderr)
    )


def test_files_that_evaluators_name_lie_beside_the_recipe(model_folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = write(
        tmp_path / "mine", model_folder, evaluate=[{"forgetting": {"general": "texts.jsonl", "canaries": False}}]
    )
    refused = luthier("check", path, "--no-forecast", cwd=other)
    assert "evaluate.0.forgetting.general: there is no file texts.jsonl" in refused.stderr
    (tmp_path / "mine/texts.jsonl").write_text('{"text": "some general text"}\n')
    done = luthier("check", path, "--no-forecast", "--json", cwd=other)
    assert done.returncode == 0, done.stderr
    named = json.loads(done.stdout)["recipe"]["evaluate"][0]["forgetting"]["general"]
    assert named == str(tmp_path / "mine/texts.jsonl")


def test_what_would_be_downloaded_is_said_and_what_lies_here_is_not(tmp_path):
    for name in ("mine/adapter", "mine/rows"):
        (tmp_path / name).mkdir(parents=True)
    values = {"model": "org/model", "start": "org/adapter@v2", "data": {"train": "org/rows:conf", "eval": "mine/rows"}}
    said = destinations(load(json.dumps(values)), tmp_path)
    wanted = [("model", "org/model"), ("start", "org/adapter@v2"), ("data.train", "org/rows:conf")]
    assert said == [f"{key}: the Hub, to download {name}" for key, name in wanted]
    here = destinations(load(json.dumps({**values, "start": "mine/adapter"})), tmp_path)
    assert not any(line.startswith("start") for line in here)


def test_classes_are_listed_as_the_rows_write_them(model_folder, tmp_path):
    """datasets#4467: texts that look like missing values or numbers stay texts."""
    labels = ["None", "NA", "001", "nan"]
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"null {i},{labels[i % 4]}\n" for i in range(8)))
    keys = {"task": "classification", "data": {"train": "c.csv"}, "evaluate": []}
    recipe = write(tmp_path, model_folder, **keys)
    done = luthier("check", recipe, cwd=tmp_path)
    assert done.returncode == 0 and "classes: 001, NA, None, nan\n" in done.stdout, done.stderr
    assert json.loads(luthier("check", recipe, "--json", cwd=tmp_path).stdout)["classes"] == sorted(labels)
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"t{i},c{i:02}\n" for i in range(23)))
    assert "c18, c19 and 3 more\n" in luthier("check", recipe, cwd=tmp_path).stdout
