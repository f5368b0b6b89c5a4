"""`luthier inspect`: its numbers from the files alone, its page, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import luthier
from helpers.finished import finished, lora_deltas
from luthier.inspection import Norms
from luthier.support.errors import LuthierError
from luthier.tuned import members
from luthier.tuned import open as opening
from luthier.tuned.inspect import inspect
from luthier.update import Prompt, Update
from luthier.update.files import load, save_update


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [
        finished(folder / "low", model_folder),
        finished(folder / "whole", model_folder, tuner="full", learning_rate=0.001),
    ]
    return [shutil.copytree(f, folder / name) for f, name in zip(made, ("narrow", "<b>wide"), strict=True)]


def norms(deltas, base):
    """Block -> (norm of the change, that over the norm of the weights it changes)."""
    out = {}
    for block in sorted({int(found.group(1)) for n in deltas if (found := re.search(r"layers\.(\d+)\.", n))}):
        names = [n for n in deltas if f"layers.{block}." in n]
        changes, weights = (torch.cat([t[n].double().flatten() for n in names]).norm().item() for t in (deltas, base))
        out[f"block {block}"] = (changes, changes / weights)
    return out


def test_the_numbers_are_those_of_the_files(runs, model_folder):
    low, whole = runs
    base, tuned = load_file(f"{model_folder}/model.safetensors"), load_file(whole / "model.safetensors")
    finding = inspect([low, whole])
    found = {name: {} for name in ("narrow", "<b>wide")}
    for name, layer, *numbers in finding.rows:
        found[name][layer] = tuple(numbers)
    assert found["narrow"].keys() == {"block 0", "block 1"}
    for name, deltas in (("narrow", lora_deltas(low)), ("<b>wide", {n: tuned[n] - t for n, t in base.items()})):
        for block, expected in norms(deltas, base).items():
            assert found[name][block] == pytest.approx(expected, rel=1e-4), (name, block)


def test_the_command_prints_the_answer_and_writes_its_picture(runs, tmp_path):
    done = luthier("inspect", *runs, "--html", "pages/p.html", "--set", "most=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    finding = inspect(runs, Norms(most=1))
    plain = " ".join(done.stdout.split())
    assert finding.says in plain and "How sure: exact: the norms are computed, not estimated." in plain
    for row in finding.rows:
        assert f"{row[2]:.4g} {row[3]:.4g}" in plain
    assert done.stdout.splitlines()[-1] == "pages/p.html"
    page = (tmp_path / "pages/p.html").read_text()
    assert finding.picture in page and page.count("<rect") == len(finding.rows)
    assert "&lt;b&gt;wide" in page and "<b>" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"""(src|href)=|https?://(?!www\.w3\.org/2000/svg)""", page)


def test_json_is_for_machines(runs, tmp_path):
    done = luthier("inspect", runs[0], "--json", cwd=tmp_path)
    said, finding = json.loads(done.stdout), inspect(runs[:1])
    assert said == {
        "says": finding.says, "columns": list(finding.columns), "rows": [list(r) for r in finding.rows],
        "sure": finding.sure, "html": None,
    }  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_number_that_json_does_not_have_is_null(monkeypatch, tmp_path):
    from luthier.inspection.base import Finding
    from luthier.tuned import inspect as module

    infinite = Finding("All of it is new.", ("layer", "relative"), [("block 0", float("inf")), ("block 1", 2)])
    monkeypatch.setattr(module, "inspect", lambda *given: infinite)
    done = luthier("inspect", "x", "--json", cwd=tmp_path)
    assert json.loads(done.stdout, parse_constant=pytest.fail)["rows"] == [["block 0", None], ["block 1", 2]]


MINE = """
from luthier.inspection.base import Finding, Inspector

class Count(Inspector):
    \"\"\"Count.\"\"\"
    unit: str
    \"\"\"What is counted.\"\"\"

    def inspect(self, case, lab=None):
        assert lab.view() is case.base
        ids = lab.renderer.prompt_ids({"prompt": "say 7"})
        return Finding(f"{len(case.updates)} {self.unit}, {len(ids)} tokens.", ("update",), [(n,) for n in case.updates])
"""


def test_an_inspector_of_somebody_elses_gets_the_lab_and_needs_leave(runs, tmp_path):
    (tmp_path / "counting.py").write_text(MINE)
    words = ("inspect", runs[0], "--method", "counting:Count")
    done = luthier(*words, "--set", "unit=runs", cwd=tmp_path)
    assert done.returncode == 2 and "add --allow-code if you trust it" in done.stderr
    done = luthier(*words, "--allow-code", cwd=tmp_path)
    assert done.returncode == 2 and "command line: inspect.counting:Count.unit: is missing" in done.stderr
    done = luthier(*words, "--allow-code", "--set", "unit=runs", "--html", "p.html", cwd=tmp_path)
    assert re.match(r"1 runs, \d+ tokens\.\n", done.stdout) and "How sure" not in done.stdout, done.stderr
    page = (tmp_path / "p.html").read_text()
    assert "<svg" not in page and "<td>narrow</td>" in page and "How sure" not in page


def test_a_base_in_four_bits_is_looked_at_whole_and_merged_as_it_was_run(runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs[0], tmp_path / "packed")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"(?m)^quantize:.*$", "quantize: nf4", text))
    expected, asked = [row[1:] for row in inspect([runs[0]]).rows], []

    def noted(*args, quantize=None, **more):
        asked.append(quantize)
        return whole(*args, **more)

    whole = opening.load_model
    monkeypatch.setattr(opening, "load_model", noted)
    assert [row[1:] for row in inspect([folder]).rows] == expected
    members.members_of([folder]).lab().view()
    assert asked == [None, "nf4"]


def test_what_cannot_be_looked_into_is_refused(runs, tmp_path, model_folder):
    with pytest.raises(LuthierError, match="inspect: there is nothing to look into"):
        inspect([])
    with pytest.raises(LuthierError, match="is neither a finished run nor an adapter"):
        inspect([tmp_path])
    done = luthier("inspect", runs[0], "--html", ".", cwd=tmp_path)
    assert done.returncode == 2 and "--html .: is a folder; name a file in it" in done.stderr
    prompt = tmp_path / "prompt"
    save_update(Update(load(runs[0]).base, (Prompt(torch.zeros(2, 32)),)), prompt)
    with pytest.raises(LuthierError, match=r"inspect.norms: prompt holds parts .* \(prompt\)"):
        inspect([runs[0], prompt])
    moved = shutil.copytree(runs[0], tmp_path / "moved")
    header = json.loads((moved / "update.json").read_text())
    header["base"]["weights"] = "f" * 64
    (moved / "update.json").write_text(json.dumps(header))
    with pytest.raises(LuthierError, match="this update was trained on .*ffffffffffff.*; load that base instead"):
        inspect([moved])
