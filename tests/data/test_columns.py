"""Columns of rows, tokens and spans: through the store, cutting, collation, selection and both layouts."""

import json

import numpy as np
import pytest
import torch

from luthier import recipe
from luthier.data.batch import IGNORE, Spans, collate, pad, unpad
from luthier.data.columns import Carried
from luthier.data.prepare import prepare, shortened
from luthier.data.reading import read
from luthier.data.rendering import Renderer
from luthier.data.spans import covering
from luthier.data.store import Row, Rows
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.class_rows import ClassRows
from luthier.tasks.classification import Classification
from luthier.testing.models import byte_tokenizer, tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def values(**more):
    return {"prompt": "who", "completion": "Ada met Bo", **more}


WHOLE = [
    values(weight=2, soft=[0.25, 0.75], source="a", marks=[[0, 3, "person"], [4, 7, "act"]]),
    values(weight=0.5, soft=[1, 0], source="b", marks=[]),
    values(weight=1, soft=[0.5, 0.5], source="a", marks=[[8, 10, "person"]]),
]
KEEP = Carried(("weight", "soft", "source"), "marks")


def from_file(tmp_path, items, carried=KEEP, **more):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in items))
    return read(path.name, {}, tmp_path, carried=carried, **more)[0]


def prepared(rows, carried=KEEP, renderer=None, **more):
    return prepare(rows, renderer or Renderer(byte_tokenizer()), carried=carried, **{"max_length": 100, **more})


def words(item, span):
    return byte_tokenizer().decode(item["ids"][span[0] : span[1]])


# --- from the user's rows ---


def test_fields_become_columns_in_the_file_and_in_memory_alike(tmp_path):
    rows = from_file(tmp_path, WHOLE)
    for given in (rows, list(rows)):
        done = prepared(given).rows
        assert [r["row"]["weight"] for r in done] == [2.0, 0.5, 1.0]
        assert [r["row"]["soft"].tolist() for r in done] == [[0.25, 0.75], [1, 0], [0.5, 0.5]]
        assert [r["text"]["source"] for r in done] == ["a", "b", "a"]
        assert done.text(rows[1].key, "source") == "b" and done.names("marks") == ("act", "person")
        spans = [[(words(r, s), int(s[2])) for s in r["span"]["marks"]] for r in done]
        assert spans == [[("Ada", 1), ("met", 0)], [], [("Bo", 1)]]
    batch = collate(done[:])
    assert batch.row["weight"].dtype == batch.row["soft"].dtype == torch.float32 and batch.row["soft"].shape == (3, 2)
    assert "source" not in batch.row and batch.keys[1] == rows[1].key


def test_whole_numbers_stay_whole_and_a_single_fraction_makes_all_fractions(tmp_path):
    whole = prepared([Row(str(i), values(n=i)) for i in range(3)], Carried(("n",)))
    assert collate(whole.rows[:]).row["n"].dtype == torch.int64
    one = prepared([Row("a", values(n=1)), Row("b", values(n=0.5)), Row("c", values(n=2))], Carried(("n",)))
    assert collate(one.rows[:]).row["n"].tolist() == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"source": "a", "soft": [1, 0], "marks": []}, r"d\.jsonl:2: has no field 'weight', which data\.keep names"),
        ({"weight": "x", "source": "a", "soft": [1, 0], "marks": []}, r"d\.jsonl:2: weight is a text, in .*d\.jsonl:1"),
        (
            {"weight": 1, "source": "a", "soft": [1], "marks": []},
            r"d\.jsonl:2: soft is 1 numbers, in .*it is 2 numbers",
        ),
        ({"weight": {}, "source": "a", "soft": [1, 0], "marks": []}, r"d\.jsonl:2: weight is '\{\}'"),
        ({"weight": float("nan"), "source": "a", "soft": [1, 0], "marks": []}, r"d\.jsonl:2: weight is 'nan'"),
        ({"weight": 1, "source": "a", "soft": [1, 0]}, r"d\.jsonl:2: has no field 'marks', which data\.spans names"),
        ({"weight": 1, "source": "a", "soft": [1, 0], "marks": [[0, 1]]}, r"d\.jsonl:2: marks is '\[\[0, 1\]\]'"),
        ({"weight": 1, "source": "a", "soft": [1, 0], "marks": [[0, 1, 3]]}, "spans with numbers as labels, in"),
        ({"weight": 1, "source": "a", "soft": [1, 0], "marks": [[0, 1, 3], [0, 1, "x"]]}, "labels that are texts and"),
    ],
)
def test_a_row_without_a_field_or_of_another_type_is_refused_with_its_line_or_skipped(tmp_path, bad, message):
    bad = {"prompt": "who", "completion": "Ada", **bad}
    with pytest.raises(RecipeError, match=message):
        from_file(tmp_path, [WHOLE[0], bad])
    assert len(from_file(tmp_path, [WHOLE[0], bad, WHOLE[1]], on_bad="skip")) == 2


