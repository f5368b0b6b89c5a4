"""`luthier curate`: rows chosen, a reason for each, nothing trained."""

import json

import numpy as np

from helpers.commands import luthier, rows, write
from luthier.data.store import Row
from luthier.data.table import Table
from luthier.report.page import CELL, CHANGED, changes_in
from luthier.run.curate import in_family_order
from luthier.run.rows import told


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_every_row_gets_a_reason_and_those_that_stay_are_a_file(model_folder, tmp_path):
    steps = [{"random": {"keep_fraction": 0.5}}, {"q-tuning-offline": {"keep_fraction": 0.5}}]
    path = write(tmp_path, model_folder, train=rows(40), curate=steps, evaluate=[])
    done = luthier("curate", path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, folder = json.loads(done.stdout), tmp_path / "runs/curate-r"
    assert (result["rows"], result["of"]) == (10, 40) and [s["rows"] for s in result["steps"]] == [20, 10]
    decided, kept = lines(folder / "decisions.jsonl"), lines(folder / "kept.jsonl")
    assert len(decided) == 60 and len(kept) == 10 and all(r in rows(40) for r in kept)
    stayed = [d["key"] for d in decided if d["step"] == "q-tuning-offline" and d["decision"] == "keep"]
    numbers = [int(k.rpartition(":")[2]) for k in stayed]
    assert kept == [rows(40)[n - 1] for n in numbers] and all(d["reason"] for d in decided)
    page = (folder / "report.html").read_text()
    assert "40 rows before, 10 after" in page and 'class="stayed"' in page and "left out" in page
    trained = luthier("run", path, cwd=tmp_path)
    census = json.loads((tmp_path / "out/run.json").read_text())["census"]
    assert trained.returncode == 0 and census["rows"] == 10, "a run keeps the same rows"


def test_the_table_in_the_terminal_and_refusals(model_folder, tmp_path):
    path = write(tmp_path, model_folder, train=rows(20), evaluate=[])
    refused = luthier("curate", path, cwd=tmp_path)
    assert refused.returncode == 2 and "curate: has no steps" in refused.stderr
    said = luthier("curate", path, "curate=[random: {keep_fraction: 0.5}]", cwd=tmp_path)
    assert "random: 20 rows before, 10 after" in said.stdout and "10 drawn" in said.stdout
    again = luthier("curate", path, "curate=[random: {keep_fraction: 0.5}]", cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr


def table_of(n):
    return Table.of([Row(f"f:{i}", {"prompt": "p", "completion": f"c{i}"}) for i in range(n)])


def test_made_rows_come_after_the_row_that_they_were_made_from():
    before = table_of(3).at("step")
    table = before.rewrite([None, {"prompt": "p", "completion": "x y"}, {"prompt": "p", "completion": "z"}])
    table = table.split([None, [{"prompt": "p", "completion": w} for w in "xy"], None])
    table = table.add([{"prompt": "p", "completion": "new"}]).add(
        [{"prompt": "p", "completion": "like 0"}], parents=[0]
    )
    order = list(in_family_order(table, before.live, len(before.entries)))
    assert [table.entries.key(i) for i in order] == [
        "f:0", "f:0+1", "f:1", "f:1", "f:1/1", "f:1/2", "f:2", "f:2", "step:1",
    ]  # fmt: skip
    assert sorted(order) == list(range(len(table.entries)))
    later = table.at("later").drop([0], "gone")
    seen = list(in_family_order(later, table.live, len(table.entries)))
    assert seen == table.live.tolist(), "rows that earlier steps made are seen like the others"


def test_the_page_has_five_changed_rows_before_and_after_with_the_fields_that_changed():
    table = table_of(8).at("mine")
    new = [None, *({"prompt": "p", "completion": f"C{i}", "note": [i]} for i in range(1, 7)), None]
    found = changes_in(table.rewrite(new))
    assert [c["key"] for c in found[::2]] == ["f:1", "f:2", "f:3", "f:4", "f:5"] and len(found) == 2 * CHANGED
    assert found[0] == {"key": "f:1", "step": "mine", "field": "completion", "before": "c1", "after": ["C1"]}
    assert found[1] == {"key": "f:1", "step": "mine", "field": "note", "before": "", "after": ["[\n 1\n]"]}
    long = table_of(1).at("mine").rewrite([{"prompt": "p", "completion": "x" * (CELL + 1)}])
    assert changes_in(long)[0]["after"] == ["x" * CELL + " ..."] and changes_in(table_of(3)) == []
    assert changes_in(table.keep(np.array([1]))) == []


def test_the_lines_about_a_step():
    assert told("mine", 1200, 34000, {"short": 1000, "long": 2}) == [
        "mine: 34,000 rows before, 1,200 after", "  2 long", "  1,000 short",
    ]  # fmt: skip
