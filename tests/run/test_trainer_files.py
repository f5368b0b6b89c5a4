"""A run's folder has Trainer's files in Trainer's form, and generation settings; its log has the evaluations."""

import json
import math

import pytest
from transformers import GenerationConfig, Trainer, TrainerState, TrainingArguments

from helpers.commands import luthier, rows, write
from luthier.testing.contract import Four
from luthier.testing.models import tiny

FILES = ("trainer_state", "train_results", "eval_results", "all_results")


@pytest.fixture(scope="module")
def read(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    path = write(folder, model_folder, train=rows(12), max_steps=5, eval_steps=2, logging_steps=2, evaluate=[])
    done = luthier("run", path, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("held-out loss") == 3
    return folder / "out", {n: json.loads((folder / f"out/{n}.json").read_text()) for n in (*FILES, "run")}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The files of a Trainer that trained two steps and evaluated."""
    folder = tmp_path_factory.mktemp("theirs")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = Trainer(tiny(), arguments, train_dataset=Four(), eval_dataset=Four())
    trainer.save_metrics("train", trainer.train().metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    return {n: json.loads((folder / f"{n}.json").read_text()) for n in FILES}


def test_every_key_of_trainers_is_there(read, theirs):
    ours = read[1]
    assert ours["trainer_state"].keys() == theirs["trainer_state"].keys()
    steps_per_second = {"eval_steps_per_second"}  # an evaluation here has no steps
    for name in FILES[1:]:
        assert theirs[name].keys() - steps_per_second <= ours[name].keys(), name
    for key in ("loss", "eval_loss", "train_loss"):
        (mine, *_), (other, *_) = (
            [e for e in log["trainer_state"]["log_history"] if key in e] for log in (ours, theirs)
        )
        wanted = other.keys() - steps_per_second
        assert (wanted if key != "eval_loss" else {"step", "epoch", "eval_loss"}) <= mine.keys()


def test_the_numbers_are_the_runs(read):
    folder, found = read
    state, run = TrainerState.load_from_json(str(folder / "trainer_state.json")), found["run"]
    assert (state.global_step, state.max_steps, state.train_batch_size) == (5, 5, 4)
    assert (state.epoch, state.num_train_epochs) == (pytest.approx(5 / 3), 2)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (2, 2, 500), "the last one is Trainer's default"
    *history, scored, trained = state.log_history
    assert [e["step"] for e in history if "loss" in e] == [2, 4, 5]
    held = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    assert list(held) == [2, 4, 5] and state.best_metric == min(held.values()) == held[state.best_global_step]
    assert scored["eval_loss"] == found["eval_results"]["eval_loss"] == run["after"]["loss"]["value"]
    assert held[state.best_global_step] == pytest.approx(scored["eval_loss"], rel=1e-4)
    assert found["eval_results"]["eval_samples"] == 6 and found["train_results"]["train_samples"] == 12
    losses = [e["loss"] for e in history if "loss" in e]
    assert trained["train_loss"] == pytest.approx(sum(losses) / 3) and trained["train_runtime"] == run["train_seconds"]
    assert trained["total_flos"] == state.total_flos == pytest.approx(run["spent"]["flops"]["train"])
    assert trained["train_samples_per_second"] == pytest.approx(4 * trained["train_steps_per_second"])
    assert found["all_results"] == {**found["train_results"], **found["eval_results"]}
    assert all(math.isfinite(v) for v in found["all_results"].values())


def test_the_log_and_the_chart_have_the_evaluations(read):
    folder, found = read
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == found["trainer_state"]["log_history"][:-2]
    page = (folder / "report.html").read_text()
    for step, loss in [(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e]:
        assert f"<title>held-out loss, step {step}: {loss:.4g}</title>" in page


def test_generation_settings_lie_beside_an_adapter(read, model_folder):
    folder, _ = read
    assert (folder / "adapter_config.json").exists()
    assert (
        GenerationConfig.from_pretrained(folder).to_diff_dict()
        == GenerationConfig.from_pretrained(model_folder).to_diff_dict()
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
