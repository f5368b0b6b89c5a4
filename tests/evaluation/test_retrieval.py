"""The release gate of retrieval: the sheet's exact checks; numbers in names are the sheet's."""

import json

import numpy as np
import pytest

from luthier.data.store import Row
from luthier.evaluation import Retrieval
from luthier.evaluation import contexts as corpus_module
from luthier.evaluation.base import Results
from luthier.evaluation.contexts import Context, Corpus, chunked, documents_of, ranked
from luthier.evaluation.measures import Measure
from luthier.evaluation.retrieval import (
    completeness,
    failure,
    gate,
    groundedness,
    needed,
    not_shown,
    summed,
)
from luthier.method import Facts
from luthier.step.lab import Completion
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.statistics import Estimate

PEOPLE = ["Anna", "Bert", "Cleo", "Dirk", "Elsa", "Finn", "Gina", "Hans"]
FACTS = {p: f"{p} keeps {i + 3} brown goats near the old mill. {p} sings on market days." for i, p in enumerate(PEOPLE)}
ROWS = [
    {"prompt": f"How many goats does {p} keep?", "completion": f"{p} keeps {i + 3} goats.", "gold": [p]}
    for i, p in enumerate(PEOPLE)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"doc_id": d, "text": t}) + "\n" for d, t in FACTS.items()))
    return str(path)


@pytest.fixture
def method(corpus):
    return Retrieval(corpus=corpus, top_k=3, chunk_words=8, overlap_words=2, context_words=40)


@pytest.fixture
def asked(exam_of):
    """What an answering function scores, by measure; and every prompt it saw."""

    def make(method, answer, rows=ROWS):
        exam, seen = exam_of(rows), []

        def generated(prompts, max_new_tokens):
            texts = [exam.renderer.tokenizer.decode(p) for p in prompts]
            seen.extend(texts)
            replies = [answer(row, text) for row, text in zip(rows, texts, strict=True)]
            return [Completion(a, True, len(a)) for a in replies]

        exam.generated = generated
        return {m.name: m.value for m in method.evaluate(exam)}, seen

    return make


def gold_only(row, text):
    return row["completion"]


def results_of(*measures):
    return Results({m.name: m for m in measures}, [])


def test_1_the_same_model_twice_passes_with_an_interval_of_zero():
    name = [f"retrieved_{n}" for n in ("accuracy", "completeness")]
    keys = [f"d{i}" for i in range(60)]
    values = np.random.default_rng(0).random(60)
    same = results_of(*(summed(n, values, keys) for n in name))
    gates = Retrieval(corpus="x").gates(same, [same, same])
    assert [g.outcome for g in gates] == ["pass", "pass"]
    assert all((g.change.value, g.change.low, g.change.high) == (0, 0, 0) for g in gates)


def test_2_contexts_are_the_same_for_every_model_and_ranked_once(method, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(corpus_module, "ranked", lambda c, q: calls.append(1) or ranked(c, q))
    good, first = asked(method, gold_only)
    bad, second = asked(method, lambda row, text: "No idea at all")
    assert first == second and len(calls) == 2, "one ranking an examination"
    assert [good[f"failure_{n}"] for n in (1, 2, 3)] == [bad[f"failure_{n}"] for n in (1, 2, 3)]
    assert bad["failure_4"] == 1 - sum(bad[f"failure_{n}"] for n in (1, 2, 3)) > 0.5


def test_3_an_oracle_scores_one_and_an_empty_reply_nothing(method, asked):
    values, _ = asked(method, gold_only)
    assert values["oracle_accuracy"] == values["oracle_completeness"] == values["closed_accuracy"] == 1
    assert values["retrieved_grounded"] == 1 and values["oracle_refusal"] == 0 and values["adversarial_refusal"] == 0
    empty, _ = asked(method, lambda row, text: "")
    assert empty["oracle_accuracy"] == empty["oracle_completeness"] == empty["retrieved_grounded"] == 0
    refusing, _ = asked(method, lambda row, text: "Not in the text.")
    assert refusing["adversarial_refusal"] == refusing["oracle_refusal"] == 1
    assert set(values) == set(method.names())


def test_3_copying_the_context_is_complete_and_grounded_but_inaccurate(method, asked):
    copying, _ = asked(method, lambda row, text: text.split("user\n")[1].split("<|im_end|>")[0])
    assert copying["oracle_completeness"] == 1 and copying["retrieved_grounded"] > 0.5
    assert copying["oracle_accuracy"] < 0.4 and copying["failure_6"] > 0.5


def test_4_units_of_the_measures():
    reference = "Anna keeps goats. Bert sells bread. Cleo sings songs. Dirk drives trains."
    assert completeness("Bert sells bread and Cleo sings songs", reference) == 0.5
    assert groundedness("Anna keeps goats. Zed flies kites.", "Anna keeps brown goats") == 0.5


def test_5_questions_about_documents_that_were_trained_on_are_refused(method):
    train = [Row(f"train.jsonl:{i}", r) for i, r in enumerate(ROWS[:5])]
    held = [Row(f"eval.jsonl:{i}", r) for i, r in enumerate(ROWS[3:])]
    with pytest.raises(RecipeError, match="2 documents have questions both in data.train and in data.eval: Dirk, Elsa"):
        method.check_rows(train, held)
    method.model_copy(update={"allow_shared_documents": True}).check_rows(train, held)
    method.check_rows(train[:3], held)
    with pytest.raises(RecipeError, match="eval.jsonl:9: has no gold"):
        method.check_rows(train[:3], [Row("eval.jsonl:9", {"prompt": "x", "completion": "y"})])


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(-0.10, -0.03, "fail"), (-0.01, 0.05, "pass"), (-0.05, 0.03, "inconclusive")]
)
def test_7_the_gates_table(low, high, outcome):
    change = Estimate((low + high) / 2, low, high, 0.01, 10)
    assert gate(change, 0.02, 200) == outcome
    assert gate(change, 0.02, 49) == "inconclusive", "fewer than 50 questions decide nothing"


