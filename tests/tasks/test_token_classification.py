"""Tags of words: labels, logits and loss are those of transformers' own class; files, head, refusals, and a whole run."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from helpers.words import sentencepiece, unigram
from luthier.data.batch import IGNORE, TYPE_IDS, collate
from luthier.data.prepare import prepare
from luthier.data.reading import read
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Facts
from luthier.model.loading import load_config, load_model, locate
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.forward import Forward
from luthier.step.settings import TrainSettings
from luthier.step.window import count
from luthier.support.errors import RecipeError
from luthier.tasks.token_classification import TokenClassification, lead_of
from luthier.testing.models import byte_tokenizer, tiny, word_tokenizer
from luthier.training.loop import Loop
from luthier.tuners.base import with_head
from luthier.tuners.full import Full
from luthier.tuners.hft import Hft
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel
from luthier.update.files import load, save_update

TAGS = ("B-PER", "I-PER", "O")
WORDS = [
    (["the", "film", "was", "good", "."], ["O", "B-PER", "I-PER", "O", "O"]), (["bad"], ["B-PER"]),
    (["a", "very", "long", "book"], ["O", "O", "B-PER", "O"]), (["the", "day", "saw", "a", "fine", "film"], ["O"] * 6),
]  # fmt: skip
ROWS = [Row(f"f:{i}", {"tokens": w, "tags": t}) for i, (w, t) in enumerate(WORDS, start=1)]
LABELS = {t: i for i, t in enumerate(TAGS)}


def pieces():
    """Words of at most two letters are whole; longer ones have several tokens."""
    letters = sorted(set("".join(w for words, _ in WORDS for w in words)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def encoder():
    return tiny("bert-tagger", layers=2, initializer_range=0.2, vocab_size=97, max_position_embeddings=64), pieces()


def decoder():
    return tiny("llama-tagger", layers=2, initializer_range=0.2, vocab_size=260), byte_tokenizer()


def rendered(tokenizer, rows=ROWS, task=None, max_length=60, labels=LABELS, **more):
    renderer = Renderer(tokenizer)
    maker = (task or TokenClassification()).maker(renderer, tf.BertConfig(), labels)
    return prepare(rows, renderer, max_length=max_length, maker=maker, **more).rows


def usual_labels(tokenizer, spaced, names=LABELS):
    """The labels as transformers' examples make them: the first token of a word has its tag."""
    found, out = tokenizer([list(w) for w, _ in spaced], is_split_into_words=True), []
    for i, (_, tags) in enumerate(spaced):
        before, row = None, []
        for word in found.word_ids(i):
            row.append(names[tags[word]] if word is not None and word != before else IGNORE)
            before = word
        out.append(row)
    return found["input_ids"], out


