"""lm-eval's tasks, asked through our scoring: the same numbers as its own model gives, our template, rows kept."""

import json

import pytest

from helpers.commands import luthier, write
from helpers.exams import only_own_tasks
from luthier import recipe
from luthier.data.batch import collate
from luthier.evaluation import LmEval
from luthier.evaluation.base import Exam
from luthier.evaluation.lm_eval import _asked
from luthier.inference.scoring import Scoring, continuations
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.causal_lm import CausalLm
from luthier.testing.models import rows_of

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

QUESTIONS = [{"q": f"what is {a} and {b}", "choices": [str(a + b), str(a * b + 9)], "gold": 0} for a, b in
             ((1, 2), (3, 4), (2, 2), (5, 1), (4, 4), (2, 7))]  # fmt: skip
CHOICE = """
task: our_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWER = """
task: our_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: {draws}}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with tasks over six questions; they are the only tasks that lm-eval has."""
    only_own_tasks(monkeypatch)
    file, folder = tmp_path / "q.jsonl", tmp_path / "tasks"
    folder.mkdir()
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.format(file=file))
    (folder / "answer.yaml").write_text(ANSWER.format(file=file, draws="false"))
    (folder / "drawn.yaml").write_text(ANSWER.format(file=file, draws="true").replace("our_answer", "our_draw"))
    (folder / "both.yaml").write_text("group: our_both\ntask: [our_choice, our_answer]\n")
    return str(folder)


@pytest.fixture
def exam(exam_of):
    return exam_of([])


def theirs(exam):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=exam.view.module, tokenizer=exam.renderer.tokenizer, batch_size=2, max_length=512)


def requests(kind, *pairs):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


def test_scores_are_those_of_lm_evals_own_model(exam):
    pairs = [("what is it", " a cat"), ("say", " dog!"), ("a longer question, is it", "n't"), ("x y", " z z z z")]
    ours = _asked(exam).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    other = theirs(exam).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in other], abs=1e-3)
    assert [g for _, g in ours] == [g for _, g in other]


def test_rolling_scores_are_theirs_also_beyond_the_models_length(exam):
    texts = [("one short text",), ("a text of many words " * 60,)]
    ours = _asked(exam).loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    other = theirs(exam).loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert ours == pytest.approx(other, rel=1e-4) and len(texts[1][0]) > 512


def test_tasks_are_asked_and_every_row_is_kept(exam, tasks):
    method = LmEval(tasks=("our_choice", "our_answer"), folder=tasks)
    found = {m.name: m for m in method.evaluate(exam)}
    assert set(found) == {"our_choice_acc", "our_choice_acc_norm", "our_answer_exact_match"} <= set(method.names())
    direct = lm_eval.simple_evaluate(
        theirs(exam), tasks=["our_choice"], task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
        apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    assert found["our_choice_acc"].value == direct["results"]["our_choice"]["acc,none"]
    assert len(found["our_choice_acc"].keys) == 6 and found["our_choice_acc"].higher


def test_a_group_is_measured_over_the_rows_of_its_tasks(exam, tasks):
    (acc,) = LmEval(tasks=("our_both",), folder=tasks, metrics=("acc",), limit=2).evaluate(exam)
    assert acc.name == "our_both_acc" and len(acc.keys) == 2
    assert all(k.startswith("our_choice:") for k in acc.keys)


def test_the_prompt_is_the_one_that_training_sees(exam):
    asked = _asked(exam)
    for system in (None, "Be brief."):
        exam.renderer.system = system
        text = asked.apply_chat_template([{"role": "user", "content": "what is 1 and 2"}])
        assert asked.tok_encode(text) == exam.renderer.prompt_ids({"prompt": "what is 1 and 2", "completion": "3"})
    exam.renderer.system = None


def test_the_callers_random_state_is_left_alone(exam, tasks):
    import random

    import numpy as np
    import torch

    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    LmEval(tasks=("our_choice",), folder=tasks, limit=1).evaluate(exam)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_what_cannot_be_asked_is_named(exam, tasks):
    with pytest.raises(RecipeError, match=r"evaluate\.lm-eval\.tasks: lm-eval has no task no_such_task"):
        LmEval(tasks=("our_choice", "no_such_task"), folder=tasks).evaluate(exam)
    with pytest.raises(LuthierError, match="needs drawn answers"):
        LmEval(tasks=("our_draw",), folder=tasks).evaluate(exam)


def test_tasks_of_a_folder_need_allow_code_and_the_hub_is_listed(tmp_path):
    text = f"model: a/b\ndata: {{train: x.jsonl}}\nevaluate:\n- lm-eval: {{tasks: [hellaswag], folder: {tmp_path}}}\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:3: evaluate\.0: would run Python of its tasks; add --allow-code"):
        recipe.load(text, "r.yaml")
    assert recipe.load(text, "r.yaml", code=tmp_path).evaluate[0].tasks == ("hellaswag",)
    assert LmEval(tasks=("hellaswag",)).destinations() == ["the Hub, to download data of hellaswag"]


def test_check_looks_up_the_names_of_tasks(model_folder, tmp_path, monkeypatch):
    """lm-eval's own names are read once, then from the cache."""
    from lm_eval import tasks as theirs

    asked = []

    class Manager:
        def __init__(self, **how):
            asked.append(how)
            self.all_tasks = ["hellaswag", "arc_easy"]

    monkeypatch.setattr(theirs, "TaskManager", Manager)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    told = {}
    for name in ("helaswag", "hellaswag", "a-b-c-d"):
        path = write(tmp_path, model_folder, evaluate=[{"lm-eval": {"tasks": ["arc_easy", name]}}])
        told[name] = luthier("check", path, "--no-forecast", cwd=tmp_path)
    assert told["helaswag"].returncode == 2
    says = "evaluate.0.lm-eval.tasks: lm-eval has no task helaswag; did you mean hellaswag?"
    assert told["helaswag"].stderr.strip() == f"luthier: {says}"
    assert told["a-b-c-d"].stderr.endswith("lm-eval has no task a-b-c-d; see lm-eval ls tasks\n")
    assert told["hellaswag"].returncode == 0 and asked == [{}]


