"""Rows as people write them: which form is found, what it is read as, what is refused and with which remedy."""

import json

import pytest

from luthier.data.prepare import prepare
from luthier.data.reading import ANSWERED, read
from luthier.data.rendering import Renderer
from luthier.support.errors import RecipeError
from luthier.testing.models import byte_tokenizer

ASKED, TOLD = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def found(tmp_path, *values, columns=None, shapes=ANSWERED, **more):
    """(form, values) of the rows of a file with these values."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    rows, _ = read("d.jsonl", columns or {}, tmp_path, shapes=shapes, **more)
    return "; ".join(rows.forms), [r.values for r in rows]


def refusal(tmp_path, values, **more):
    with pytest.raises(RecipeError) as error:
        found(tmp_path, values, **more)
    return str(error.value)


PAIR = "prompt and completion"
CASES = {  # values -> (form, values as read)
    "alpaca": (
        {"instruction": "i", "input": "x", "output": "o", "text": "### all of it"},
        ("Alpaca (read as prompt and completion); not read: text", {"prompt": "i\n\nx", "completion": "o"}),
    ),
    "alpaca without input": (
        {"instruction": "i", "input": "", "output": "o"},
        ("Alpaca (read as prompt and completion)", {"prompt": "i", "completion": "o"}),
    ),
    "alpaca with history": (
        {"instruction": "i", "input": None, "output": "o", "system": "s", "history": [["q", "r"]]},
        (
            "Alpaca (read as messages)",
            {
                "system": "s",
                "messages": [
                    {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "i"},
                    {"role": "assistant", "content": "o"},
                ],
            },
        ),
    ),
    "dolly": (
        {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
        ("Dolly (read as prompt and completion)", {"category": "qa", "prompt": "i\n\nc", "completion": "r"}),
    ),
    "sharegpt": (
        {"id": 1, "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        ("ShareGPT (read as messages)", {"id": 1, "messages": [ASKED, TOLD]}),
    ),
    "sharegpt with calls": (
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "a?"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"},
            ],
        },
        (
            "ShareGPT (read as messages)",
            {
                "tools": json.dumps(TOOLS),
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                    {"role": "tool", "content": "2"}, TOLD,
                ],
            },
        ),
    ),
    "pairs in a conversation": (
        {"conversation": [{"input": "a?", "output": "b"}]}, ("ShareGPT (read as messages)", {"messages": [ASKED, TOLD]}),
    ),
    "openai": (
        {"messages": [ASKED, CALLING, TOLD], "tools": TOOLS},
        (
            "messages",
            {"messages": [ASKED, CALLING, TOLD], "tools": TOOLS},
        ),
    ),
    "other names of roles": (
        {"messages": [{"role": "human", "content": "a?"}, {"role": "model", "content": "b"}]},
        ("messages", {"messages": [ASKED, TOLD]}),
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
            "contents": [{"role": "user", "parts": [{"text": "a?"}]}, {"role": "model", "parts": [{"text": "b"}]}],
        },
        (
            "Gemini (read as messages)",
            {"messages": [{**t, "content": [{"text": t["content"]}]} for t in ({"role": "system", "content": "s"}, ASKED, TOLD)]},
        ),
    ),
    "trl, standard": ({"prompt": "p", "completion": "c"}, (PAIR, {"prompt": "p", "completion": "c"})),
    "trl, conversational": (
        {"prompt": [TOLD, ASKED], "completion": [TOLD]},
        ("conversational prompt and completion (read as messages)", {"messages": [{**TOLD, "weight": 0}, ASKED, TOLD]}),
    ),
    "ms-swift": (
        {"query": "q", "response": "r"}, ("ms-swift (read as prompt and completion)", {"prompt": "q", "completion": "r"}),
    ),
    "messages as text": ({"messages": json.dumps([ASKED, TOLD])}, ("messages", {"messages": [ASKED, TOLD]})),
    "three forms at once": (
        {"messages": [ASKED, TOLD], "prompt": "p", "completion": "c", "text": "t", "id": 3},
        ("messages; not read: completion, prompt, text", {"messages": [ASKED, TOLD], "id": 3}),
    ),
    "null fields are missing": (
        {"messages": None, "prompt": "p", "completion": "c"}, (PAIR, {"prompt": "p", "completion": "c"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_form_is_found_by_its_fields(name, tmp_path):
    values, expected = CASES[name]
    form, rows = found(tmp_path, values, values)
    assert (form, rows[0]) == expected and rows[0] == rows[1]
    assert found(tmp_path, *rows)[1] == rows, "what was read is read again as it is"


@pytest.mark.parametrize("name", ["alpaca", "three forms at once", "trl, conversational"])
def test_what_was_found_is_what_is_trained_on(name, tmp_path):
    """Case 1: the reading and the renderer choose the same fields."""
    (tmp_path / "d.jsonl").write_text(json.dumps(CASES[name][0]) + "\n")
    rows, _ = read("d.jsonl", {}, tmp_path)
    renderer = Renderer(byte_tokenizer())
    trained = [s.text for s in renderer.segments(rows[0].values) if s.supervised]
    assert [t[0] for t in trained] == ["o" if name == "alpaca" else "b"], trained
    assert renderer.answer(rows[0].values) == ("o" if name == "alpaca" else "b")
    assert prepare(rows, renderer, max_length=200).census.rows == 1


WIDE = {
    "messages": [ASKED, TOLD],
    "prompt": "p",
    "completion": "c",
    "text": "t",
    "question": "q",
    "answers": {"text": ["a"]},
}


@pytest.mark.parametrize(
    ("columns", "shape", "read_as"),
    [
        ({"text": "question"}, "text", {"text": "q"}),
        ({"prompt": "question", "completion": "text"}, PAIR, {"prompt": "q", "completion": "t"}),
        ({"completion": "answers.text.0"}, PAIR, {"prompt": "p", "completion": "a"}),
        ({"prompt": "prompt", "completion": "completion"}, PAIR, {"prompt": "p", "completion": "c"}),
        ({"messages": "messages"}, "messages", {"messages": [ASKED, TOLD]}),
    ],
)
def test_a_mapping_wins(columns, shape, read_as, tmp_path):
    form, (row,) = found(tmp_path, WIDE, columns=columns)
    fields = {n: v for n, v in row.items() if n not in ("question", "answers")}
    assert form.partition(";")[0] == shape and fields == read_as
    assert not set(columns.values()) & set(form.partition("not read: ")[2].split(", ")), "it is read under another name"


def test_turns_have_names_of_their_own_in_the_mapping(tmp_path):
    talk = [{"speaker": "human", "line": "a?"}, {"speaker": "bot", "line": "b"}]
    columns = {"messages": "talk", "messages.role": "speaker", "messages.content": "line"}
    assert found(tmp_path, {"talk": talk}, columns=columns)[1][0]["messages"] == [ASKED, TOLD]
    assert found(tmp_path, {"talk": json.dumps(talk)}, columns=columns)[1][0]["messages"] == [ASKED, TOLD]
    assert "turn 1 has no role" in refusal(tmp_path, {"talk": [{"who": "x"}]}, columns=columns)


def test_a_mapping_to_a_field_that_is_not_there_is_refused_with_the_fields(tmp_path):
    said = refusal(tmp_path, {"a": {"b": "x"}, "c": None}, columns={"text": "a.d"})
    assert "d.jsonl:1: has no field 'a.d', which data.columns.text names; it has a, c (null)" in said


UNREAD = {
    "preference": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "is preference data", {"completion": "chosen"}),
    "preference in turns": (
        {"prompt": [ASKED], "chosen": [TOLD], "rejected": [TOLD]}, "is preference data", {"completion": "chosen"},
    ),
    "preference with the prompt in both": (
        {"prompt": "a?", "chosen": [ASKED, TOLD], "rejected": [ASKED, TOLD]}, "is preference data", {"messages": "chosen"},
    ),
    "preference beside messages": (
        {"prompt": "a?", "chosen": [ASKED, TOLD], "rejected": [ASKED], "messages": [ASKED, TOLD]}, "is preference data",
        {"messages": "messages"},
    ),
    "preference as text": ({"chosen": "c", "rejected": "r"}, "is preference data", {"text": "chosen"}),
    "unpaired": (
        {"prompt": "p", "completion": "c", "label": True}, "is unpaired preference data",
        {"prompt": "prompt", "completion": "completion"},
    ),
    "openai's preference": (
        {"input": {"messages": [ASKED]}, "preferred_output": [TOLD], "non_preferred_output": [TOLD]},
        "is OpenAI's preference form", None,
    ),
    "steps": ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "is stepwise supervision", None),
    "tags": ({"id": 1, "tokens": ["a", "b"], "ner_tags": [0, 1]}, "is token tagging", None),
    "prompts": ({"prompt": "p", "id": 3}, "is a prompt without an answer", None),
    "images": ({"prompt": "p", "completion": "c", "images": ["x.png"]}, "is text with images or sound", None),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_a_form_that_no_task_reads_is_refused_by_name_and_the_remedy_works(name, tmp_path):
    values, what, columns = UNREAD[name]
    said = refusal(tmp_path, values)
    assert what in said and "d.jsonl:1: " in said
    if columns is not None:
        assert "data.columns: {" + ", ".join(f"{a}: {b}" for a, b in columns.items()) + "}" in said
        rows = found(tmp_path, values, columns=columns)[1]
        assert found(tmp_path, *rows)[1] == rows, "the rows are read again without the mapping"
        assert not {"chosen", "rejected", "label"} & set(rows[0])


LABELLED = ("text and label",)


@pytest.mark.parametrize(
    ("label", "read_as"),
    [("good", "good"), (3, 3), (True, "true"), (False, "false"), (2.0, 2), ("0", "0"), (" good ", "good")],
)
def test_labels_are_numbers_names_or_truth(label, read_as, tmp_path):
    (row,) = found(tmp_path, {"text": "t", "label": label}, shapes=LABELLED)[1]
    assert row["label"] == read_as and type(row["label"]) is type(read_as)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "t", "label": 1.5}, "label is 1.5; a label is text or a whole number"),
        ({"text": "t", "label": [0, 2]}, "has several labels ([0, 2])"),
        ({"text": "t", "label": ""}, "has an empty label"),
        ({"text": "t", "label": None}, "label is null; give it a value, drop the row, or set data.on_bad_row: skip"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "is a pair of texts with a label"),
        ({"text": "t", "label": " \t"}, "has an empty label"),
        ({"text": "t", "label": float("nan")}, "label is nan; a label is text or a whole number"),
        ({"review": "t", "sentiment": "good"}, "perhaps with data.columns: {text: review, label: sentiment}"),
        ({"Text": "t", "Label": "good"}, "perhaps with data.columns: {text: Text, label: Label}"),
    ],
)
def test_what_is_no_label_is_refused(values, message, tmp_path):
    assert message in refusal(tmp_path, values, shapes=LABELLED)


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"question": "q", "answer": "a"}, "data.columns: {prompt: question, completion: answer}"),
        ({"inputs": "q", "targets": "a"}, "data.columns: {prompt: inputs, completion: targets}"),
        ({"document": "d", "summary": "s"}, "data.columns: {prompt: document, completion: summary}"),
        ({"x": "q", "y": "a"}, "map them with data.columns"),
    ],
)
def test_rows_of_no_known_form_are_refused_with_a_mapping_that_works(values, mapping, tmp_path):
    said = refusal(tmp_path, values)
    assert said.endswith(mapping), said
    if "{" in mapping:
        names = dict(x.split(": ") for x in mapping.partition("{")[2].rstrip("}").split(", "))
        (row,) = found(tmp_path, values, columns=names)[1]
        assert (row["prompt"], row["completion"]) == tuple(values.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conversations": "x"}, "conversations is a text that is not JSON"),
        (
            {"conversations": [{"from": "nobody", "value": "x"}]},
            "turn 1 is from 'nobody'; it should be one of assistant, bard",
        ),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "the call of turn 1 is a text that is not JSON"),
        ({"instruction": "i", "output": "o", "history": ["x"]}, "history is not a list of [question, answer]"),
        ({"instruction": ["i"], "output": "o"}, "prompt is list \"['i']\"; it should be text"),
        ({"instruction": "i", "output": None}, "has the fields instruction, output (null), expected"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "turn 2 has no role and content as text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1 holds a part of type 'image_url'",
        ),
    ],
)
def test_a_fault_within_a_form_names_turn_and_value(values, message, tmp_path):
    assert message in refusal(tmp_path, values)


def test_forms_of_one_shape_may_be_mixed_and_shapes_may_not(tmp_path):
    assert len(found(tmp_path, {"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"})[1]) == 2
    with pytest.raises(RecipeError, match=r"d\.jsonl:2: holds text, but .*d\.jsonl:1 holds prompt and completion"):
        found(tmp_path, {"prompt": "p", "completion": "c"}, {"text": "t"})