@pytest.mark.parametrize("make", [encoder, decoder])
def test_labels_logits_and_loss_are_the_models_own(make):
    model, tokenizer = make()
    rows = rendered(tokenizer)
    lead = " " if make is decoder else ""
    ids, labels = usual_labels(tokenizer, [([lead + x for x in w], t) for w, t in WORDS])
    assert [r["ids"] for r in rows] == ids and [r["targets"] for r in rows] == labels
    assert (TYPE_IDS in rows[0]["token"]) == (make is encoder)
    assert len(ids[0]) > len(WORDS[0][0]) + 2, "some words have several tokens"
    width = max(map(len, ids))
    padded = {
        "input_ids": torch.tensor([x + [0] * (width - len(x)) for x in ids]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in ids]),
        "labels": torch.tensor([x + [IGNORE] * (width - len(x)) for x in labels]),
    }
    view, batch = ModelView.probed(model.eval(), tokenizer), collate(rows[:])
    assert view.layout == "flat"
    with torch.no_grad():
        own = model(**padded)
        theirs = torch.cat([own.logits[i, : len(x)] for i, x in enumerate(ids)])
        for layout, singly in (("flat", False), ("padded", False), ("padded", True)):
            view.layout, view.singly = layout, singly
            fwd = Forward(batch, view)
            torch.testing.assert_close(fwd.logits(torch.arange(batch.num_tokens)), theirs, atol=1e-5, rtol=1e-5)
            term = Sft().loss(fwd)["loss"]
            assert float(term.sums / count([batch])[term.over]) == pytest.approx(float(own.loss), abs=1e-5)
            scores = fwd.scores()
            p = theirs[batch.supervised].softmax(-1)
            torch.testing.assert_close(scores.entropy, -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(scores.nll, fwd.nll(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [pieces, word_tokenizer, byte_tokenizer, unigram])
def test_words_have_the_tokens_that_they_have_within_a_text(make):
    tokenizer = make()
    assert lead_of(tokenizer) == (" " if make is byte_tokenizer else "")
    (row,) = rendered(tokenizer, ROWS[3:])
    words = ROWS[3].values["tokens"]
    whole = tokenizer(" " + " ".join(words) if make is byte_tokenizer else " ".join(words))["input_ids"]
    assert row["ids"] == whole
    if make is byte_tokenizer:  # as transformers makes them of a tokenizer that was opened for words
        spaced = byte_tokenizer()
        spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        assert row["ids"] == spaced(words, is_split_into_words=True)["input_ids"]


def test_a_tokenizer_whose_words_have_their_mark_needs_no_space():
    assert lead_of(sentencepiece()) == ""


def test_a_row_that_is_cut_loses_the_tags_of_the_words_that_are_cut_off():
    tokenizer = pieces()
    ids, labels = usual_labels(tokenizer, WORDS)
    for row, whole, tags in zip(rendered(tokenizer, max_length=9, on_long="trim_end"), ids, labels, strict=True):
        n = min(len(whole), 9) - 1
        assert row["ids"] == [*whole[:n], 3] and row["targets"] == [*tags[:n], IGNORE]


def test_a_word_without_tokens_has_no_tag_and_a_row_of_them_is_refused():
    nothing = "\u200d"  # BERT's normaliser removes it
    row = Row("f:1", {"tokens": [nothing, "film"], "tags": ["I-PER", "B-PER"]})
    (made,) = rendered(word_tokenizer(), [row])
    assert [y for y in made["targets"] if y != IGNORE] == [LABELS["B-PER"]]
    with pytest.raises(RecipeError, match="f:1: has no supervised token .none of its words has a token"):
        rendered(word_tokenizer(), [Row("f:1", {"tokens": [nothing], "tags": ["O"]})])


# --- files ---


def found(tmp_path, name="d.jsonl", columns=None, **more):
    rows, told = read(name, columns or {}, tmp_path, shapes=TokenClassification().shapes, **more)
    return rows, [(r.values["tokens"], r.values["tags"]) for r in rows], told


def written(tmp_path, *rows, name="d.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("names", [("tokens", "tags"), ("tokens", "ner_tags"), ("words", "labels"), ("tokens", "upos")])
def test_the_usual_names_of_words_and_tags_are_found(names, tmp_path):
    written(tmp_path, {"id": 3, names[0]: ["a", "b"], names[1]: ["O", "B-X"]})
    rows, values, _ = found(tmp_path)
    assert values == [(["a", "b"], ["O", "B-X"])]
    assert rows.forms == [
        "words and tags" if names == ("tokens", "tags") else f"{names[0]} and {names[1]} (read as words and tags)"
    ]


def test_of_several_tags_the_first_is_read_or_the_mapped_one(tmp_path):
    written(tmp_path, {"tokens": ["a"], "pos_tags": ["DT"], "chunk_tags": ["B-NP"], "ner_tags": ["O"]})
    rows, values, _ = found(tmp_path)
    assert values == [(["a"], ["O"])]
    assert rows.forms == ["tokens and ner_tags (read as words and tags); not read: chunk_tags, pos_tags"]
    assert found(tmp_path, columns={"tags": "pos_tags"})[1] == [(["a"], ["DT"])]


def test_lists_in_cells_of_a_csv_file_are_json(tmp_path):
    (tmp_path / "d.csv").write_text('tokens,tags\n"[""a"", ""b""]","[""O"", ""B-X""]"\n')
    assert found(tmp_path, "d.csv")[1] == [(["a", "b"], ["O", "B-X"])]


def test_names_of_classes_in_a_parquet_file_become_tags(tmp_path):
    import datasets

    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"]))}
    )  # fmt: skip
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "folder")
    assert found(tmp_path, "d.parquet")[1] == found(tmp_path, "folder")[1] == [(["a", "b"], ["B-X", "O"])]


CONLL = """-DOCSTART- -X- -X- O

# id 17 domain=en
EU NNP B-NP B-ORG
rejects VBZ B-VP O

# NN B-NP O
Peter NNP B-NP B-PER
"""


def test_a_conll_file_has_a_word_and_its_tag_on_each_line(tmp_path):
    (tmp_path / "d.conll").write_text(CONLL)
    (tmp_path / "d.bio").write_text("New York\tB-LOC\r\nsleeps\tO\r\n\r\n\r\nnever\tO")
    rows, values, _ = found(tmp_path, "d.conll")
    assert values == [(["EU", "rejects"], ["B-ORG", "O"]), (["#", "Peter"], ["O", "B-PER"])]
    assert [r.key.rpartition(":")[2] for r in rows] == ["4", "7"]
    assert found(tmp_path, "d.bio")[1] == [(["New York", "sleeps"], ["B-LOC", "O"]), (["never"], ["O"])]


def test_a_line_of_a_conll_file_with_other_columns_is_refused_and_its_sentence_skipped(tmp_path):
    (tmp_path / "d.conll").write_text("a O\nb\n\nc B-X\n")
    with pytest.raises(RecipeError, match=r"d.conll:2: has 1 column, not 2; write a word and its tag on each line"):
        found(tmp_path, "d.conll")
    _, values, told = found(tmp_path, "d.conll", on_bad="skip")
    assert values == [(["c"], ["B-X"])] and len(told) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "d.jsonl:2: has 2 words and 1 tags; give each word one tag"),
        ({"tokens": [], "tags": []}, r"d.jsonl:2: tokens is '\[\]'"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "d.jsonl:2: tokens has 3 at place 2"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, "d.jsonl:2: tags has None at place 2"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "d.jsonl:2: tokens is a text that is not JSON"),
        ({"text": "a b", "label": 1}, "d.jsonl:2: has the fields label, text, expected words and tags"),
    ],
)
def test_rows_that_do_not_fit_are_named_by_file_and_line(row, told, tmp_path):
    written(tmp_path, {"tokens": ["a"], "tags": ["O"]}, row)
    with pytest.raises(RecipeError, match=told):
        found(tmp_path)


