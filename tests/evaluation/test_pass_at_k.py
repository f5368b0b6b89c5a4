"""pass@k: the estimator, what is run, and running it in the sandbox."""

from itertools import combinations

import pytest
import torch

from luthier.data.rendering import Renderer
from luthier.evaluation import PassAtK
from luthier.evaluation.pass_at_k import code_of, pass_at_k, program
from luthier.inference.generation import generate, sampled
from luthier.model.view import ModelView
from luthier.step.lab import Completion
from luthier.support import sandbox
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams
from luthier.testing.models import byte_tokenizer, tiny

# Generated code never runs outside the sandbox, so where namespaces do not work there is nothing to test.
needs_sandbox = pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 1, 7)])
def test_the_estimator_is_the_share_of_all_draws_with_a_pass(n, c, k):
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_code_comes_out_of_its_fence():
    assert code_of("Sure:\n```python\nx = 1\n```\nDone.") == "x = 1\n" and code_of("x = 1") == "x = 1"
    assert code_of("```\ny = 2") == "y = 2"


def test_a_humaneval_answer_may_go_on_where_the_prompt_ends():
    row = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"}
    assert program(row, "    return x + 1\n").startswith("def f(x):\n    return x + 1")
    assert program(row, "def f(x):\n    return 2\n").count("def f(") == 1
    for row in ({"prompt": "x"}, {"tests": 3}, {"tests": [3]}, {"test": "t", "entry_point": "f"}):
        with pytest.raises(LuthierError, match="neither tests nor"):
            program(row, "y")


@needs_sandbox
def test_programs_are_run_against_their_tests(exam_of):
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    rows = [{"prompt": p, "completion": "x", "tests": tests} for p in ("good", "wrong", "endless", "broken")]
    said = {
        "good": "```python\ndef add(a, b):\n    return a + b\n```", "wrong": "def add(a, b):\n    return 3",
        "endless": "while True: pass", "broken": "def add(",
    }  # fmt: skip
    (measure,) = PassAtK(seconds=2).evaluate(exam_of(rows, said))
    assert measure.name == "pass@1" and measure.stats[:, 0].tolist() == [1, 0, 0, 0] and measure.judges


def test_a_row_without_tests_is_named(exam_of):
    with pytest.raises(LuthierError, match=r"f\.jsonl:1: has neither tests"):
        PassAtK().evaluate(exam_of([{"prompt": "a", "completion": "b"}], {"a": "x"}))


def test_where_no_sandbox_works_nothing_runs(exam_of, monkeypatch):
    monkeypatch.setattr(sandbox, "unavailable", lambda: "namespaces do not work here")
    with pytest.raises(LuthierError, match="generated code is not run"):
        PassAtK().evaluate(exam_of([{"prompt": "a", "completion": "b", "tests": ["x"]}], {"a": "x"}))


def view():
    model = tiny("llama", vocab_size=260, layers=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0)
    return ModelView(model.eval(), byte_tokenizer())


def test_draws_depend_on_the_row_and_number_alone():
    v = view()
    renderer = Renderer(v.tokenizer)
    prompts = [renderer.prompt_ids({"prompt": p}) for p in ("one", "a longer one", "x")]
    both = sampled(v, prompts, renderer, 5, 2, 1.0, Streams(0), ["1", "2", "3"])
    alone = sampled(v, prompts[2:], renderer, 5, 2, 1.0, Streams(0), ["3"])
    assert both[2] == alone[0] and both[0][0] != both[0][1]
    cold = sampled(v, prompts, renderer, 5, 1, 1e-4, Streams(0), ["1", "2", "3"])
    assert [c[0] for c in cold] == [c.text for c in generate(v, prompts, renderer, 5)]


def test_draws_follow_the_softmax():
    from luthier.inference.generation import drawn

    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    streams = Streams(0)
    draws = drawn([streams.torch("t", i) for i in range(4000)], 2.0)(logits, range(4000))
    shares = torch.bincount(draws, minlength=3) / 4000
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.03)


@needs_sandbox
def test_humanevals_own_solutions_pass_and_others_do_not(exam_of, tmp_path):
    from luthier.data.reading import read

    problems = [r.values for r in read("builtin:humaneval", {}, tmp_path, "eval", limit=6)[0]]
    method = PassAtK(rows=6)
    for answer, share in ((lambda r: r["canonical_solution"], 1.0), (lambda r: "    return None\n", 0.0)):
        exam = exam_of(problems)
        exam.generated = lambda prompts, n, a=answer: [Completion(a(r), True, 1) for r in problems]
        (measure,) = method.evaluate(exam)
        assert measure.value == share and len(measure.keys) == 6