def test_a_skipped_row_does_not_decide_the_types_of_the_others(tmp_path):
    bad = {"prompt": "who", "completion": "Ada", "weight": "x", "soft": [1, 0], "source": "a"}  # marks are missing
    rows = from_file(tmp_path, [bad, *WHOLE], on_bad="skip")
    assert [r.key.rpartition(":")[2] for r in rows] == ["2", "3", "4"]


@pytest.mark.parametrize("bad", [True, 1e39, -1e39, 2**63, [0.5, False], {}])
def test_what_no_tensor_holds_is_refused(bad):
    with pytest.raises(RecipeError, match="f:1: n is .*a kept field holds a finite number"):
        prepared([Row("f:1", values(n=bad))], Carried(("n",)))


def test_the_digest_follows_labels_classes_and_the_edges_of_rows():
    texts = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    turned = [{"text": "good", "label": "no"}, {"text": "bad", "label": "yes"}]
    maker = ClassRows({"no": 0, "yes": 1})
    digests = {
        prepared([Row(f"f:{i}", v) for i, v in enumerate(x)], Carried(), maker=maker).digest for x in (texts, turned)
    }
    renderer = Renderer(byte_tokenizer(), plain=True)
    for prompt, completion in (("ab", "cd"), ("abc", "d")):
        row = Row("f:1", {"prompt": prompt, "completion": completion})
        digests.add(prepared([row], Carried(), renderer).digest)
    assert len(digests) == 4


def test_a_fill_stands_for_what_is_missing(tmp_path):
    carried = KEEP._replace(fill={"weight": 1.0, "marks": [], "source": "none", "soft": [0, 1]})
    done = prepared(from_file(tmp_path, [WHOLE[0], values(), values(weight=None)], carried), carried).rows
    assert [r["row"]["weight"] for r in done] == [2.0, 1.0, 1.0] and done[1]["text"]["source"] == "none"
    assert done[1]["row"]["soft"].tolist() == [0, 1] and not len(done[2]["span"]["marks"])


