"""Two texts and a label: the ids and logits are those of `model(**tokenizer(a, b))`, and what is too long is cut as there."""

import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from luthier.data.batch import TYPE_IDS, collate
from luthier.data.prepare import prepare
from luthier.data.reading import read
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.model.features import keys_of
from luthier.model.view import ModelView
from luthier.recipe import load
from luthier.step.forward import Forward
from luthier.support.errors import RecipeError
from luthier.tasks.class_rows import longest_first
from luthier.tasks.classification import Classification
from luthier.testing.models import STEADY, byte_tokenizer, tiny, word_tokenizer

TEXTS = [
    ("the film was good .", "a film"), ("good", "the book was not very good and it was long ."), ("a bad day", "a fine day"),
    ("the film was not very long .", "the book was very short and a film was bad"),
]  # fmt: skip
ROWS = [Row(f"f:{i}", {"text": a, "text_pair": b, "label": i % 3}) for i, (a, b) in enumerate(TEXTS, start=1)]
LABELS = {0: 0, 1: 1, 2: 2}


def bert():
    return tiny("bert-classifier", layers=2, max_position_embeddings=64, initializer_range=0.3), word_tokenizer()


def roberta_tokenizer():
    """Bytes, with RoBERTa's marks: two between the texts, and no types."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    marks = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def roberta():
    tokenizer = roberta_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=200, type_vocab_size=1,
        num_labels=3, **sizes, **STEADY,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.RobertaForSequenceClassification(config), tokenizer


def decoder():
    tokenizer = byte_tokenizer()
    ends = {"max_position_embeddings": 200, "pad_token_id": tokenizer.pad_token_id}
    return tiny("llama-classifier", layers=2, vocab_size=260, num_labels=3, **ends), tokenizer


def slow():
    """Bytes without a fast form, with an end after each text."""
    return None, tf.ByT5Tokenizer()


def rendered(tokenizer, config, rows=ROWS, max_length=200, **more):
    renderer = Renderer(tokenizer)
    maker = Classification().maker(renderer, config, LABELS)
    return prepare(rows, renderer, max_length=max_length, maker=maker, **more).rows


@pytest.mark.parametrize("make", [bert, roberta, decoder])
def test_ids_and_logits_of_pairs_are_the_models_own(make):
    model, tokenizer = make()
    view = ModelView.probed(model.eval(), tokenizer)
    rows = rendered(tokenizer, model.config)
    firsts, seconds = ([t[i] for t in TEXTS] for i in (0, 1))
    given = tokenizer(firsts, seconds)
    assert [r["ids"] for r in rows] == given["input_ids"]
    types = [r.get("token", {}).get(TYPE_IDS) for r in rows]
    assert types == given.get(TYPE_IDS, [None] * 4)
    own = tokenizer(firsts, seconds, padding=True, return_tensors="pt")
    batch = collate(rows[:])
    with torch.no_grad():
        theirs = model(**own).logits
        for layout, singly in (("flat", False), ("padded", False), ("padded", True)):
            view.layout, view.singly = layout, singly
            torch.testing.assert_close(Forward(batch, view).logits(), theirs, atol=1e-5, rtol=1e-5)
        if make is bert:  # the types are read: without them the model says something else
            assert (model(**{**own, TYPE_IDS: 0 * own[TYPE_IDS]}).logits - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("make", [bert, roberta, decoder])
@pytest.mark.parametrize("limit", [3, 4, 5, 9, 10, 13, 14])
def test_what_is_too_long_is_cut_as_the_tokenizer_cuts_it(make, limit):
    model, tokenizer = make()
    limit += tokenizer.num_special_tokens_to_add(pair=True)
    for how in ("trim_end", "trim_prompt"):
        rows = rendered(tokenizer, model.config, max_length=limit, on_long=how)
        assert len(rows) == 4 and max(map(len, (r["ids"] for r in rows))) <= limit
        for row, (a, b) in zip(rows, TEXTS, strict=True):
            own = tokenizer(a, b, truncation=True, max_length=limit)
            assert row["ids"] == own["input_ids"]
            assert TYPE_IDS not in own or row["token"][TYPE_IDS] == own[TYPE_IDS]


@pytest.mark.parametrize("make", [bert, roberta, decoder])
def test_one_text_keeps_its_last_mark_when_it_is_cut(make):
    model, tokenizer = make()
    rows = [Row(r.key, {"text": r.values["text_pair"], "label": 0}) for r in ROWS]
    for row, (_, text) in zip(rendered(tokenizer, model.config, rows, 5, on_long="trim_end"), TEXTS, strict=True):
        assert row["ids"] == tokenizer(text, truncation=True, max_length=5)["input_ids"]


def test_a_tokenizer_without_a_fast_form_makes_and_cuts_pairs():
    _, tokenizer = slow()
    rows = [Row("f:1", {"text": "aab", "text_pair": "aaabbb", "label": 0})]
    (whole,) = rendered(tokenizer, tf.T5Config(), rows)
    assert whole["ids"] == tokenizer("aab", "aaabbb")["input_ids"]
    (cut,) = rendered(tokenizer, tf.T5Config(), rows, 8, on_long="trim_end")
    assert cut["ids"] == tokenizer("aab", "aaa")["input_ids"] and len(cut["ids"]) == 8


@pytest.mark.parametrize(
    ("lengths", "room", "stays"),
    [((3, 9), 20, (3, 9)), ((3, 9), 10, (3, 7)), ((9, 3), 10, (7, 3)), ((9, 8), 10, (5, 5)), ((8, 9), 11, (5, 6)),
     ((9, 8), 11, (6, 5)), ((9, 8), 4, (2, 2)), ((0, 9), 4, (0, 4)), ((4, 4), 0, (0, 0))],
)  # fmt: skip
def test_the_longer_text_is_cut_first(lengths, room, stays):
    assert longest_first(*lengths, room) == stays


def test_no_room_for_the_special_tokens_is_refused_with_their_number():
    model, tokenizer = bert()
    with pytest.raises(RecipeError, match="f:1: its special tokens alone are 3, more than data.max_length = 2"):
        rendered(tokenizer, model.config, max_length=2, on_long="trim_end")


def test_a_second_type_that_the_model_does_not_embed_is_refused():
    config = tf.RobertaConfig(type_vocab_size=1)
    with pytest.raises(RecipeError, match="f:1: its tokenizer gives tokens of the type 1, and the model embeds only 1"):
        rendered(word_tokenizer(), config)
    assert len(rendered(word_tokenizer(), tf.DebertaV2Config(type_vocab_size=0))) == 4  # it embeds none, and reads none


def test_stored_features_of_equal_ids_with_other_types_are_apart():
    one, other = ({"ids": [5, 6, 7], "labels": [-100] * 3, "token": {TYPE_IDS: t}} for t in ([0, 0, 0], [0, 1, 1]))
    plain = {"ids": [5, 6, 7], "labels": [-100] * 3}
    keys = [keys_of(collate([row]))[0] for row in (one, other, plain)]
    assert keys[0] == keys[2] != keys[1]


NAMES = [
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"),
]  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_the_usual_names_of_two_texts_are_found(names, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({names[0]: "a", names[1]: "b", "label": 1, "idx": 7}) + "\n")
    (row,), _ = read("d.jsonl", {}, tmp_path, shapes=Classification().shapes)
    assert row.values == {"text": "a", "text_pair": "b", "label": 1, "idx": 7}


def test_a_mapping_wins_and_the_label_alone_can_be_mapped(tmp_path):
    values = {"premise": "p", "hypothesis": "h", "other": "o", "gold_label": "neutral"}
    (tmp_path / "d.jsonl").write_text(json.dumps(values) + "\n")

    def found(**columns):
        (row,), _ = read("d.jsonl", columns, tmp_path, shapes=Classification().shapes)
        return {n: row.values.get(n) for n in ("text", "text_pair", "label")}

    assert found(label="gold_label") == {"text": "p", "text_pair": "h", "label": "neutral"}
    assert found(text="other", text_pair="premise", label="gold_label")["text_pair"] == "p"
    assert found(text="hypothesis", label="gold_label") == {"text": "h", "text_pair": None, "label": "neutral"}
    with pytest.raises(
        RecipeError, match=r"perhaps with data.columns: \{text: premise, text_pair: hypothesis, label: gold_label\}"
    ):
        found()


def test_tasks_that_read_one_text_refuse_two_by_name(tmp_path):
    gap = Classification(prompt="{text} It was {label}.", words={"a": "good", "b": "bad"})
    for first, second in (("premise", "hypothesis"), ("text", "text_pair")):
        (tmp_path / "d.jsonl").write_text(json.dumps({first: "x", second: "y", "label": "a"}) + "\n")
        for shapes in (gap.shapes, ("text",)):
            with pytest.raises(
                RecipeError, match="d.jsonl:1: is a pair of texts with a label, which this task does not"
            ):
                read("d.jsonl", {}, tmp_path, shapes=shapes)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    model, tokenizer = bert()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(count):
    """Whether both texts say the same: no text alone tells."""
    words = ("good", "bad")
    rows = [(words[i % 2], words[(i // 2) % 2]) for i in range(count)]
    return [{"sentence1": a, "sentence2": b, "label": "same" if a == b else "other"} for a, b in rows]


def test_pairs_are_learnt_shown_and_asked(classifier_folder, write, command, tmp_path):
    """From check to generate: the label needs both texts, so a model that read one of them could not learn it."""
    path = write(
        classifier_folder, {"train": pairs(16), "eval": pairs(4)}, task="classification", tuner="full", max_steps=25,
        batch_size=16, learning_rate=1e-2, report_to="none",
    )  # fmt: skip
    assert isinstance(load(path.read_text()).task, Classification)
    checked = command("check", path, cwd=tmp_path)
    assert checked.code == 0, checked.err
    assert "train: sentence1, sentence2 and label (read as two texts and label)" in " ".join(checked.out.split())
    assert "[CLS]good[SEP]good[SEP]" in checked.out.replace(" ", "")
    done = command("run", path, cwd=tmp_path)
    assert done.code == 0, done.err
    state = json.loads((tmp_path / "out" / "run.json").read_text())
    assert state["after"]["accuracy"]["value"] == 1.0, state.keys()
    asked = [json.dumps({"text": "good", "text_pair": t}) for t in ("good", "bad")]
    answered = command("generate", "out", *asked, cwd=tmp_path)
    assert answered.out.split() == ["same", "other"]
