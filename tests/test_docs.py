"""What the documents show is run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def test_the_readmes_recipe_is_one_and_its_commands_exist():
    from luthier import recipe

    (text,) = blocks("README.md", "yaml")
    assert recipe.load(text).tuner.rank == 16
    done = subprocess.run([sys.executable, "-m", "luthier", "--help"], capture_output=True, text=True, check=True)
    for command in set(re.findall(r"^    luthier (\w+)", (ROOT / "README.md").read_text(), re.M)):
        assert f" {command} " in done.stdout


def test_the_readmes_loop_runs(model_folder):
    (code,) = blocks("README.md", "python")
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    scope = {"folder": model_folder, "batches": [batch] * 6}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["tuned"].update().parts[0].kind == "sparse"


def test_the_contributing_example_is_a_method(tmp_path, monkeypatch):
    (code,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "focal.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import focal

    from conftest import rows_of, view_of
    from luthier.objectives.sft import Sft
    from luthier.training.loop import Loop
    from luthier.training.settings import TrainSettings
    from luthier.tuners.lora import Lora

    assert focal.Focal.key() == "focal"
    losses = []
    for objective in (focal.Focal(gamma=0.0), Sft(), focal.Focal()):
        view = view_of()
        loop = Loop(view, rows_of(), Lora().attach(view), objective, TrainSettings(max_steps=2, batch_size=4))
        losses.append([loop.step()["loss"] for _ in range(2)])
    assert losses[0] == losses[1] and losses[2][0] < losses[1][0]


def test_architecture_stays_short():
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("name", ["loop_decision.json"])
def test_benchmark_results_carry_machine_and_commit(name):
    result = json.loads((ROOT / "benchmarks/results" / name).read_text())
    assert result["machine"] and result["commit"]


def test_pages_are_generated_from_the_classes():
    from luthier import docs

    stored = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs/methods").glob("*.md")}
    assert stored == docs.pages(), "run make docs"


PAGES = sorted(p.name for p in (ROOT / "docs/methods").glob("*.md") if p.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_recipe_and_the_lines_on_a_methods_page_work(page, tmp_path):
    from transformers import Trainer, TrainingArguments

    from conftest import tiny
    from contract.test_contract import PADDED, Four, soft_batch
    from luthier import recipe

    for text in blocks(f"docs/methods/{page}", "yaml"):
        assert recipe.load(text)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    model = tiny()
    batch = soft_batch() if page == "distill.md" else PADDED
    scope = {
        "torch": torch, "Trainer": Trainer, "arguments": arguments, "rows": Four(), "model": model, "batches": [batch] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    for code in blocks(f"docs/methods/{page}", "python"):
        exec(compile(code, page, "exec"), scope)
    if "tuned" in scope and "Tuning" in scope:
        assert scope["tuned"].update().parts
    if "kept" in scope:
        assert len(scope["kept"]) == 1
