"""Templates that write a finished conversation in another way than the prompts that lead to it."""

from datetime import date

import pytest

from helpers.templates import (
    AFTER_USER,
    BETWEEN,
    CHATML,
    CLOCK,
    CLOSED,
    EMPTY_THOUGHT,
    LAST_ONLY,
    LAST_WORD,
    NO_END,
    ONE_END,
    OTHER_HEAD,
    PARTS,
    QWEN3,
    R1,
    SAID_AFTER,
    TEMPLATES,
    TOOLS,
    TWO_ENDS,
    TWO_MESSAGES,
)
from helpers.words import byte_level, sentencepiece
from luthier.data.batch import IGNORE
from luthier.data.rendering import Renderer, Unrenderable
from luthier.data.template import Template, stop_in

ASK, SAY = {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am fine"}
ASK2, SAY2 = {"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [ASK, SAY, ASK2, SAY2]
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": {"city": "Bonn"}}}
SNOW = {"id": "c2", "type": "function", "function": {"name": "snow", "arguments": {}}}
CALLS, WET = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "wet"}
RAIN = [{"type": "function", "function": {"name": "rain"}}]


def pieces(template, turns, tools=None, **more):
    """(renderer, runs of text by whether they are supervised, after the ids were compared with the prompt in use)."""
    renderer = Renderer(byte_level(template), **more)
    row = {"messages": turns, **({"tools": tools} if tools else {})}
    item, decode = renderer.render(row, "k"), renderer.tokenizer.decode
    if turns[-1]["role"] == "assistant":
        start = renderer.prompt_ids(row)
        own = renderer.tokenizer.apply_chat_template(
            turns[:-1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert item["ids"][: len(start)] == start == own and item["labels"][len(start)] != IGNORE
    out = []
    for i, y in zip(item["ids"], item["labels"], strict=True):
        if not out or out[-1][1] != (y != IGNORE):
            out.append(([], y != IGNORE))
        out[-1][0].append(i)
    return renderer, [(decode(ids), on) for ids, on in out]


def said(template, turns, tools=None, **more):
    return [text for text, on in pieces(template, turns, tools, **more)[1] if on]


def test_an_answer_follows_the_closed_thought_of_its_prompt():
    renderer, found = pieces(CLOSED, TALK)
    assert [t for t, on in found if on] == ["I am fine<|im_end|>", "four<|im_end|>"]
    assert found[-2][0].endswith("assistant\n<think>\n\n</think>\n\n") and "<think>" not in found[0][0]
    assert renderer.answer_text(renderer.tokenizer("four<|im_end|>")["input_ids"]) == ("four", "")


@pytest.mark.parametrize("turns", [[SYSTEM, ASK, SAY], [SYSTEM, *TALK]])
def test_a_system_text_of_the_last_question_stands_in_the_training_row(turns):
    _, found = pieces(LAST_ONLY, turns)
    assert found[-2][0].endswith(f"[INST] Be brief.\n\n{turns[-2]['content']}[/INST]")
    assert [t for t, on in found if on] == [f" {t['content']}</s>" for t in turns if t["role"] == "assistant"]


def test_calls_are_found_where_no_other_answer_may_stand():
    turns = [SYSTEM, ASK, CALLS, WET, SAY, ASK2, SAY2]
    first, *others = said(LAST_ONLY, turns, RAIN)
    assert first.startswith("[CALLS][{") and first.endswith("}]</s>") and others == [" I am fine</s>", " four</s>"]


def test_an_answer_that_the_template_does_not_end_gets_the_end_token_at_which_generation_stops():
    renderer, found = pieces(NO_END, TALK)
    assert [t for t, on in found if on] == ["I am fine", "four"], "nothing says that generation stops at </s>"
    user, eos = renderer.tokenizer.convert_tokens_to_ids("<|user|>"), renderer.tokenizer.eos_token_id
    assert said(NO_END, TALK, ends=(eos,)) == ["I am fine", "four</s>"]
    assert said(NO_END, TALK, ends=(user, eos)) == ["I am fine<|user|>", "four</s>"]
    assert said(NO_END, TALK[:3]) == ["I am fine"]
    assert said(CHATML, [ASK, SAY]) == ["I am fine<|im_end|>"]


def test_an_answer_does_not_reach_to_the_end_of_another_turn():
    assert said(ONE_END, TALK[:3]) == ["I am fine"]
    assert said(ONE_END, TALK) == ["I am fine", "four</s>"]


def test_contents_are_given_in_parts_where_the_template_reads_only_these():
    renderer = Renderer(byte_level(PARTS))
    assert renderer.render({"messages": TALK}, "k") == Renderer(byte_level(CHATML)).render({"messages": TALK}, "k")
    assert renderer.prompt_ids({"prompt": "two"}) == Renderer(byte_level(CHATML)).prompt_ids({"prompt": "two"})


def test_the_templates_own_empty_thought_follows_the_thought_that_the_prompt_opens():
    assert said(EMPTY_THOUGHT, [ASK, SAY]) == ["</think>I am fine<|end|>"]
    renderer, found = pieces(EMPTY_THOUGHT, [ASK, {**SAY, "reasoning_content": "why"}])
    assert found[-2:] == [
        ("<|user|>hello there<|end|><|assistant|><think>\n", False),
        ("why</think>I am fine<|end|>", True),
    ]
    for written, answer in (("</think>four<|end|>", ("four", "")), ("why</think>four<|end|>", ("four", "why"))):
        assert renderer.answer_text(renderer.tokenizer(written)["input_ids"]) == answer


def test_tokens_that_end_an_answer_one_after_another_are_all_supervised():
    renderer, found = pieces(TWO_ENDS, TALK)
    end = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert said(TWO_ENDS, TALK, ends=(renderer.tokenizer.convert_tokens_to_ids("<|END_OF_TURN_TOKEN|>"),)) == [
        f"<|START_RESPONSE|>I am fine{end}", f"<|START_RESPONSE|>four{end}"
    ]  # fmt: skip
    assert stop_in("a b<1><2> c<1>", ("<1>", "<2>")) == len("a b<1><2>") and stop_in("ab", ("<1>",)) == 0
    assert renderer.answer_text(renderer.tokenizer("<|START_RESPONSE|>four")["input_ids"]) == ("four", "")


def test_a_thought_after_a_prompt_that_closes_it_is_refused_with_this_reason():
    renderer = Renderer(byte_level(QWEN3), options={"enable_thinking": False})
    row = {"messages": [ASK, {**SAY, "reasoning_content": "why"}]}
    with pytest.raises(
        Unrenderable, match="the answer of turn 2 has a thought, but the prompt of the chat template ends in"
    ):
        renderer.render(row, "k")
    assert Renderer(byte_level(QWEN3)).render(row, "k")


def test_weight_0_holds_for_a_last_answer_with_a_thought():
    assert said(R1, [ASK, SAY, ASK2, {**SAY2, "reasoning_content": "why"}]) == [
        "I am fine</s>",
        "why\n</think>\n\nfour</s>",
    ]
    row = {"messages": [ASK, SAY, ASK2, {**SAY2, "reasoning_content": "why", "weight": 0}]}
    item = Renderer(byte_level(R1)).render(row, "k")
    assert byte_level().decode([y for y in item["labels"] if y != IGNORE]) == "I am fine</s>"


def test_a_call_that_the_template_leaves_out_is_refused():
    one = TOOLS.replace("{% for c in m['tool_calls'] %}", "{% for c in (m['tool_calls'] or [])[:1] %}")
    assert "rain" in said(one, [ASK, CALLS, WET, SAY], RAIN)[0]
    with pytest.raises(Unrenderable, match="calls snow, but the model's chat template writes no such call"):
        said(one, [ASK, {**CALLS, "tool_calls": [CALL, SNOW]}, WET, SAY], RAIN)


def test_the_wanted_answer_is_that_of_the_last_turn_where_an_earlier_one_is_equal():
    renderer = Renderer(byte_level(TOOLS))
    row = {"messages": [ASK, CALLS, WET, CALLS, WET], "tools": RAIN}
    one = renderer.answer({"messages": [ASK, CALLS], "tools": RAIN})
    assert renderer.answer(row) == one and renderer.answer({**row, "messages": [*TALK, ASK, CALLS]}) == one


def test_marks_with_the_sign_of_a_space_end_answers():
    """SentencePiece's decoder writes ▁ as a space."""
    tokenizer = sentencepiece(CHATML.replace("<|im_end|>", "<|end▁here|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end▁here|>"]})
    renderer = Renderer(tokenizer)
    item = renderer.render({"messages": TALK}, "k")
    ends = [y for y in item["labels"] if y in renderer.stop_ids]
    assert ends == [tokenizer.convert_tokens_to_ids("<|end▁here|>")] * 2


@pytest.mark.parametrize("name", OTHER_HEAD)
@pytest.mark.parametrize("turns", [TALK[:2], TALK, [SYSTEM, *TALK, *TALK]])
def test_an_answer_follows_the_prompt_in_use_where_its_finished_turn_begins_in_another_way(name, turns):
    renderer, found = pieces(OTHER_HEAD[name], turns)
    assert [t for t, on in found if on] == [f"{t['content']}</s>" for t in turns if t["role"] == "assistant"]
    (answer, thought), wanted = renderer.answer_text(renderer.tokenizer("four</s>")["input_ids"]), ("four", "")
    assert (answer, thought) == wanted


def test_a_prompt_that_says_other_things_than_the_finished_conversation_is_refused():
    judged = (
        "{{ 'Is the ' + messages[-1]['role'] + ' kind? ' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}"
    )
    with pytest.raises(Unrenderable, match="asks for turn 2 with 'user kind"):
        said(judged, [ASK, SAY])


@pytest.mark.parametrize("after", [[WET], [WET, SAY], [WET, SAY, ASK2, SAY2]])
def test_a_call_ends_before_the_next_turn_begins(after):
    first, *others = said(LAST_WORD, [ASK, CALLS, *after], RAIN)
    assert first == "Action: rain\n" and others == [f"{t['content']}<|END_OF_TURN_TOKEN|>" for t in after[1::2]]
    assert said(LAST_WORD, [ASK, CALLS], RAIN) == ["Action: rain\n"]


@pytest.mark.parametrize("template", [AFTER_USER, BETWEEN])
def test_the_beginning_of_a_turn_that_no_prompt_writes_is_no_part_of_the_answer(template):
    renderer, found = pieces(template, [ASK, SAY, SAY2])
    written = renderer.tokenizer(found[-1][0])["input_ids"]
    assert found[-1][1] and found[-1][0].startswith("<|im_start|>assistant\nfour")
    after, asked = (renderer.prompt_ids({"messages": t}) for t in ([ASK, SAY, SAY2], [ASK, SAY]))
    assert renderer.answer_text(written, after) == renderer.answer_text(written) == ("four", "")
    assert renderer.answer_text(written, asked) == ("assistant\nfour", "")  # the model wrote it twice
    closes = BETWEEN.replace("not loop.last or", "not loop.last or m['role'] == 'assistant' or")
    assert said(template, TALK)[0] == "I am fine<|im_end|>" and said(closes, TALK)[1] == "four<|im_end|>"


def test_white_space_before_a_call_may_differ_from_that_before_a_content():
    head = "(' \\t' if m['tool_calls'] else '\\t\\t') if m['role'] == 'assistant' else ''"
    source = "{{ tools | string }}{% for m in messages %}{{ m['role'] + ':' }}{{ HEAD }}{% for c in m['tool_calls'] %}"
    source += "{{ c['function']['name'] }}{% endfor %}{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}"
    source = source.replace("HEAD", head) + "{{ 'assistant:\\n\\n' }}{% endif %}"
    assert said(source, [ASK, CALLS], RAIN) == ["rain</s>"] and said(source, TALK) == ["I am fine</s>", "four</s>"]


def test_a_thought_that_the_template_leaves_out_is_no_reason_to_refuse():
    left = CLOSED.replace("+ m['content']", "+ ('</think>' if m['role'] == 'assistant' else '') + m['content']")
    row = [ASK, {**SAY, "reasoning_content": "why"}]
    assert said(left.replace("<think>\\n\\n</think>\\n\\n", "<think></think>"), row) == ["I am fine<|im_end|>"]


def test_an_empty_thought_that_a_row_writes_is_trained_on():
    for last in ({"content": "<think>\n\n</think>\n\nfour"}, {"content": "four", "reasoning_content": ""}):
        renderer, found = pieces(R1, [*TALK[:3], {"role": "assistant", **last}])
        assert [t for t, on in found if on] == ["I am fine</s>", "\n</think>\n\nfour</s>"]
        assert renderer.answer_text(renderer.tokenizer(found[-1][0])["input_ids"]) == ("four", "")


def test_a_call_with_an_end_token_within_is_trained_on_and_not_asked_for():
    last = {**CALLS, "content": "so"}
    assert said(TWO_MESSAGES, [ASK, last], RAIN) == ["so<|im_end|>\ncall\nrain<|im_end|>"]
    row = {"messages": [ASK, last], "tools": RAIN}
    with pytest.raises(Unrenderable, match="within which the chat template writes '<|im_end|>'"):
        Renderer(byte_level(TWO_MESSAGES)).answer(row)


def test_a_turn_in_two_places_is_refused_with_this_reason():
    turns = [ASK, {**CALLS, "content": "let me look"}, WET, SAY]
    with pytest.raises(Unrenderable, match="writes the content of turn 2 after the results of its calls"):
        said(SAID_AFTER, turns, RAIN)
    assert said(SAID_AFTER, [ASK, SAY], RAIN) == ["I am fine<|im_end|>"]


def test_a_thought_of_an_earlier_turn_after_a_closed_one_is_refused_with_this_reason():
    why = "('<think>\\n' + m.get('reasoning_content', '') + '\\n</think>\\n\\n' if m['role'] == 'assistant' else '')"
    kept = CLOSED.replace("+ m['content']", f"+ {why} + m['content']")
    with pytest.raises(
        Unrenderable, match="the answer of turn 2 has a thought, but the prompt of the chat template ends"
    ):
        said(kept, [ASK, {**SAY, "reasoning_content": "why"}, ASK2, SAY2])


def test_a_template_with_the_time_writes_one_time_in_every_text():
    renderer, today = Renderer(byte_level(CLOCK)), date.today().isoformat()
    row = {"messages": TALK}
    item, start = renderer.render(row, "k"), renderer.prompt_ids(row)
    assert renderer.day == today and renderer.tokenizer.decode(start).startswith(f"{today} 00:00:00.000000<|im_start|>")
    assert item["ids"][: len(start)] == start and Renderer(byte_level(CHATML)).day == ""


def test_messages_are_no_plain_text():
    with pytest.raises(Unrenderable, match=r"has messages, .* but data.template is plain"):
        Renderer(byte_level(CHATML), plain=True).render({"messages": TALK}, "k")


ROUNDS = CHATML.replace("'<|im_start|>' + m['role']", "loop.index | string + '<|im_start|>' + m['role']")
# Some answers in the middle stand in another frame than the first and the last ones.
ODD = CHATML.replace("'<|im_start|>' +", "('!' if loop.index % 8 == 4 else '') + '<|im_start|>' +")
ODD = ODD.replace("+ '\\n' }}{% endfor", "+ ('~' if loop.index % 8 == 6 else '') + '\\n' }}{% endfor")
LOOKS = CHATML.replace("'<|im_start|>' +", "('#' if m['content'].startswith('hello') else '') + '<|im_start|>' +")
AGENT = [
    SYSTEM,
    *[
        t
        for n in range(6)
        for t in (ASK, CALLS, WET, {**CALLS, "content": f"so {n}"}, WET, {**SAY, "content": f"{n}"}, ASK2, SAY2)
    ],
]
THINKS = [{**t, "reasoning_content": "why"} if t["role"] == "assistant" and n % 3 else t for n, t in enumerate(AGENT)]


@pytest.mark.parametrize(
    "turns", [TALK * 6, [SYSTEM, *TALK * 6, ASK], [ASK, SAY, SAY2, *TALK] * 4, AGENT, THINKS, AGENT[:-6]]
)
@pytest.mark.parametrize(
    "source", [*TEMPLATES.values(), LAST_ONLY, LAST_WORD, NO_END, ONE_END, ROUNDS, ODD, LOOKS, *OTHER_HEAD.values()]
)
def test_the_answers_of_a_long_conversation_are_those_that_their_prompts_find(source, turns, monkeypatch):
    def written():
        row = {"messages": turns, **({"tools": RAIN} if turns[1] is CALLS or CALLS in turns else {})}
        try:
            return [(s.text, s.supervised) for s in Renderer(byte_level(source)).segments(row)]
        except Unrenderable:
            return None

    quick = written()
    monkeypatch.setattr("luthier.data.template.FEW", 10**9)
    assert quick == written()


MORE = [ASK, SAY, WET, SAY, WET, SAY]  # after the last question, QWEN3 writes thoughts


@pytest.mark.parametrize(
    ("source", "turns"), [(CHATML, TALK), (QWEN3, TALK), (TOOLS, [ASK, CALLS, WET, SAY]), (QWEN3, MORE)]
)
def test_the_texts_that_a_long_conversation_asks_for_do_not_grow_with_its_turns(source, turns, monkeypatch):
    asked = []
    given = Template.text
    monkeypatch.setattr(
        Template, "text", lambda self, turns, *more: asked.append(len(turns)) or given(self, turns, *more)
    )
    counts = []
    for times in (12, 24):
        renderer, before = Renderer(byte_level(source)), len(asked)
        more = [WET, SAY] * 3 if turns is MORE else []
        pieces = renderer.segments({"messages": [*turns * times, *more], "tools": RAIN if source is TOOLS else None})
        assert sum(p.supervised for p in pieces) == (len(turns) * times + len(more)) // 2
        counts.append(len(asked) - before)
    assert counts[0] == counts[1] < 40
