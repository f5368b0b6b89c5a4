"""What a template wraps around an answer is not the answer: rows, prompts and answers as a chat model that thinks has them."""

import pytest
import torch

from helpers.templates import CHATML, LLAMA2, QWEN3, QWEN_THINKS, R1, TOOLS
from helpers.words import byte_level, sentencepiece, slow_bytes
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation import ExactMatch, FunctionCalls
from luthier.evaluation.base import Exam
from luthier.inference import generation
from luthier.inference.services import lab_with
from luthier.model.view import ModelView
from luthier.tasks.causal_lm import CausalLm
from luthier.testing.models import tiny


def exam_of(tokenizer, rows, written, monkeypatch):
    """An exam whose model writes these texts, with the end token of the template, in the order of the prompts."""
    renderer = Renderer(tokenizer)
    view = ModelView(tiny(vocab_size=400, layers=1).eval(), tokenizer)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in written]

    def write(view, prompts, part, *more):
        return {i: ids[i] for i in part}

    monkeypatch.setattr(generation, "_written", write)
    lab = lab_with(renderer, {"base": lambda: view})
    return Exam(view, lab, CausalLm(), (), [Row(f"f:{i}", r) for i, r in enumerate(rows)])


EMPTY = "<think>\n\n</think>\n\n"
ROWS = [{"prompt": f"q{i}", "completion": a} for i, a in enumerate(("one", "two", "three", "four"))]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (QWEN3, [EMPTY + "one<|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>", "<think>\nthree", "five<|im_end|>"]),
        (QWEN_THINKS, ["so\n</think>\n\none<|im_end|>", "</think>two<|im_end|>", "three<|im_end|>", "</think>\nfive<|im_end|>"]),
        (R1, ["so\n</think>\n\none</s>", "two?\n</think>two</s>", "three", "four</think>five</s>"]),
        (LLAMA2, [" one </s>", "two</s>", " tree </s>", " five </s>"]),
        (CHATML, ["one<|im_end|>", "two<|im_end|>", "tree<|im_end|>", "five"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [byte_level, sentencepiece, slow_bytes])
def test_two_of_four_are_right(template, written, make, monkeypatch):
    exam = exam_of(make(template), ROWS, written, monkeypatch)
    (measure,) = ExactMatch().evaluate(exam)
    assert measure.stats[:, 0].tolist() == [1, 1, 0, 0]
    (contains,) = ExactMatch(match="contains").evaluate(exam)
    assert contains.stats[:, 0].tolist()[2:] == [0, 0]  # a thought contains no answer


def test_a_thought_in_the_right_answer_is_not_asked_for(monkeypatch):
    rows = [{"prompt": "q", "completion": "<think>\nso\n</think>\n\none"}]
    exam = exam_of(byte_level(QWEN3), rows, ["<think>\nelse\n</think>\n\none<|im_end|>"], monkeypatch)
    assert ExactMatch().evaluate(exam)[0].value == 1
    (reply,) = CausalLm().replies(exam.view, exam.lab, ["q"], 5)
    assert reply == {"answer": "one", "stopped": True, "thought": "else"}


def test_calls_of_turns_are_judged_in_the_templates_form(monkeypatch):
    def row(hours, after=()):
        call = {"type": "function", "function": {"name": "alarm", "arguments": f'{{"hours": {hours}}}'}}
        turns = [
            {"role": "user", "content": f"wake me {hours}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": [*turns, *after], "tools": [call]}

    rows = [row(7), row(8), row(9, [{"role": "tool", "content": "done"}])]
    written = [
        f'<tool_call>\n{{"name": "alarm", "arguments": {{"hours": {h}}}}}\n</tool_call><|im_end|>' for h in (7, 1, 9)
    ]  # fmt: skip
    exam = exam_of(byte_level(TOOLS), rows, written, monkeypatch)
    found = {m.name: m for m in FunctionCalls().evaluate(exam)}
    assert found["call_right"].stats[:, 0].tolist() == [1, 0, 1] and found["call_name"].value == 1
    assert ExactMatch().evaluate(exam)[0].stats[:, 0].tolist() == [1, 0, 1]
    prompts = [exam.renderer.tokenizer.decode(exam.prompt_ids(r)) for r in rows]
    assert all(p.endswith("<|im_start|>assistant\n") and "wake me" in p and "done" not in p for p in prompts)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]',
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', '{"name": "f", "arguments": "{\\"a\\": 1}"}',
    ],
)  # fmt: skip
def test_calls_in_the_marks_of_templates(text):
    from luthier.evaluation.function_calls import calls_of

    assert calls_of(text, "name", "arguments") == [("f", {"a": 1})]


def test_greedy_answers_are_the_largest_logits_whatever_the_settings_say():
    model, tokenizer = tiny(vocab_size=400, layers=1).eval(), byte_level(CHATML)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, no_repeat_ngram_size=1)
    view = ModelView(model, tokenizer)
    renderer = Renderer(tokenizer)
    ids = renderer.prompt_ids({"prompt": "hello"})
    (done,) = generation.generate(view, [ids], renderer, 6)
    text, said = torch.tensor([ids]), []
    with torch.no_grad():
        for _ in range(6):
            said.append(int(model(text).logits[0, -1].argmax()))
            text = torch.cat([text, torch.tensor([[said[-1]]])], 1)
    assert done.text == renderer.answer_text(said)[0]