# --- names of tags, and the head ---


def test_numbers_get_their_names_from_the_recipe():
    task = TokenClassification(tags=("O", "B-PER", "I-PER"))
    rows = [Row("f:1", {"tokens": ["a", "good", "film"], "tags": [0, 1, 2]})]
    labels = task.labels(rows, rows, {})
    assert list(labels) == ["O", "B-PER", "I-PER"]
    (row,) = rendered(word_tokenizer(), rows, task, labels=labels)
    assert row["targets"] == [IGNORE, 0, 1, 2, IGNORE]
    assert task.asked(rows[0], Renderer(word_tokenizer())) == ("a good film", "O B-PER I-PER")


@pytest.mark.parametrize(
    ("tags", "given", "told"),
    [
        (None, [3], "f:1: has the tag 3, a number without a name; name them in order: task.token-classification.tags"),
        (("O", "B-X"), [2], "f:1: has the tag 2, and task.token-classification.tags names 2, from 0 on"),
        (("O", "B-X"), [-1], "f:1: has the tag -1"),
        (("O", "B-X"), ["B-Y"], "f:1: has the tag 'B-Y', which task.token-classification.tags does not name"),
    ],
)
def test_tags_without_a_name_are_refused(tags, given, told):
    with pytest.raises(RecipeError, match=told):
        TokenClassification(tags=tags).labels([Row("f:1", {"tokens": ["a"], "tags": given})], None, {})