def test_numbers_of_a_csv_file_are_numbers(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,completion,weight,source\na,b,2,x\nc,d,0.5,y\n")
    rows, _ = read("d.csv", {}, tmp_path, carried=Carried(("weight", "source")))
    assert [r["row"]["weight"] for r in prepared(rows, Carried(("weight", "source"))).rows] == [2.0, 0.5]
    (tmp_path / "d.csv").write_text("prompt,completion,weight\na,b,2\nc,d,\n")
    with pytest.raises(RecipeError, match=r"d\.csv:3: has no field 'weight'"):
        read("d.csv", {}, tmp_path, carried=Carried(("weight",)))


def test_other_fields_are_other_rows_in_the_cache(tmp_path):
    rows = from_file(tmp_path, WHOLE)
    digests = {
        prepared(rows, c).digest
        for c in (KEEP, Carried(), Carried(("weight",)), Carried(("weight",), fill={"weight": 2}))
    }
    assert len(digests) == 3, "a fill that no row needs changes nothing"
    plain = prepared(rows, Carried())
    assert plain.rows.columns == [] and plain.rows[0].keys() == {"ids", "labels", "key", "token"}


def test_weights_of_rows_multiply_the_users():
    rows = Rows.of([Row("f:1", values(weight=2)), Row("f:2", values(weight=0.5))])
    heavy = rows.weighing(np.array([3.0, 4.0]))
    assert [r["row"]["weight"] for r in prepared(heavy, Carried(("weight",))).rows] == [6.0, 2.0]
    assert [r["row"]["weight"] for r in prepared(heavy.take(np.array([1])), Carried()).rows] == [4.0]
    assert len({rows.digest, heavy.digest, rows.weighing(np.ones(2)).digest}) == 3
    with pytest.raises(RecipeError, match="f:1: weight is -1; a weight is 0 or more"):
        prepared([Row("f:1", values(weight=-1))], Carried(("weight",)))
    with pytest.raises(RecipeError, match=r"data\.keep: weight is not a number"):
        prepared([Row("f:1", values(weight="heavy"))], Carried(("weight",)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("keep: [label]", r"2: data\.keep: label has a meaning of its own"),
        ("spans: words", r"2: data\.spans: words has a meaning of its own"),
        ("keep: [a, a]", r"2: data\.keep: \['a', 'a'\] names a field twice"),
        ("keep: [a], fill: {b: 1}", r"2: data\.fill: b is not kept"),
    ],
)
def test_a_recipe_that_keeps_what_it_cannot_is_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(f"model: a/b\ndata: {{train: x.jsonl, {data}}}")


# --- spans of characters ---


def bpe(template):
    """A tokenizer whose tokens are pieces of words, with the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["Ada met Bo who was there met there"] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = template
    return fast


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{{ 'met: ' }}{% endif %}{{ m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = "met Ada: met Bo — who?"


def found(tokenizer, row, plain=None, system=None):
    """The characters under each span of tokens, as the tokenizer gives them back."""
    renderer = Renderer(tokenizer, plain=plain, system=system)
    (item,) = prepare([Row("f:1", row)], renderer, carried=Carried(spans="marks"), max_length=200).rows[:]
    return [tokenizer.decode(item["ids"][a:b]) for a, b, _ in item["span"]["marks"]]


@pytest.mark.parametrize("make", [byte_tokenizer, bpe])
@pytest.mark.parametrize("template", [byte_tokenizer().chat_template, THINKING, None])
@pytest.mark.parametrize("shape", ["completion", "messages", "text"])
def test_spans_lie_on_their_words_wherever_the_template_puts_the_answer(make, template, shape):
    marks = [[9, 12, 0], [4, 7, 0], [16, 17, 0]]  # the second "met", not the first; the dash is three bytes
    turns = [
        {"role": "user", "content": TEXT}, {"role": "assistant", "content": "met Ada"},
        {"role": "user", "content": "and?"}, {"role": "assistant", "content": TEXT},
    ]  # fmt: skip
    row = {
        "completion": {"prompt": "met Ada: met", "completion": TEXT}, "messages": {"messages": turns}, "text": {"text": TEXT},
    }[shape]  # fmt: skip
    if template is None and shape == "messages":
        return
    got = found(make(template), {**row, "marks": marks})
    assert [t.strip() for t in got] == ["met", "Ada", "—"]
    assert TEXT[9:12] == "met" and TEXT[16] == "—"


def test_the_first_met_is_not_the_second():
    tokenizer = byte_tokenizer(THINKING)
    renderer = Renderer(tokenizer)
    rows = [Row("f:1", {"prompt": "p", "completion": TEXT, "marks": [[0, 3, 0], [9, 12, 0]]})]
    (item,) = prepare(rows, renderer, carried=Carried(spans="marks"), max_length=200).rows[:]
    (a, _, _), (b, _, _) = item["span"]["marks"].tolist()
    text = tokenizer.decode(item["ids"])
    assert len(tokenizer.decode(item["ids"][:a])) == text.index("met: met Ada") + 5 and b - a == 9


def test_a_first_token_of_the_renderers_moves_spans():
    tokenizer = byte_tokenizer(None)
    tokenizer.bos_token, tokenizer.add_bos_token = "<|im_start|>", True
    assert found(tokenizer, {"text": TEXT, "marks": [[4, 7, 0]]}) == ["Ada"]


def test_spans_of_a_classification_row_count_its_special_tokens():
    rows = [Row("f:1", {"text": "a bad film", "label": "no", "marks": [[2, 5, 7]]})]
    tokenizer = byte_tokenizer()
    done = prepare(
        rows, Renderer(tokenizer), carried=Carried(spans="marks"), max_length=50, maker=ClassRows({"no": 0})
    ).rows
    ((a, b, kind),) = done[0]["span"]["marks"].tolist()
    assert tokenizer.decode(done[0]["ids"][a:b]) == "bad" and kind == 7 and done[0]["row"] == {"label": 0}


def test_spans_of_a_text_that_is_trained_on_within_a_prompt_are_refused():
    task = Classification(prompt="{text} ({label})", words={"no": "n", "yes": "y"})
    maker = task.maker(Renderer(byte_tokenizer()), tiny().config, {"no": 0, "yes": 1})
    row = Row("f:1", {"text": "a bad film", "label": "no", "marks": [[2, 5, 7]]})
    with pytest.raises(RecipeError, match="f:1: has spans, but its text is trained on within a prompt"):
        prepared([row], Carried(spans="marks"), maker=maker)


@pytest.mark.parametrize("mark", [[0, 99, 0], [3, 3, 0], [5, 4, 0], [-1, 2, 0]])
def test_a_span_outside_its_answer_is_refused(mark):
    with pytest.raises(RecipeError, match=r"f:1: has the span \[.*its answer has 10 characters"):
        prepared([Row("f:1", values(marks=[mark]))], Carried(spans="marks"))


def test_a_template_that_changes_the_answer_and_a_row_without_one_are_refused():
    trimming = byte_tokenizer().chat_template.replace("m['content']", "m['content'] | trim")
    row = {"prompt": "p", "completion": " Ada ", "marks": [[1, 4, 0]]}
    with pytest.raises(RecipeError, match="f:1: has spans, but the chat template changes its answer's text"):
        found(byte_tokenizer(trimming), row)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(RecipeError, match="f:1: has spans, but does not end in an answer"):
        found(byte_tokenizer(), {"messages": turns, "marks": [[0, 1, 0]]})


def test_tokens_that_hold_any_character_are_covered():
    offsets = [(0, 3), (3, 7), (7, 7), (7, 9)]
    assert covering(offsets, 0, 3) == (0, 1) and covering(offsets, 2, 4) == (0, 2)
    assert covering(offsets, 7, 8) == (3, 4) and covering(offsets, 9, 12) is None


# --- in a batch ---


def items():
    return [
        {"ids": [5, 6, 7, 8], "labels": [IGNORE, 6, 7, 8], "key": "a", "row": {"n": 3, "v": [0.5, 1.0]},
         "token": {"w": [0.1, 0.2, 0.3, 0.4], "kind": [0, 1, 1, 2]}, "span": {"m": [(1, 3, 7)]}},
        {"ids": [9, 4], "labels": [IGNORE, 4], "key": "b", "row": {"n": 4, "v": [2.0, 3.0]},
         "token": {"w": [1.0, 2.0], "kind": [5, 6]}, "span": {"m": []}},
        {"ids": [3, 2, 1], "labels": [IGNORE, 2, 1], "key": "c", "row": {"n": 5, "v": [4.0, 5.0]},
         "token": {"w": [3.0, 4.0, 5.0], "kind": [7, 8, 9]}, "span": {"m": [(0, 1, 8), (1, 3, 9)]}},
    ]  # fmt: skip


def listed(spans):
    return [tuple(int(n) for n in s) for s in zip(*spans, strict=True)]


def test_collation_shifts_spans_to_their_sequences():
    batch = collate(items())
    assert listed(batch.span["m"]) == [(0, 1, 3, 7), (2, 6, 7, 8), (2, 7, 9, 9)]
    assert batch.token["w"].dtype == torch.float32 and batch.token["kind"].tolist() == [0, 1, 1, 2, 5, 6, 7, 8, 9]
    assert batch.row["n"].tolist() == [3, 4, 5] and batch.row["v"].shape == (3, 2)
    same = batch.to("cpu").with_columns(row={"z": torch.zeros(3)}, span={"other": batch.span["m"]})
    assert listed(same.span["m"]) == listed(same.span["other"]) == listed(batch.span["m"]) and "z" in same.row


@pytest.mark.parametrize("level", ["row", "token", "span"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_sequence_without_a_column_of_the_others_is_named(level, which):
    rows = items()
    lost = min(rows[which][level])
    del rows[which][level][lost]
    with pytest.raises(
        LuthierError, match=f"{rows[which]['key']}: has no {level} column '{lost}', which other rows have"
    ):
        collate(rows)


def test_selected_rows_keep_their_columns_and_spans():
    out = collate(items()).select(torch.tensor([0, 2]))
    assert listed(out.span["m"]) == [(0, 1, 3, 7), (1, 4, 5, 8), (1, 5, 7, 9)]
    assert out.row["n"].tolist() == [3, 5] and out.token["kind"].tolist() == [0, 1, 1, 2, 7, 8, 9]


def test_spans_follow_dropped_tokens():
    batch = collate(items())
    keep = torch.ones(9, dtype=torch.bool)
    keep[1] = False  # predicts token 2, the last of the first span
    keep[7] = False  # predicts token 8, the last of the third
    out = batch.select(torch.tensor([0, 1, 2]), keep, drop=True)
    assert out.ids.tolist() == [5, 6, 8, 9, 4, 3, 2]
    assert listed(out.span["m"]) == [(0, 1, 2, 7), (2, 5, 6, 8), (2, 6, 7, 9)]
    keep[6] = False  # the third span's other token
    keep[0] = False  # the first span's other token
    gone = batch.select(torch.tensor([0, 2]), keep, drop=True)
    assert gone.ids.tolist() == [5, 8, 3] and listed(gone.span["m"]) == [(1, 2, 3, 8)]


@pytest.mark.parametrize("name", ["w", "kind"])
def test_columns_of_tokens_in_both_layouts(name):
    batch = collate(items())
    rectangle = pad(batch.token[name], batch, -1)
    assert (
        rectangle.shape == (3, 4)
        and rectangle.dtype == batch.token[name].dtype
        and rectangle[1, 2:].tolist() == [-1, -1]
    )
    assert torch.equal(unpad(rectangle, batch), batch.token[name])
    vectors = torch.stack([batch.token["w"], batch.token["w"] * 2], 1)  # [T, 2]
    assert torch.equal(unpad(pad(vectors, batch), batch), vectors)


# --- cut, and added by methods ---


def test_cutting_cuts_columns_and_spans_alike():
    item = {
        "ids": list(range(30)), "labels": [IGNORE] * 20 + list(range(20, 30)), "key": "k",
        "token": {"prompt": [1] * 20 + [0] * 10, "at": list(range(30))},
        "span": {"m": [(0, 2, 0), (5, 9, 1), (6, 12, 2), (11, 14, 3), (20, 25, 4), (28, 30, 5)]},
    }  # fmt: skip
    for how in ("trim_prompt", "trim_end"):
        short = shortened(item, 24, how)
        assert short["token"]["at"] == short["ids"] and len(short["ids"]) == 24
        left = {kind: short["ids"][a:b] for a, b, kind in short["span"]["m"]}
        whole = {kind: list(range(a, b)) for a, b, kind in item["span"]["m"]}
        expected = {k: [i for i in v if i in short["ids"]] for k, v in whole.items()}
        assert left == {k: v for k, v in expected.items() if v}
    assert set(range(6)) - left.keys() == {5}


def test_a_row_that_is_cut_keeps_its_spans_through_the_store(tmp_path):
    rows = from_file(tmp_path, [{**WHOLE[0], "prompt": "who " * 20}])
    whole, cut = (prepared(rows, max_length=n, on_long="trim_prompt").rows[0] for n in (200, 60))
    assert len(cut["ids"]) == 60 and [words(cut, s) for s in cut["span"]["marks"]] == ["Ada", "met"]
    assert len(whole["ids"]) > 60
    labelled = [Row("f:1", {"text": "a bad film, a long one", "label": "no", "marks": [[2, 5, 1], [18, 22, 2]]})]
    done = prepare(
        labelled, Renderer(byte_tokenizer()), carried=Carried(("text",), "marks"), max_length=10, on_long="trim_end",
        maker=ClassRows({"no": 0}),
    ).rows  # fmt: skip
    assert [words(done[0], s) for s in done[0]["span"]["marks"]] == ["bad"] and len(done[0]["ids"]) == 10


def test_a_method_adds_typed_columns(tmp_path):
    rows = prepared(from_file(tmp_path, WHOLE)).rows
    history = [np.arange(n, dtype=np.float32) / 2 for n in rows.lengths]
    kinds = [np.arange(n) for n in rows.lengths]
    more = rows.with_columns(token={"history": history, "kinds": kinds}, row={"hard": np.array([0.1, 0.2, 0.3])})
    batch = collate(more[:])
    assert torch.equal(batch.token["history"], torch.cat([torch.from_numpy(h) for h in history]))
    assert batch.token["kinds"].dtype == torch.int64 and batch.row["hard"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert batch.row["weight"].tolist() == [2.0, 0.5, 1.0] and listed(batch.span["marks"])
    again = more.with_columns(row={"hard": np.array([[1, 2], [3, 4], [5, 6]])})
    assert collate(again[:]).row["hard"].tolist() == [[1, 2], [3, 4], [5, 6]] and len(again.columns) == len(
        more.columns
    )
    with pytest.raises(LuthierError, match=r"d\.jsonl:2: column 'history' has shape \[3\], the row has"):
        rows.with_columns(token={"history": [history[0], np.zeros(3), history[2]]})


def test_rows_of_several_parts_are_one_set():
    a, b = Rows.of([Row("a:1", {"n": 1}), Row("a:2", {"n": 2})]), Rows.of([Row("b:1", {"n": 3})])
    both = Rows.joined([a, b])
    assert [r.key for r in both] == ["a:1", "a:2", "b:1"] and both[-1].values == {"n": 3} and both[1].key == "a:2"
    some = Rows.joined([a.take(np.array([1])), b, a])
    assert [r.key for r in some] == [some[i].key for i in range(4)] == ["a:2", "b:1", "a:1", "a:2"]
    assert len({both.digest, some.digest, a.digest, Rows.joined([b, a]).digest}) == 4 and Rows.joined([a]) is a


def test_spans_of_a_mask():
    spans = Spans(*torch.arange(12).view(4, 3))
    assert listed(spans.where(torch.tensor([True, False, True]))) == [(0, 3, 6, 9), (2, 5, 8, 11)]


def test_equal_rows_of_another_file_keep_their_own_keys(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = from_file(tmp_path / name, WHOLE)
        assert [r["key"] for r in prepared(rows).rows] == [f"{tmp_path}/{name}/d.jsonl:{i}" for i in (1, 2, 3)]