def test_9_questions_needed():
    values = np.random.default_rng(0).normal(0, 0.3, 500)
    assert needed(values, 0.02) == int(np.ceil(2.8**2 * values.var(ddof=1) / 0.0004))


def test_10_failure_points():
    shown = Context("", ("a", "b"), ("a", "b", "c"))
    assert [not_shown(shown, [g], {"a", "b", "c", "d"}) for g in ("x", "d", "c", "a")] == [1, 2, 3, 0]
    reference = "She keeps 7 goats. She sells red cloth."
    assert failure("She keeps 7 goats and she sells red cloth", [reference]) == 0
    assert failure("nobody knows", [reference]) == 4
    assert failure("7 goats", [reference]) == 4, "no key point is covered"
    assert failure("She keeps 7 goats, as all over there do since long before", [reference]) == 7
    buried = reference + " " + " ".join(f"word{i}" for i in range(60))
    assert failure(buried, [reference]) == 6
    assert failure("seven", ["7"], form=r"\d+") == 5 and failure("7", ["7"], form=r"\d+") == 0


def test_chunks_overlap_and_never_cross_documents():
    chunks = chunked([("a", "1 2 3 4 5 6 7"), ("b", "8 9")], 4, 1)
    assert [(c.doc, c.text) for c in chunks] == [("a", "1 2 3 4"), ("a", "4 5 6 7"), ("b", "8 9")]


def test_conditions_hold_what_they_say():
    corpus = Corpus(list(FACTS.items()), 8, 2, 3, 24)
    questions, gold = [r["prompt"] for r in ROWS], [r["gold"] for r in ROWS]
    shown = corpus.contexts(questions, gold, ("retrieved", "oracle", "adversarial", "closed"))
    assert all(g[0] in c.docs for c, g in zip(shown["oracle"], gold, strict=True))
    assert not any(g[0] in c.found for c, g in zip(shown["adversarial"], gold, strict=True))
    assert all(c.text == "" for c in shown["closed"])
    assert all(g[0] in c.docs for c, g in zip(shown["retrieved"], gold, strict=True)), "TF-IDF finds a name"
    assert all(len(c.text.replace("[", " ").split()) <= 24 + 3 for c in shown["oracle"])


def test_rows_in_the_deployed_form(method):
    rows = method.training_rows(ROWS, refusals=0.5)
    refused = [r for r in rows if r["completion"] == method.refusal]
    assert 0 < len(refused) < len(rows)
    for row, before in zip(rows, ROWS, strict=True):
        assert before["prompt"] in row["prompt"] and row["gold"] == before["gold"]
        assert (f"[{row['gold'][0]}]" in row["prompt"]) == (row not in refused)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "{question}"}, "lacks {context} or {question}"),
        ({"prompt": "{context} {question} {who}"}, "names {who}, which luthier does not fill in"),
        ({"form": "("}, "'(' is not a regular expression"),
        ({"overlap_words": 8}, "leaves nothing new in passages of 8"),
        ({"corpus": "/nowhere.jsonl"}, "there is no file /nowhere.jsonl"),
    ],
)
def test_bad_settings_are_named(method, changes, words):
    (problem,) = method.model_copy(update=changes).check(Facts())
    assert words in problem.what


def test_bad_corpora_are_named(tmp_path, method):
    path = tmp_path / "c.jsonl"
    for text, words in (
        ("", "holds no document"),
        ('{"doc_id": 1, "text": "a"}\n{"doc_id": 1, "text": "b"}', ":2: names the document '1' again"),
        ('{"text": "a"}', ":1: has no doc_id and text"),
        ('{"doc_id": "a", "text": 3}', ":1: has no doc_id and text"),
        ("{", ":1: is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=words):
            documents_of(path)
    with pytest.raises(LuthierError, match=r"top_k: 99 of \d+ chunks"):
        method.model_copy(update={"top_k": 99}).documents()
    with pytest.raises(LuthierError, match="has no room for a chunk of 8 words"):
        Corpus(list(FACTS.items()), 8, 2, 3, 7)


def test_one_document_counts_once_however_many_questions_it_has():
    spread = summed("m", [1, 1, 1, 1, 0], ["a", "a", "a", "a", "b"])
    assert spread.value == 0.8 and isinstance(spread, Measure) and spread.keys == ("a", "b")
