"""Knowledge infusion: the sheet's check 4, and what stands beside each score."""

import pytest

from helpers.commands import luthier, write
from luthier.data.builtin.people import KINDS, rows
from luthier.evaluation import Knowledge
from luthier.support.errors import LuthierError

TEST = rows(0)[1]


@pytest.fixture
def scored(exam_of):
    def make(answer, method=None):
        said = {r["prompt"]: answer(r) for r in TEST}
        exam = exam_of(TEST, said)
        exam.answers = lambda questions, n, stop=(): [_said(said[q.prompt]) for q in questions]
        return {m.name: m.value for m in (method or Knowledge()).evaluate(exam)}

    return make


def _said(text):
    from luthier.step.lab import Completion

    return Completion(text, True, 1)


def test_4_an_oracle_is_right_everywhere(scored):
    values = scored(lambda r: r["completion"])
    assert all(values[f"{k}_{s}"] == 1 for k in KINDS for s in ("exact", "contains"))
    assert set(values) == set(Knowledge().names())


def test_4_always_yes_reaches_the_class_share_and_other_names_nothing(scored):
    values = scored(lambda r: "Yes")
    assert values["secondary_exact"] == values["comparison_exact"] == 0.5 == values["secondary_commonest"]
    assert values["memorize_exact"] == 0 and scored(lambda r: "Zaxo Quil")["memorize_contains"] == 0


def test_a_sentence_contains_the_answer_and_is_not_it(scored):
    values = scored(lambda r: f"I think it is {r['completion']}.")
    assert values["rephrase_exact"] == 0 and values["rephrase_contains"] == 1


def test_kinds_are_chosen_and_a_row_without_one_is_named(scored, exam_of):
    values = scored(lambda r: r["completion"], Knowledge(kinds=("rephrase",)))
    assert set(values) == {"rephrase_exact", "rephrase_contains", "rephrase_commonest"}
    with pytest.raises(LuthierError, match=r"f\.jsonl:1: has no kind"):
        Knowledge().evaluate(exam_of([{"prompt": "a", "completion": "b"}], {"a": "b"}))


def test_a_run_on_the_invented_people(model_folder, tmp_path):
    path = write(tmp_path, model_folder, data={"train": "builtin:people", "eval": "builtin:people"}, max_steps=2,
                 evaluate=[{"knowledge": {"rows": 8, "max_new_tokens": 2}}])  # fmt: skip
    done = luthier("run", path, cwd=tmp_path)
    assert done.returncode == 0 and "rows    150 of" in done.stderr, done.stderr
