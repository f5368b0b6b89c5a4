"""A share of the rows that is set apart, and held-out rows that are trained on as well."""

import json

import numpy as np
import pytest

from helpers.commands import luthier, write
from luthier.data.held_out import set_apart, shared
from luthier.data.prepare import prepare
from luthier.data.reading import told_in
from luthier.data.rendering import Renderer
from luthier.data.store import Row, Rows
from luthier.recipe import load
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer


def made(count, start=0, **more):
    values = [
        {"prompt": f"say {i}", "completion": f"{i}", **{k: f(i) for k, f in more.items()}} for i in range(start, count)
    ]
    return Rows.of(Row(f"f:{i}", v) for i, v in enumerate(values, start=1))


def prompts(rows):
    return {r.values["prompt"] for r in rows}


def test_case_27_a_share_is_set_apart_by_what_the_rows_hold():
    rows = made(200)
    train, held = set_apart(rows, 0.1)
    assert len(held) == 20 and len(train) == 180 and not prompts(train) & prompts(held)
    assert [r.key for r in held] == sorted((r.key for r in held), key=lambda k: int(k[2:])), "in the order of the rows"
    other = rows.take(np.random.default_rng(0).permutation(200))
    assert prompts(set_apart(other, 0.1)[1]) == prompts(held), "their order does not matter"
    more = prompts(set_apart(made(220), 0.1)[1]) & prompts(rows)
    assert len(more - prompts(held)) <= 2, "a few more rows change little"
    assert len(set_apart(made(3), 0.01)[1]) == 1 and len(set_apart(made(3), 0.99)[0]) == 1


def test_equal_rows_and_groups_stay_together():
    rows = Rows.joined([made(50), made(50)])
    train, held = set_apart(rows, 0.2)
    assert len(held) == 20 and not prompts(train) & prompts(held)
    grouped = made(60, about=lambda i: {"document": i % 6})
    train, held = set_apart(grouped, 0.3, "about.document")
    kinds = [{r.values["about"]["document"] for r in part} for part in (train, held)]
    assert len(held) == 20 and not kinds[0] & kinds[1]
    with pytest.raises(
        RecipeError, match=r"f:1: has no field 'book', which data\.eval_by names; it has about, completion"
    ):
        set_apart(grouped, 0.3, "book")
    with pytest.raises(RecipeError, match=r"data\.eval: 0\.3 of rows that are all of one group \(completion\)"):
        set_apart(made(9, completion=lambda i: "x"), 0.3, "completion")


def test_case_26_held_out_rows_that_are_trained_on_are_counted():
    train = made(10)
    same = [Row("g:1", {"prompt": "say 90", "completion": "90"}), Row("g:2", {"prompt": "Say  3", "completion": "3 "})]
    found = shared(train, Rows.of(same))
    assert (found.rows, found.of, found.alike, found.first) == (1, 2, 1, ("g:2", "f:4"))
    assert str(found).endswith("is a training row too, apart from case and white space; the first one: g:2 is f:4")
    assert shared(train, made(20, start=10)) is None and shared(train, train).rows == 10
    assert str(shared(train, train)) == "10 of 10 held-out rows are training rows too; the first one: f:1 is f:1"
    both = Rows.joined([made(3), Rows.of(same)])
    assert "4 of 5 held-out rows are training rows too (1 of them apart from case and white space)" in str(
        shared(train, both)
    )
    copies = Rows.joined(
        [Rows.of([Row("h:1", {"prompt": "SAY 3", "completion": "3"})]), train]
    )  # one to the letter wins
    assert shared(copies, made(4, start=3))[:3] == (1, 1, 0)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"prompt": "p", "completion": ""}, "its answer is empty"),
        ({"prompt": "p", "completion": " \n"}, "its answer is empty"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            "answer 1 of the conversation is empty; weight: 0 in its turn leaves it out",
        ),
    ],
)
def test_case_28_an_empty_answer_is_not_trained_on(values, why):
    good = Row("f:1", {"prompt": "p", "completion": "c"} if "prompt" in values else {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})  # fmt: skip
    rows, renderer = Rows.of([good, Row("f:2", values)]), Renderer(byte_tokenizer())
    with pytest.raises(RecipeError, match=rf"f:2: has no supervised token \({why}\); .*on_unsupervised: drop"):
        prepare(rows, renderer, max_length=99)
    done = prepare(rows, renderer, max_length=99, on_unsupervised="drop")
    assert (done.census.rows, done.census.empty_answers, done.census.dropped) == (1, 1, 1)
    asked = prepare(rows, renderer, max_length=99, held=True)
    assert (asked.census.rows, asked.census.empty_answers) == (2, 1)


def test_a_call_or_weight_0_is_no_empty_answer():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    nothing = {"role": "assistant", "content": "", "weight": 0}
    told = {"role": "assistant", "content": "b"}
    said = told_in({"messages": [{"role": "user", "content": "a"}, call, nothing, told]})
    assert [t.strip() for t in said] == ["f", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{train: x.jsonl, eval: 1.5}", "data.eval: 1.5: input should be less than 1"),
        ("{train: x.jsonl, eval: 0}", "data.eval: 0: input should be greater than 0"),
        ("{train: x.jsonl, eval: y.jsonl, eval_by: a}", "data.eval_by: is read with a share in data.eval only"),
    ],
)
def test_a_share_lies_between_0_and_1(data, message):
    with pytest.raises(RecipeError) as error:
        load(f"{{model: m, data: {data}}}")
    assert message in str(error.value)


def test_check_says_forms_and_overlap_and_splits(model_folder, tmp_path):
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(20)]
    path = write(tmp_path, model_folder, train=rows, held=rows[:3], evaluate=[])
    done = luthier("check", path, "--no-forecast", cwd=tmp_path)
    assert "train: Alpaca (read as prompt and completion)" in done.stdout, done.stderr
    assert "3 of 3 held-out rows are training rows too; the first one:" in done.stdout
    said = json.loads(luthier("check", path, "data.eval=0.2", "--json", "--no-forecast", cwd=tmp_path).stdout)
    assert (said["train"]["rows"], said["eval"]["rows"], said["overlap"]) == (16, 4, "") and len(said["rows"]) == 3
