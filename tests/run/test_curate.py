"""`luthier curate`: rows chosen, a reason for each, nothing trained."""

import json

from helpers.commands import luthier, rows, write


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
    assert "10 of 40 rows stayed" in page and 'class="stayed"' in page and "left out" in page
    trained = luthier("run", path, cwd=tmp_path)
    census = json.loads((tmp_path / "out/run.json").read_text())["census"]
    assert trained.returncode == 0 and census["rows"] == 10, "a run keeps the same rows"


def test_the_table_in_the_terminal_and_refusals(model_folder, tmp_path):
    path = write(tmp_path, model_folder, train=rows(20), evaluate=[])
    refused = luthier("curate", path, cwd=tmp_path)
    assert refused.returncode == 2 and "curate: has no steps" in refused.stderr
    said = luthier("curate", path, "curate=[random: {keep_fraction: 0.5}]", cwd=tmp_path)
    assert "random: 10 of 20 rows stayed" in said.stdout and "10 drawn" in said.stdout
    again = luthier("curate", path, "curate=[random: {keep_fraction: 0.5}]", cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr
