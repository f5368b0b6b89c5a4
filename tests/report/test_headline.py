"""What a run's report says in words: how much changed and how sure that is, what became worse, how it was trained."""

import json
import re
import shutil

import pytest

from helpers.finished import finished
from luthier.report.curve import Point, Range, Series, interval_chart, line_chart, plane_chart, point_chart
from luthier.report.page import headline, verdict_on, write_report


def measure(value, base, low, high, higher=False, unit="nats a token", rows=24):
    change = {"value": value - base, "low": low, "high": high}
    return {"value": value, "rows": rows, "higher": higher, "unit": unit, "low": value - 0.1, "high": value + 0.1, "base": base,
            "change": change}  # fmt: skip


COMPARED = {
    "loss": measure(3.0, 3.5, -0.6, -0.4),
    "general_loss": measure(3.74, 3.52, 0.1, 0.3),
    "exact_match": measure(0.5, 0.25, 0.01, 0.4, higher=True, unit="share of answers"),
    "canaries": measure(0.5, 0.75, -0.4, -0.1, higher=True, unit="share of questions"),
    "stopped": measure(1.0, 0.21, 0.5, 0.9, higher=True, unit="share of answers that ended by themselves"),
}


def test_the_headline_says_how_much_how_sure_and_what_became_worse():
    assert [(line["text"], line["tone"]) for line in headline({"compared": COMPARED})] == [
        ("Loss fell from 3.5 to 3: better (95% interval of the change -0.6 to -0.4, over 24 rows).", "good"),
        ("General loss rose from 3.52 to 3.74: worse (95% interval of the change +0.1 to +0.3, over 24 rows).", "bad"),
        ("Canaries fell from 0.75 to 0.5: worse (95% interval of the change -0.4 to -0.1, over 24 rows).", "bad"),
    ]
    assert headline({}) == [] and headline({"compared": {"loss": {**COMPARED["loss"], "change": None}}}) == []


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [(-2, -1, False, "better"), (-2, -1, True, "worse"), (1, 2, False, "worse"), (1, 2, True, "better"),
     (-1, 2, True, "no clear change"), (0, 2, True, "no clear change"), (-2, 0, False, "no clear change")],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval(low, high, higher, verdict):
    assert verdict_on({"change": {"low": low, "high": high}, "higher": higher}) == verdict


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("told"), model_folder, tuner="full")


def test_a_report_has_method_date_time_changes_and_warnings(folder, tmp_path):
    run = json.loads((folder / "run.json").read_text())
    text = (folder / "report.html").read_text()
    assert "with tuner full, objective sft, finished on " + run["finished"] in text
    assert 0 < run["train_seconds"] < run["seconds"] < 600 and f"Finished</th><td>{run['finished']}, after " in text
    loss = run["compared"]["loss"]
    assert loss["base"] == run["before"]["loss"]["value"] and loss["change"]["low"] < loss["change"]["value"]
    assert f"Loss fell from {loss['base']:.4g} to {loss['value']:.4g}" in text
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {n: {**m, "value": m["base"]} for n, m in COMPARED.items()}
    (copy / "run.json").write_text(json.dumps({**run, "before": before, "after": COMPARED, "compared": COMPARED}))
    text = write_report(copy).read_text()
    rows = dict(re.findall(r'<tr><th scope="row">([a-z ]+)(?: <.*?)?</th>(.*?)</tr>', text))
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row) for name, row in rows.items()}
    assert cells["loss"][:4] == ["3.5", "3 (2.9 to 3.1)", "-0.5 (-0.6 to -0.4)", "better"]
    assert cells["exact match"][:3] == ["25.0%", "50.0% (40% to 60%)", "+25 points (+1 to +40)"]
    assert cells["stopped"][:4] == ["21.0%", "100.0% (90% to 110%)", "+79 points (+50 to +90)", ""]
    assert 'class="verdict bad" data-label="verdict">worse' in rows["general loss"]
    assert "a rise means that something was forgotten" in text


def test_the_loss_chart_has_the_held_out_loss_of_both_ends(folder):
    run = json.loads((folder / "run.json").read_text())
    text = (folder / "report.html").read_text()
    for step, when in ((0, "before"), (run["steps"], "after")):
        assert f"<title>held-out loss, step {step}: {run[when]['loss']['value']:.4g}</title>" in text


def test_a_chart_names_its_axis_and_tells_values():
    chart = str(line_chart([Series("a", [(i, i / 7) for i in range(1, 601)])], "step", "nats", "t"))
    assert ">step</text>" in chart and ">nats</text>" in chart and "<title>a, step 1: 0.1429</title>" in chart
    assert chart.count("<title>") == chart.count("<circle") == 60
    few = [Series("a", [(0.0, 1.0), (9.0, 2.0)]), Series("b", [(0.0, 2.0)])]
    chart = str(line_chart(few, "step", "nats", "t"))
    assert chart.count('r="3"') == 3 and chart.count('class="name1"') == 2, "a dot, and its name in the legend"
    chart = str(interval_chart([Range("lora", 0.5, 0.25, 0.75, 0)], "difference", "t"))
    assert ">difference</text>" in chart and "<title>lora: 0.5 (0.25 to 0.75)</title>" in chart
    chart = str(point_chart([Point("lora", 3.0, 0.5, True, 0)], "seconds", "loss", "t"))
    assert (
        "<title>lora: loss 0.5, seconds 3</title>" in chart and ">seconds</text>" in chart and ">loss</text>" in chart
    )
    chart = str(plane_chart([(1.0, 2.0, True), (2.0, 1.0, False)], "perplexity", "entropy", "t"))
    assert "<title>stayed: perplexity 1, entropy 2</title>" in chart and "<title>left out: " in chart
