"""What the documents show is run."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from luthier.cli.listing import flowing
from luthier.cli.main import app
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def test_the_readmes_recipe_is_one_and_its_commands_exist():
    from luthier import recipe

    (text,) = blocks("README.md", "yaml")
    assert recipe.load(text).tuner.rank == 16
    named = set(re.findall(r"^    luthier (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert named and named <= get_command(app).commands.keys()


def test_the_readmes_loop_runs(model_folder):
    (code,) = blocks("README.md", "python")
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    scope = {"folder": model_folder, "batches": [batch] * 6}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["tuned"].update().parts[0].kind == "sparse"


def test_the_contributing_table_has_every_kind_with_its_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^\| [a-z]+ \| `([a-z]+)`[^|]*\| `([a-z/]+)` \|", text, re.M)
    assert sorted(found) == sorted(
        (k.key, k.package.removeprefix("luthier.").replace(".", "/")) for k in KINDS.values()
    )


def test_the_contributing_example_is_a_method(tmp_path, monkeypatch):
    (code,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "focal.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import focal

    from luthier.objectives.sft import Sft
    from luthier.step.settings import TrainSettings
    from luthier.testing.models import rows_of, view_of
    from luthier.training.loop import Loop
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
    from luthier.cli import docs

    stored = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs/methods").glob("*.md")}
    assert stored == docs.pages(), "run make docs"


EVALUATORS = manifest.classes("evaluate")
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: 0
doc_to_choice: [Paris, Rome]
metric_list: [{metric: acc}]
"""


def files_beside(folder):
    """What pages name: a corpus, a task for lm-eval."""
    passages = [{"doc_id": f"p{i}", "text": f"Person {i} mends violins in Porto, number {i}."} for i in range(6)]
    (folder / "passages.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    (folder / "questions.jsonl").write_text('{"q": "The capital of France is"}\n')
    (folder / "tasks").mkdir()
    (folder / "tasks/capitals.yaml").write_text(TASK)


def trained_runs(folder):
    """Two updates of the tiny model in folders, as runs leave them."""
    from luthier.testing.models import view_of
    from luthier.tuners import Lora
    from luthier.update.files import save_update

    out = []
    for seed in range(2):
        trainable = Lora(rank=2, seed=seed).attach(view_of())
        save_update(trainable.update(), folder / f"run-{seed}")
        out.append(folder / f"run-{seed}")
    return out


PAGES = sorted(p.name for p in (ROOT / "docs/methods").glob("*.md") if p.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_recipe_and_the_lines_on_a_methods_page_work(page, tmp_path, capsys, monkeypatch):
    from transformers import Trainer, TrainingArguments

    from helpers.examples import soft_rows
    from helpers.exams import only_own_tasks
    from luthier import recipe
    from luthier.testing.contract import PADDED, Four
    from luthier.testing.models import byte_tokenizer, rows_of, tiny, tiny_classifier, word_tokenizer

    name = page.removesuffix(".md").removeprefix("evaluate-")
    files_beside(tmp_path)
    monkeypatch.chdir(tmp_path)
    if name == "lm-eval":
        only_own_tasks(monkeypatch)
    for text in blocks(f"docs/methods/{page}", "yaml"):
        assert recipe.load(text)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    model = tiny()
    batch = soft_rows()[1] if page == "distill.md" else PADDED
    runs = trained_runs(tmp_path)
    scope = {
        "runs": runs, "run": runs[0],
        "torch": torch, "Trainer": Trainer, "arguments": arguments, "rows": Four(), "model": model, "batches": [batch] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "tokenizer": byte_tokenizer(),
    }  # fmt: skip
    if EVALUATORS.get(name) or page in ("q-tuning-offline.md", "greedy.md", "sample.md"):  # they ask it in words
        scope["model"] = tiny_classifier() if page == "evaluate-classification.md" else tiny(vocab_size=260)
    if name == "masked-accuracy":
        words = word_tokenizer()
        scope |= {"model": tiny("bert", vocab_size=len(words)), "tokenizer": words}
    if name == "tagging":
        words, tags = word_tokenizer("Ada slept"), {"B-PER": 0, "O": 1}
        named = {"label2id": tags, "id2label": {i: n for n, i in tags.items()}}
        scope |= {"model": tiny("bert-tagger", vocab_size=len(words), num_labels=2, **named), "tokenizer": words}
    if name in manifest.classes("collaborate"):
        scope |= {"rows": rows_of(), "large_model": tiny(layers=4, seed=1)}
    if name in manifest.classes("translate"):
        kinds = torch.zeros(2, 6, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
        scope |= {"small": torch.randn(24, 2, 6), "large": torch.randn(24, 3, 8), "clients": torch.randn(2, 2, 6)}
        scope |= {"small_kinds": kinds[0], "large_kinds": kinds[1]}
    for code in blocks(f"docs/methods/{page}", "python"):
        exec(compile(code, page, "exec"), scope)
    if name in EVALUATORS:
        said = ast.literal_eval(capsys.readouterr().out)
        assert said and set(said) <= set(scope["evaluator"].names())
    if "tuned" in scope and "Tuning" in scope:
        assert scope["tuned"].update().parts
    if "table" in scope:
        shown = ast.literal_eval(capsys.readouterr().out)
        assert shown == [row.values for row in scope["table"].rows] and shown


GUIDES = [
    "docs/quickstart.md",
    "docs/concepts.md",
    "docs/terms.md",
    *sorted(f"docs/howto/{p.name}" for p in (ROOT / "docs/howto").glob("*.md")),
]


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guides_recipes_load_its_commands_exist_and_its_links_lead_somewhere(guide, tmp_path):
    from luthier import recipe

    (tmp_path / "mine.py").write_text(blocks("CONTRIBUTING.md", "python")[0])
    for text in blocks(guide, "yaml"):
        sys.modules.pop("mine", None)
        assert recipe.load(text, code=tmp_path)
    text = (ROOT / guide).read_text()
    commands = get_command(app).commands
    for line in re.findall(r"^    (?:torchrun .* -m )?luthier (.+)$", text, re.M):
        name, *words = line.split()
        command = commands[name]
        if hasattr(command, "commands"):  # a group: collaborate tune
            command = command.commands[words.pop(0)]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= options, line
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or ((ROOT / guide).parent / link).exists(), link


def test_the_terms_name_places_that_exist_and_none_twice():
    text = (ROOT / "docs/terms.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| term")]
    places = [place for row in rows for place in re.findall(r"`([^`]+)`", row[2])]
    assert len(places) >= len(rows) > 40 and [p for p in places if not (ROOT / "src/luthier" / p).exists()] == []
    terms = [term for row in rows for term in row[0].removeprefix("| ").split(", ")]
    assert len(set(terms)) == len(terms)


def test_the_guides_python_runs(model_folder, tmp_path, monkeypatch):
    from luthier import recipe
    from luthier.run.execute import run
    from luthier.tuned.open import open_run

    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = json.dumps({"model": str(model_folder), "data": {"train": "x.jsonl"}, "max_steps": 2, "learning_rate": 0.01})
    run(recipe.load(text), tmp_path / "out", tmp_path)
    tuned, ids = open_run(tmp_path / "out"), torch.tensor([[5, 6, 7]])
    scope = {"run": tmp_path / "out", "view": open_run(tmp_path / "out").view, "ids": ids}
    scope |= {"base": model_folder, "given": tmp_path / "out"}
    scope |= {"other": shutil.copytree(tmp_path / "out", tmp_path / "other")}
    monkeypatch.chdir(tmp_path)
    ran = 0
    for guide in GUIDES:
        for code in blocks(guide, "python"):
            exec(compile(code, guide, "exec"), scope)
            ran += 1
    assert ran >= 2 and 0 < scope["error"] < 1 and scope["logits"].shape[:2] == (1, 3)
    with tuned.update.bind(tuned.view):
        torch.testing.assert_close(scope["model"](ids).logits, tuned.view.module(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_api_page_is_what_the_docstrings_say():
    from luthier.cli import docs

    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == docs.api(), "run make docs"


def test_every_extra_is_installed_for_development():
    """So that `make test`, which installs all of it under the tested pins, shows that every extra goes with every other."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours = next(w for w in extras["dev"] if w.startswith("luthier["))
    assert set(ours.removeprefix("luthier[").removesuffix("]").split(",")) == set(extras) - {"dev"}


def test_a_terminal_gets_paragraphs_and_named_lines_apart():
    text = "One line.\n\nA paragraph that\ngoes on\nand on.\nCost: much of\nit.\nRefuses: all.\n  - kept\n  - apart"
    expected = "One line.\n\nA paragraph that goes on and on.\nCost: much of it.\nRefuses: all.\n  - kept\n  - apart"
    assert flowing(text) == expected