def test_the_order_of_tags_is_the_models_that_of_the_recipe_or_the_alphabets():
    known = {"O": 0, "I-PER": 1, "B-PER": 2, "B-LOC": 3}
    assert TokenClassification().labels(ROWS, None, known) == known
    assert list(TokenClassification().labels(ROWS, None, {"LABEL_0": 0})) == ["B-PER", "I-PER", "O"]
    assert list(TokenClassification(tags=("O", "I-PER", "B-PER")).labels(ROWS, None, {})) == ["O", "I-PER", "B-PER"]


def saved(folder, kind, tags):
    names = {"id2label": dict(enumerate(tags)), "label2id": {n: i for i, n in enumerate(tags)}}
    model = tiny(kind, layers=2, num_labels=len(tags), initializer_range=0.2, **names)
    model.save_pretrained(folder)
    return model


def told(folder, names):
    task, config = TokenClassification(), load_config(locate(str(folder)))
    view = load_model(locate(str(folder)), task.auto(config), labels=names)
    return view.module.classifier.weight, task.head(ROWS, names, config), view.classes


def test_a_head_of_the_same_tags_is_kept_and_others_are_drawn_anew(tmp_path):
    own = saved(tmp_path / "tags", "bert-tagger", TAGS).classifier.weight
    weight, said, classes = told(tmp_path / "tags", list(TAGS))
    assert torch.equal(weight, own) and said == "the model's own" and classes == list(TAGS)
    weight, said, _ = told(tmp_path / "tags", ["B-LOC", "I-LOC", "O"])
    assert not torch.isin(weight, own).any() and said.startswith("a new one, because the model's has other classes")


def test_a_head_for_whole_texts_is_not_taken_for_one_of_tags_nor_the_other_way_round(tmp_path):
    """Their weights have the same names, and the same shapes where there are as many classes."""
    own = saved(tmp_path / "texts", "bert-classifier", TAGS).classifier.weight
    weight, said, _ = told(tmp_path / "texts", list(TAGS))
    assert not torch.isin(weight, own).any() and said == "a new one, because the model's is of another kind"
    bert = saved(tmp_path / "plain", "bert", TAGS)
    assert told(tmp_path / "plain", list(TAGS))[1] == "" and bert.config.architectures == ["BertForMaskedLM"]
    tags = tf.LlamaConfig.from_dict(tiny("llama-tagger").config.to_dict())
    tiny("llama-tagger").save_pretrained(tmp_path / "llama")
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    view = load_model(locate(str(tmp_path / "llama")), AutoModelForSequenceClassification, labels=names)
    stored = load_file(tmp_path / "llama" / "model.safetensors")["score.weight"]
    assert view.module.score.weight.shape == stored.shape == (3, tags.hidden_size)
    assert not torch.isin(view.module.score.weight, stored).any()


def test_what_cannot_be_tagged_is_refused_by_name():
    with pytest.raises(
        RecipeError, match=r"its tokenizer \(ByT5Tokenizer\) does not say which word a token belongs to"
    ):
        TokenClassification().maker(Renderer(tf.ByT5Tokenizer()), tf.BertConfig(), LABELS)
    (problem,) = TokenClassification().check(Facts(task="token-classification", model_config=tf.OPTConfig()))
    assert problem.what == "transformers has no class of opt models that classifies tokens"
    assert not TokenClassification().check(Facts(task="token-classification", model_config=tf.LlamaConfig()))


# --- training ---


