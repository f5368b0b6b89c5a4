"""A curator that rewrites and splits, and one with a codec: through `luthier curate`, `luthier run`, evaluation and use."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.commands import luthier, rows, write
from helpers.curators import BACKWARDS, LINES, made
from luthier import recipe
from luthier.data.codec import Chain
from luthier.evaluation.base import Exam
from luthier.step.lab import Completion
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer


@pytest.fixture(autouse=True)
def no_module_is_left():
    yield
    for name in ("lines_of_mine", "coded"):
        sys.modules.pop(name, None)


def put(folder, model, **keys):
    train = [*rows(10), {"prompt": "count", "completion": "one\ntwo\nthree"}, {"prompt": "CAPS", "completion": "AB"}]
    path = write(folder, model, train=train, data={"train": "train.jsonl"}, max_steps=1, **{"evaluate": [], **keys})
    (folder / "lines_of_mine.py").write_text(LINES)
    (folder / "coded.py").write_text(BACKWARDS)
    return path, train


def test_a_curator_that_rewrites_and_splits_is_under_thirty_lines_and_works_everywhere(model_folder, tmp_path):
    assert len(LINES.strip().splitlines()) < 30
    path, train = put(tmp_path, model_folder, curate=["lines_of_mine:Lines", {"random": {"keep_fraction": 0.5}}])
    done = luthier("curate", path, "--allow-code", "--output-dir", "set", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, folder = json.loads(done.stdout), tmp_path / "set"
    assert [(s["of"], s["rows"]) for s in result["steps"]] == [(12, 14), (14, 7)]
    assert result["steps"][0]["reasons"] == {"one row a line": 3}
    table = pq.read_table(folder / "table.parquet").to_pylist()
    came, made = table[:12], table[12:]
    assert [json.loads(t["values"]) for t in came] == train and all(t["parent"] is None for t in came)
    assert [t["decision"] for t in came].count("rewrite") == 1 and came[10]["decision"] == "rewrite"
    assert made[0]["decision"] == "split" and made[0]["parent"] == 10 and made[0]["reason"] == "one row a line"
    assert [(m["key"].rpartition(":")[2], m["parent"]) for m in made[1:]] == [("11/1", 12), ("11/2", 12), ("11/3", 12)]
    assert [json.loads(m["values"])["completion"] for m in made[1:]] == ["ONE", "TWO", "THREE"]
    kept = [json.loads(x) for x in (folder / "kept.jsonl").read_text().splitlines()]
    in_set = [json.loads(t["values"]) for t in table if t["decision"] == "keep"]
    assert sorted(map(str, kept)) == sorted(map(str, in_set)) and len(kept) == 7
    assert sum(t["decision"] == "drop" for t in table) == 7 and all(
        t["reason"] for t in table if t["decision"] != "keep"
    )
    decided = [json.loads(x) for x in (folder / "decisions.jsonl").read_text().splitlines()]
    assert len(decided) == (1 + 1 + 3) + 14 and {d["decision"] for d in decided} == {"keep", "drop", "rewrite", "split"}
    ours = [(d["key"].rpartition(":")[2], d["decision"], d["reason"]) for d in decided if d["step"] == "lines-of-mine"]
    assert ours == [
        ("11", "rewrite", "in capitals"), ("11", "split", "one row a line"),
        *((f"11/{i}", "keep", "one row a line") for i in (1, 2, 3)),
    ]  # fmt: skip
    last = {(d["key"], d["decision"]): (d["step"], d["reason"], d["score"]) for d in decided}
    assert all(last[t["key"], t["decision"]] == (t["step"], t["reason"], t["score"]) for t in table)
    page = (folder / "report.html").read_text()
    assert "12 rows before, 7 after" in page and "rewritten" in page and "left out" in page
    changed = page[page.index("before and after a change") : page.index("Some of the decisions")]
    assert "<pre>one\ntwo\nthree</pre>" in changed and "<pre>ONE</pre><pre>TWO</pre><pre>THREE</pre>" in changed
    assert changed.count("<th scope") == 2 and "prompt" not in changed, "only fields that changed"
    ran = luthier("run", path, "--allow-code", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "curate  lines-of-mine: 12 rows before, 14 after" in ran.stderr and "3 one row a line" in ran.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["census"]["rows"] == 7 and [(k["of"], k["rows"]) for k in run["curated"]] == [(12, 14), (14, 7)]


BAD = '''
from luthier.curation.base import Curator, Table
from luthier.data.store import Row


class Loses(Curator):
    """Cost: none."""

    def curate(self, table, lab):
        return Table.of(list(table.rows)[:3])


class Empties(Curator):
    """Cost: none."""

    def curate(self, table, lab):
        return table.drop(range(len(table)), "all of them")


class Shapeless(Curator):
    """Cost: none."""

    def curate(self, table, lab):
        return table.add([{"question": "x"}])
'''


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Loses", "curate.0.bad: returns a table that does not come from its argument"),
        ("Empties", "curate.0.bad: leaves none of 12 rows"),
        ("Shapeless", "bad:1: has the fields question, expected messages or prompt and completion or text"),
    ],
)
def test_a_curator_that_does_not_keep_its_word_is_refused(model_folder, tmp_path, name, words):
    path, _ = put(tmp_path, model_folder, curate=[f"bad:{name}"])
    (tmp_path / "bad.py").write_text(BAD)
    done = luthier("curate", path, "--allow-code", cwd=tmp_path)
    sys.modules.pop("bad", None)
    assert done.returncode == 2 and words in done.stderr, done.stderr


HEAVY = '''
import numpy as np
from luthier.curation.base import Curator


class Heavy(Curator):
    """The first row counts three times, the second not at all. Cost: none."""

    def curate(self, table, lab):
        return table.weigh(np.array([3.0, 0.0, *[1.0] * (len(table) - 2)]))
'''


def test_weights_of_a_curator_reach_the_loss_and_the_files(model_folder, tmp_path):
    losses = {}
    for name, train in (("weighed", rows(6)), ("by hand", [*[rows(6)[0]] * 3, *rows(6)[2:]])):
        folder = tmp_path / name
        keys = {"max_steps": 1, "batch_size": 8, "shuffle": False, "evaluate": [], "data": {"train": "train.jsonl"}}
        path = write(folder, model_folder, train=train, curate=["heavy:Heavy"] if name == "weighed" else [], **keys)
        (folder / "heavy.py").write_text(HEAVY)
        done = luthier("run", path, "--allow-code", cwd=folder)
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads((folder / "out/log.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["weighed"] == pytest.approx(losses["by hand"], rel=1e-5)
    done = luthier(
        "curate", tmp_path / "weighed/r.yaml", "--allow-code", "--output-dir", "set", cwd=tmp_path / "weighed"
    )
    assert done.returncode == 0, done.stderr
    kept = [json.loads(x) for x in (tmp_path / "weighed/set/kept.jsonl").read_text().splitlines()]
    assert [k["weight"] for k in kept] == [3, 0, 1, 1, 1, 1]
    weight = pq.read_table(tmp_path / "weighed/set/table.parquet").column("weight").to_pylist()
    assert weight == [3, 0, 1, 1, 1, 1]
    sys.modules.pop("heavy", None)


# --- codecs ---


def chained(folder):
    (folder / "coded.py").write_text(BACKWARDS)
    text = json.dumps({"model": "a/b", "data": {"train": "x"}, "curate": ["coded:Backwards", "coded:Twice"]})
    return recipe.load(text, code=folder).codec


def test_codecs_are_undone_in_reverse_order(tmp_path):
    chain = chained(tmp_path)
    row = {"prompt": "p", "completion": "abc"}
    coded = chain.encode(row)
    assert coded == {"prompt": "?!p", "completion": "ccbbaa"} and row == {"prompt": "p", "completion": "abc"}
    assert chain.decode(row, coded["completion"]) == "abc" and chain.encode({"prompt": "q"}) == {"prompt": "?!q"}
    assert Chain().encode(row) == row and Chain().decode(row, "x") == "x" and Chain().name == "" != chain.name


class Scripted:
    """A generator that says what it was asked, reversed and doubled."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, view, prompts, max_new_tokens):
        self.asked = [self.tokenizer.decode(p) for p in prompts]
        return [Completion("ccbbaa", True, 6) for _ in prompts]