def test_continuations_are_sums_over_each_rows_tokens(exam_of, tiny_view):
    rows = [{**r, "ids": [i % 90 for i in r["ids"]]} for r in rows_of((9, 5, 12), answer=3)]
    rows = [{**r, "labels": [-100] * (len(r["ids"]) - 3) + r["ids"][-3:]} for r in rows]
    exam = Exam(tiny_view, exam_of([]).lab, CausalLm(), rows)
    found = continuations(tiny_view, [(r["ids"][:-3], r["ids"][-3:]) for r in rows], 16)
    choices = Scoring().choices(tiny_view, rows)
    for (total, greedy), score, (_, right, _) in zip(found, exam.scored, choices, strict=True):
        assert total == pytest.approx(score.total, abs=1e-4) and greedy == bool(right.all())


def test_choices_of_one_question_share_a_forward_and_change_nothing(tiny_view, monkeypatch):
    from luthier.inference import scoring as scorer

    pairs = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6], [7, 8]), ([5, 6, 7], [8, 4]), ([5, 6, 7], [8, 3]), ([1], [8])]
    alone = [continuations(tiny_view, [p], 64)[0] for p in pairs]
    sizes = []
    monkeypatch.setattr(scorer, "collate", lambda rows: sizes.append(len(rows)) or collate(rows))
    together = continuations(tiny_view, pairs, 64)
    assert sum(sizes) == 4, "the two single tokens share one, the two that differ in the second share another"
    assert [t for t, _ in together] == pytest.approx([t for t, _ in alone], abs=1e-5)
    assert [g for _, g in together] == [g for _, g in alone]