TUNERS = {"lora": Lora(rank=2), "full": Full(), "spiel": Spiel(density=0.05, reselect_every=2, window=1), "hft": Hft()}


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_trains_it_and_what_is_merged_opens_with_equal_logits(make, name, tmp_path):
    model, tokenizer = make()
    view, rows = ModelView.probed(model.eval(), tokenizer), rendered(tokenizer)
    before = view.module.get_parameter(view.anatomy.task_head[0]).detach().clone()
    settings = TrainSettings(max_steps=3, batch_size=2, learning_rate=1e-2, warmup_fraction=0.0)
    trainable = with_head(TUNERS[name].attach(view, total_steps=3), view.anatomy.task_head)
    loop = Loop(view, rows, trainable, Sft(), settings)
    losses = [loop.step()["loss"] for _ in range(3)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    view.module.eval()
    ids = torch.tensor([rows[0]["ids"]])
    with torch.no_grad():
        live = view.module(input_ids=ids).logits
    save_update(loop.trainable.update(), tmp_path, view)
    if name == "lora":
        from peft import AutoPeftModelForTokenClassification

        make()[0].save_pretrained(tmp_path / "base")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["task_type"] == "TOKEN_CLS"
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")})
        )
        with torch.no_grad():
            theirs = AutoPeftModelForTokenClassification.from_pretrained(tmp_path).eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs, live, atol=1e-5, rtol=1e-4)
    fresh = make()[0].eval()
    load(tmp_path).merge_into(fresh)
    assert not torch.equal(fresh.get_parameter(view.anatomy.task_head[0]), before)
    fresh.save_pretrained(tmp_path / "merged")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, live, atol=1e-5, rtol=1e-4)


def sentences(count):
    """A name is what stands after "saw"."""
    words = ("book", "film", "day", "good")
    rows = []
    for i in range(count):
        first, other = words[i % 4], words[(i // 4) % 4]
        rows.append((["the", first, "saw", other, "."], ["O", "O", "O", "B-PER", "O"]))
    return "\n\n".join("\n".join(f"{w}\t{t}" for w, t in zip(*row, strict=True)) for row in rows)


def test_tags_are_learnt_shown_asked_and_exported(write, command, tmp_path):
    folder = tmp_path / "model"
    tiny("bert", layers=2, vocab_size=29, max_position_embeddings=64, initializer_range=0.1).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (tmp_path / "train.conll").write_text(sentences(16))
    (tmp_path / "eval.conll").write_text(sentences(4))
    (tmp_path / "r.yaml").write_text(
        f"model: {folder}\ntask: token-classification\ndata: {{train: train.conll, eval: eval.conll}}\ntuner: full\n"
        "max_steps: 25\nbatch_size: 16\nlearning_rate: 1e-2\noutput_dir: out\n"
    )
    checked = command("check", tmp_path / "r.yaml", cwd=tmp_path)
    assert checked.code == 0, checked.err
    assert "train: words and tags" in checked.out
    assert "[CLS]the/Obook/Osaw/Obook/B-PER./O[SEP]" in checked.out.replace(" ", "").replace("\n", "")
    done = command("run", tmp_path / "r.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "out" / "run.json").read_text())["after"]
    assert {n: m["value"] for n, m in after.items() if n != "loss"} == {
        "tag_accuracy": 1.0, "entity_precision": 1.0, "entity_recall": 1.0, "entity_f1": 1.0,
    }  # fmt: skip
    assert "entity f1" in (tmp_path / "out" / "report.html").read_text()
    answered = command("generate", "out", "a day saw the film", "good", cwd=tmp_path)
    assert answered.out.splitlines()[0] == "O O O B-PER O", answered
    exported = command("export", "out", "merged", "--to", "hf", cwd=tmp_path)
    assert exported.code == 0, exported.err
    opened = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert opened.config.id2label == {0: "B-PER", 1: "O"}
    assert "pipeline_tag: token-classification" in (tmp_path / "merged" / "README.md").read_text()