def test_an_exam_asks_in_the_models_form_and_judges_in_the_rows(tmp_path):
    from luthier.data.rendering import Renderer
    from luthier.data.store import Row
    from luthier.evaluation.exact_match import ExactMatch
    from luthier.inference.services import lab_with
    from luthier.tasks.causal_lm import CausalLm

    tokenizer = byte_tokenizer()
    lab = lab_with(Renderer(tokenizer), {})
    lab.answering = said = Scripted(tokenizer)
    sources = [Row("f:1", {"prompt": "p", "completion": "abc"}), Row("f:2", {"prompt": "q", "completion": "ccbbaa"})]
    exam = Exam(None, lab, CausalLm(), (), sources, chained(tmp_path))
    (measure,) = [m for m in ExactMatch(rows=2).evaluate(exam) if m.name == "exact_match"]
    assert measure.stats[:, 0].tolist() == [1, 0] and ["?!p" in said.asked[0], "?!q" in said.asked[1]] == [True, True]
    assert [c.text for _, c in exam.asked.values()] == ["abc", "abc"]


def test_a_coded_run_is_scored_and_used_in_the_rows_own_form(model_folder, tmp_path):
    held = [{"prompt": "say 1", "completion": "1 2"}]
    keys = {"evaluate": [{"exact-match": {"rows": 1, "max_new_tokens": 8}}], "max_steps": 80, "learning_rate": 0.02}
    train = [{"prompt": "say 1", "completion": "1 2"}] * 4
    path = write(tmp_path, model_folder, train=train, held=held, curate=["coded:Backwards"], tuner="full", **keys)
    (tmp_path / "coded.py").write_text(BACKWARDS)
    done = luthier("run", path, "--allow-code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["after"]["exact_match"]["value"] == 1.0 and run["after"]["loss"]["value"] < 0.05
    tokens = "".join(t["text"] for t in json.loads((tmp_path / "out/tokens.json").read_text())[0])
    assert "!say 1" in tokens and "2 1" in tokens, "it was trained on the coded form"
    from luthier.tuned.open import answers, scores

    said = answers(tmp_path / "out", ["say 1"], 8, allow_code=True)
    assert said[0]["answer"] == "1 2" and said[0]["prompt"] == "say 1"
    assert scores(tmp_path / "out", None, Path(), allow_code=True)["exact_match"]["value"] == 1.0


def test_a_recipe_that_names_code_is_refused_without_leave():
    with pytest.raises(RecipeError, match="names code"):
        recipe.load(json.dumps({"model": "a/b", "data": {"train": "x"}, "curate": ["coded:Backwards"]}))


def test_positions_of_rows_that_stay_count_what_they_came_from(tmp_path):
    given = [{"prompt": "a", "completion": "x\ny"}, {"prompt": "b", "completion": "Z"}]
    curator = made(LINES, "lines_of_mine")["Lines"]()
    assert curator.choose(given) == [0, 1]
    table = curator.curated(given)
    assert [r.values["completion"] for r in table.rows] == ["X", "Y", "Z"] and np.isnan(table.score).all()


MARKED = '''
from luthier.curation.base import Curator


class Told(Curator):
    """Gives a value for each row. Cost: none."""

    def curate(self, table, lab):
        return table.rewrite([CHANGE(dict(r.values)) for r in table.rows])


class Halves(Curator):
    """Splits the second row into its words. Cost: none."""

    def curate(self, table, lab):
        words = [None, *([{**r.values, "completion": w} for w in r.values["completion"].split()] for r in table.rows[1:])]
        return table.split(words)


class More(Curator):
    """Adds a row that is made from the second. Cost: none."""

    def curate(self, table, lab):
        return table.add([{**table.rows[1].values, "completion": "to come"}], parents=[1])
'''
UNMARKED = {"prompt": "p", "completion": "no mark", "marks": []}


def marked_curator(folder, model, change="None", name="Told"):
    train = [UNMARKED, {"prompt": "q", "completion": "go now", "marks": [[3, 6, "when"]]}]
    path = write(folder, model, train=train, curate=[f"marked:{name}"], data={"train": "train.jsonl", "spans": "marks"},
                 evaluate=[])  # fmt: skip
    (folder / "marked.py").write_text(MARKED.replace("CHANGE", f"(lambda v: {change})"))
    done = luthier("curate", path, "--allow-code", cwd=folder)
    sys.modules.pop("marked", None)
    return done


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("v | {'completion': 'GO NOW'}", "Told"),
        ("v | {'completion': ' ' + v['completion']}", "Told"),
        ("v | {'completion': 'go'}", "Told"),
        ("None", "Halves"),
        ("None", "More"),
    ],
)
def test_an_answer_that_changes_under_its_marks_is_refused(model_folder, tmp_path, change, name):
    done = marked_curator(tmp_path, model_folder, change, name)
    said = f"curate.0.marked: changes the answer of {tmp_path / 'train.jsonl'}:2 and leaves its marks as they are"
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert "let the step give marks new places in the new answer, or leave out data.spans" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "v | {'completion': v['completion'] + ' then'}",
        "v | {'prompt': 'another'}",
        "v | {'completion': '  ' + v['completion'], 'marks': [[a + 2, b + 2, k] for a, b, k in v['marks']]}",
        "v | {'completion': 'go', 'marks': []}",
    ],
)
def test_an_answer_may_change_behind_its_marks_or_with_them(model_folder, tmp_path, change):
    done = marked_curator(tmp_path, model_folder, change)
    assert done.returncode == 0, done.stderr
