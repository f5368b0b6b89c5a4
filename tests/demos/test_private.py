"""The whole path at a tiny size: made-up organisations, shadows, a translator, audits, results, one report."""

import json

import pytest

from helpers.collaborations import TINY
from luthier.demos.private import NAMES, STYLES, all_rows, answered, demo, written
from luthier.federation.folder import Workspace
from luthier.update.files import load


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("demo"), []
    return folder, demo(folder, TINY, said.append, processes=1), said


def test_a_style_is_written_as_it_says_and_no_public_row_has_a_private_one():
    assert written("set_alarm", ("=> ", str.upper, "-", "<{}>", ";")) == "=> <SET-ALARM>;" and len(set(STYLES)) == 576
    rows = all_rows(TINY)
    public = {r["style"] for r in rows.public}
    for name in NAMES:
        assert len({r["style"] for r in rows.private[name] + rows.held[name]}) == 1
        assert not public & {r["style"] for r in rows.private[name]}
    prompts = [r["prompt"] for r in rows.public] + [r["prompt"] for n in NAMES for r in rows.private[n] + rows.held[n]]
    assert len(set(prompts)) > 0.95 * len(prompts), "no stretch is used twice"
    assert all_rows(TINY) == rows and answered([], []) == []


def test_it_ends_in_one_report_with_everything_asked_for(shown):
    folder, report, _ = shown
    page = report.read_text()
    for words in (
        "its own small model", "with its translated update", "needs them to be shared", "mean shadow (C1)",
        "on all public rows (C2)", "C3 nearest shadow", "C5 shuffled pairs", "What is sent?", "What would lower it?",
        "bytes of numbers",
    ):  # fmt: skip
        assert words in page, words
    found = json.loads((folder / "found.json").read_text())
    assert set(found["losses"]) == set(NAMES) and all(v > 0 for by in found["losses"].values() for v in by.values())
    assert "<script" not in page and "http" not in page.split("</style>")[1]


def test_what_comes_back_opens_as_an_adapter_of_the_large_model(shown):
    folder, _, _ = shown
    workspace = Workspace(folder / "contract")
    update = load(folder / "results" / "clinic")
    assert update.base.same_base(workspace.lab.view("large").base)
    with update.bind(workspace.lab.view("large")):
        pass


def test_what_is_finished_is_not_made_again(shown):
    folder, _, _ = shown
    before = {f.name: f.stat().st_mtime_ns for f in (folder / "contract/shadows").iterdir()}
    said = []
    demo(folder, TINY, said.append, processes=1)
    assert "all 12 shadow sets are made" in said and not any(s.startswith("pretrain") for s in said)
    assert before == {f.name: f.stat().st_mtime_ns for f in (folder / "contract/shadows").iterdir()}
