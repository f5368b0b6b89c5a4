"""Token ids are those that the model's own tokenizer and template give, for kinds of tokenizers and of templates."""

import json

import pytest

from helpers.templates import (
    CHATML,
    GEMMA,
    GENERATION,
    LLAMA2,
    MISTRAL,
    QWEN3,
    QWEN_THINKS,
    R1,
    TEMPLATES,
    TOOLS,
    TOOLS_TEXT,
)
from helpers.words import TOKENIZERS, byte_level, sentencepiece, slow_bytes
from luthier.data.batch import IGNORE
from luthier.data.prepare import prepare
from luthier.data.reading import answers_of, shape_of
from luthier.data.rendering import Renderer, Unrenderable
from luthier.data.store import Row
from luthier.data.turns import check_messages
from luthier.support.errors import RecipeError
from luthier.tasks.causal_lm import CausalLm

ASK, SAY = {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am fine, — ü"}
AGAIN = [{"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "four"}]
TALK = [ASK, SAY, *AGAIN]


def own(tokenizer, turns, generate=False, **more):
    """The ids that transformers gives."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=generate, return_dict=False, **more)


def supervised(item):
    """The runs of supervised ids."""
    out, before = [], IGNORE
    for y in item["labels"]:
        if y != IGNORE:
            if before == IGNORE:
                out.append([])
            out[-1].append(y)
        before = y
    return out


def kept(ids, own_ids):
    """The template's own ids, without the space that it may write after the last end token."""
    return ids == own_ids[: len(ids)] and len(own_ids) - len(ids) <= 2


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_in_training_are_the_templates_and_every_answer_is_supervised(kind, template):
    tokenizer = TOKENIZERS[kind](TEMPLATES[template])
    renderer = Renderer(tokenizer)
    for turns in ([ASK, SAY], TALK):
        item = renderer.render({"messages": turns}, "k")
        assert kept(item["ids"], own(tokenizer, turns))
        answers = supervised(item)
        assert len(answers) == len(turns) // 2
        for ids, turn in zip(answers, turns[1::2], strict=True):
            said, wanted = (t.casefold().replace(" ", "") for t in (tokenizer.decode(ids), turn["content"]))
            assert wanted[:8] in said and len(said) < len(wanted) + 45
            assert ids[-1] in renderer.stop_ids and not set(ids[:-1]) & set(renderer.stop_ids)
        start = renderer.prompt_ids({"messages": turns})
        assert start == own(tokenizer, turns[:-1], True) == item["ids"][: len(start)]
        assert item["labels"][len(start)] != IGNORE == item["labels"][len(start) - 1]
    assert renderer.render({"prompt": ASK["content"], "completion": SAY["content"]}, "k") == renderer.render(
        {"messages": [ASK, SAY]}, "k"
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_has_the_ids_of_the_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    renderer, end = Renderer(tokenizer), tokenizer.eos_token_id
    full = tokenizer("hello there I am")["input_ids"]
    item = renderer.render({"text": "hello there I am"}, "k")
    whole = full if renderer.tokens.last else [*full, end]
    assert item["ids"] == whole
    item = renderer.render({"prompt": "hello there", "completion": " I am"}, "k")
    assert item["ids"] == whole
    start = renderer.prompt_ids({"prompt": "hello there"})
    assert item["ids"][: len(start)] == start and item["labels"][len(start) - 1] == IGNORE != item["labels"][len(start)]
    assert item["ids"][-1] in renderer.stop_ids
    assert start == tokenizer("hello there")["input_ids"][: len(start)]


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-bos", "sentencepiece", "no-lead", "unigram"])
def test_first_and_last_tokens_that_a_text_writes_out_are_not_doubled(kind):
    """alignment-handbook#127: texts that a chat template wrote begin with BOS and end with EOS."""
    tokenizer = TOKENIZERS[kind]()
    renderer, end = Renderer(tokenizer), tokenizer.eos_token
    front = "".join(tokenizer.convert_ids_to_tokens(renderer.tokens.first))
    text = f"{front}hello there I am{end}"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert renderer.render({"text": text}, "k")["ids"] == plain
    item = renderer.render({"prompt": f"{front}hello there", "completion": f" I am{end}"}, "k")
    assert item["ids"] == plain
    start = renderer.prompt_ids({"prompt": f"{front}hello there"})
    assert item["ids"][: len(start)] == start and item["labels"][len(start) - 1] == IGNORE != item["labels"][len(start)]
    assert renderer.encode([[renderer.bare(f"{front}hello there")]])[0][0] == start
    assert renderer.answer({"prompt": "a", "completion": f"I am{end}"}) == "I am"
    middle = renderer.render({"text": f"hello{end} there"}, "k")["ids"]
    assert middle[: len(renderer.tokens.first)] == list(renderer.tokens.first) and middle[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_of_a_chat_model_has_bos_as_well(kind):
    tokenizer = TOKENIZERS[kind](CHATML)
    item = Renderer(tokenizer).render({"text": "hello"}, "k")
    full = tokenizer("hello")["input_ids"]
    assert item["ids"][: len(full)] == full


@pytest.mark.parametrize("lead", ["normalizer", "first", "always"])
def test_no_space_of_the_tokenizers_stands_before_an_answer(lead):
    tokenizer = sentencepiece(MISTRAL, lead)
    item = Renderer(tokenizer).render({"messages": [ASK, {"role": "assistant", "content": "and"}]}, "k")
    words = tokenizer.convert_ids_to_tokens([y for y in item["labels"] if y != IGNORE])
    assert "".join(words) == "and</s>"  # tokenised by itself it is "▁and"
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer("and", add_special_tokens=False)["input_ids"])) == "▁and"


def test_where_a_token_would_cross_the_edge_the_prompt_is_the_one_in_use():
    tokenizer = byte_level()
    renderer = Renderer(tokenizer)
    row = {"prompt": "is t", "completion": "he answer"}
    item, whole = renderer.render(row, "k"), tokenizer("is the answer")["input_ids"]
    start = renderer.prompt_ids({"prompt": "is t"})
    assert item["ids"][: len(start)] == start == tokenizer("is t")["input_ids"]
    assert item["ids"] != [*whole, tokenizer.eos_token_id] and renderer.encoded([renderer.segments(row)])[0].moved
    assert tokenizer.decode(item["ids"]) == "is the answer</s>"


def test_edges_that_move_are_counted():
    rows = [Row(f"f:{i}", {"prompt": p, "completion": "he answer"}) for i, p in enumerate(("is t", "is it ("))]
    assert prepare(rows, Renderer(byte_level()), max_length=99).census.prompt_no_prefix == 1


def test_rows_that_write_the_end_token_themselves_are_counted():
    said = ("four", "four<|im_end|>", "say <|im_end|> first", "<|user|>")
    rows = [Row(f"f:{i}", {"prompt": "two", "completion": s}) for i, s in enumerate(said)]
    assert prepare(rows, Renderer(byte_level(CHATML)), max_length=99).census.stop_within == 2
    texts = [Row("f:1", {"text": "<|im_start|>two<|im_end|>four<|im_end|>"})]
    assert prepare(texts, Renderer(byte_level(CHATML)), max_length=99).census.stop_within == 0


def test_generation_marks_supervise_what_transformers_marks():
    tokenizer = byte_level(GENERATION)
    item = Renderer(tokenizer).render({"messages": TALK}, "k")
    marked = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [int(y != IGNORE) for y in item["labels"]] == marked[: len(item["ids"])] and sum(marked) > 0


def test_weight_0_leaves_a_turn_out():
    turns = [ASK, {**SAY, "weight": 0}, *AGAIN]
    renderer = Renderer(byte_level(CHATML))
    item = renderer.render({"messages": turns}, "k")
    assert [renderer.tokenizer.decode(ids) for ids in supervised(item)] == ["four<|im_end|>"]
    assert item["ids"] == renderer.render({"messages": TALK}, "k")["ids"]
    assert answers_of({"messages": turns}) == ["four"]


def test_what_the_template_refuses_is_said_in_its_words():
    with pytest.raises(Unrenderable, match=r"the chat template refuses it \(System role not supported\)"):
        Renderer(byte_level(GEMMA), system="Be brief.").render({"messages": [ASK, SAY]}, "k")
    with pytest.raises(RecipeError, match=r"f:1: the chat template refuses it \(Conversation roles must alternate"):
        prepare([Row("f:1", {"messages": [ASK, ASK, SAY]})], Renderer(byte_level(LLAMA2)), max_length=99)
    with pytest.raises(Unrenderable, match="this model has no chat template"):
        Renderer(byte_level()).render({"messages": [ASK, SAY]}, "k")


FINAL = "<|channel|>final<|message|>"


def texts(renderer, turns, **more):
    return [(s.text, s.supervised) for s in renderer.segments({"messages": turns, **more})]


def test_a_thought_of_the_template_is_trained_on_with_the_last_answer_only():
    renderer = Renderer(byte_level(QWEN3))
    said = [t for t, on in texts(renderer, TALK) if on]
    assert said == [SAY["content"] + "<|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"]
    why = [*TALK[:3], {**AGAIN[1], "reasoning_content": "2+2"}]
    assert texts(renderer, why)[-1][0] == "<think>\n2+2\n</think>\n\nfour<|im_end|>"
    renderer = Renderer(byte_level(QWEN_THINKS))
    assert texts(renderer, why)[-2:] == [
        ("\n<|im_start|>user\ntwo plus two<|im_end|>\n<|im_start|>assistant\n<think>\n", False),
        ("2+2\n</think>\n\nfour<|im_end|>", True),
    ]


def test_a_prompt_that_opens_a_thought_needs_one_in_the_answer():
    renderer = Renderer(byte_level(R1))
    with pytest.raises(
        Unrenderable, match="opens a thought at the end of the prompt \\(<think>\\), and this answer has none"
    ):
        renderer.render({"messages": [ASK, SAY]}, "k")
    for last in (
        {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nfour"},
        {"role": "assistant", "content": "four", "reasoning_content": "why"},
    ):
        row = {"messages": [ASK, SAY, AGAIN[0], last]}
        item, start = renderer.render(row, "k"), renderer.prompt_ids(row)
        assert start == own(renderer.tokenizer, row["messages"][:-1], True) == item["ids"][: len(start)]
        said = [renderer.tokenizer.decode(ids) for ids in supervised(item)]
        assert said == [SAY["content"] + "</s>", "why\n</think>\n\nfour</s>"]
        assert renderer.answer(row).strip() == "four"


@pytest.mark.parametrize(
    ("template", "written", "answer", "thought"),
    [
        (CHATML, "four<|im_end|>", "four", ""),
        (CHATML, "<think>no</think>four<|im_end|>", "<think>no</think>four", ""),  # its template knows no thoughts
        (QWEN3, "<think>\n\n</think>\n\nfour<|im_end|>", "four", ""),
        (QWEN3, "<think>\ntwo\n</think>\n\nfour<|im_end|>", "four", "two"),
        (QWEN3, "four<|im_end|>", "four", ""),
        (QWEN3, "<think>\ntwo and", "", "two and"),
        (QWEN_THINKS, "two\n</think>\n\nfour<|im_end|>", "four", "two"),
        (R1, "two\n</think>\n\nfour</s>", "four", "two"),
        (R1, "two and", "", "two and"),
        (LLAMA2, " four </s>", "four", ""),
        (TEMPLATES["channels"], "<|channel|>final<|message|>four<|return|>", "four", ""),
        (TEMPLATES["channels"], f"<|channel|>analysis<|message|>two<|start|>assistant{FINAL}four<|return|>", "four",
         "analysistwoassistant"),
    ],
)  # fmt: skip
def test_an_answer_is_what_the_template_does_not_write(template, written, answer, thought):
    tokenizer = byte_level(template)
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert Renderer(tokenizer).answer_text(ids) == (answer, thought)


ARGUMENTS = {"city": "Köln", "days": 2}
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": ARGUMENTS}}
USED = [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "wet"}, SAY]
RAIN = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]


def as_texts(call):
    return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [as_texts(CALL)]},
        {"content": None, "tool_calls": [as_texts(CALL)["function"]]},
        {"content": None, "function_call": as_texts(CALL)["function"]},
    ],
)
@pytest.mark.parametrize("tools", [RAIN, json.dumps(RAIN)])
@pytest.mark.parametrize("template", [TOOLS, TOOLS_TEXT])
def test_calls_and_tools_are_written_as_by_the_template(turn, tools, template):
    tokenizer = byte_level(template)
    turns = [ASK, {"role": "assistant", **turn}, *USED[2:]]
    check_messages("f:1", {"messages": turns, "tools": tools})
    item = Renderer(tokenizer).render({"messages": turns, "tools": tools}, "k")
    direct = [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *USED[2:]]
    if template is TOOLS:
        assert kept(item["ids"], own(tokenizer, direct, tools=RAIN))
    first, second = (tokenizer.decode(ids) for ids in supervised(item))
    assert first.startswith('<tool_call>\n{"name": "rain", "arguments": {"city": "K')
    assert (
        json.loads(first.removeprefix("<tool_call>").removesuffix("</tool_call><|im_end|>"))["arguments"] == ARGUMENTS
    )
    assert second == SAY["content"] + "<|im_end|>" and '"rain"' in tokenizer.decode(item["ids"][:60])


def test_tools_and_calls_that_the_template_does_not_write_are_refused():
    renderer = Renderer(byte_level(CHATML))
    with pytest.raises(Unrenderable, match="has tools, but the model's chat template writes none"):
        renderer.render({"messages": [ASK, SAY], "tools": RAIN}, "k")
    with pytest.raises(Unrenderable, match="calls tools, but the model's chat template writes no tool_calls"):
        renderer.render({"messages": USED}, "k")


def test_a_conversation_may_end_in_the_result_of_a_tool():
    renderer, row = Renderer(byte_level(TOOLS)), Row("f:1", {"messages": USED[:3], "tools": RAIN})
    assert [s for _, s in texts(renderer, USED[:3], tools=RAIN)] == [False, True, False]
    asked, wanted = CausalLm().asked(row, renderer)
    assert asked == "hello there" and json.loads(wanted.removeprefix("<tool_call>").removesuffix("</tool_call>")) == {
        "name": "rain", "arguments": ARGUMENTS,
    }  # fmt: skip


def test_content_in_parts_is_their_text():
    parts = [{**ASK, "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}, SAY]
    renderer = Renderer(byte_level(CHATML))
    assert renderer.render({"messages": parts}, "k") == renderer.render({"messages": [ASK, SAY]}, "k")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 holds a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 has no role and content as text"),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": []}]}, "turn 2 has no role and content"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "turn 2 calls f with '{'"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": ["f"]}]}, "turn 2 has the call 'f', which names no function"),
        ({"messages": [ASK, {**SAY, "weight": 2}]}, "turn 2 has weight 2"),
        ({"messages": [ASK, SAY], "tools": "hammer"}, "tools is not JSON"),
        ({"messages": [ASK, SAY], "tools": ["hammer"]}, "tools is "),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_rendered_are_refused_by_name(values, told):
    with pytest.raises(RecipeError, match=f"f:1: {told}"):
        shape_of(Row("f:1", values), ("messages",))


def test_options_of_the_template_hold_in_training_and_in_use():
    renderer = Renderer(byte_level(QWEN3), options={"enable_thinking": False})
    item, start = renderer.render({"messages": TALK}, "k"), renderer.prompt_ids({"messages": TALK})
    assert start == own(renderer.tokenizer, TALK[:3], True, enable_thinking=False) == item["ids"][: len(start)]
    assert renderer.tokenizer.decode(start).endswith("<think>\n\n</think>\n\n")
    assert [renderer.tokenizer.decode(ids) for ids in supervised(item)][-1] == "four<|im_end|>"
    rows = [Row("f:1", {"messages": TALK})]
    made = [prepare(rows, r, max_length=99).digest for r in (renderer, Renderer(byte_level(QWEN3)))]
    assert made[0] != made[1]


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    for tokenizer in (byte_level(CHATML), slow_bytes(CHATML)):
        ids = tokenizer("four", add_special_tokens=False)["input_ids"]
        assert Renderer(tokenizer).answer_text([ids[0], 399, *ids[1:], 399]) == ("four", "")
