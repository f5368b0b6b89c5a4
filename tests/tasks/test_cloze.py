"""Classification by a word in a gap: rows, words, logits, and LiST's whole procedure from a recipe."""

import json

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForMaskedLM

from luthier import recipe as recipes
from luthier.cli.listing import starter
from luthier.data.batch import collate
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Facts, registry
from luthier.step.forward import Forward
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks import Classification
from luthier.tasks.cloze import Cloze, word_id
from luthier.testing.models import byte_tokenizer, tiny, view_of, word_tokenizer

PROMPT, WORDS = "{text} It was {label}.", {"good": "great", "bad": "terrible"}
MASK, GREAT, TERRIBLE = (word_tokenizer().get_vocab()[w] for w in ("[MASK]", "great", "terrible"))
LABELS = {"bad": 0, "good": 1}
KINDS = ["bert", "roberta", "llama"]


def task_of(prompt=PROMPT, words=WORDS):
    return Classification(prompt=prompt, words=words)


def text(i):
    """One word tells the class, the last ones the number."""
    number = " ".join(("on", "in")[int(bit)] for bit in f"{i:06b}"[:5])
    return f"the {('film', 'book', 'day')[i % 3]} was {'liked' if i % 2 else 'long'} . {number}"


def labelled(n, start=0):
    return [{"text": text(i), "label": "good" if i % 2 else "bad"} for i in range(start, start + n)]


def rendered(config, values, tokenizer=None, task=None, **fit):
    renderer = Renderer(tokenizer or word_tokenizer())
    maker = (task or task_of()).maker(renderer, config, LABELS)
    sources = [Row(f"f.jsonl:{i}", v) for i, v in enumerate(values, 1)]
    return prepare(sources, renderer, maker=maker, **{"max_length": 64, **fit}).rows


# --- rows ---


def test_the_gap_and_the_text_are_found_wherever_they_stand():
    assert Cloze("{text} It was {label}.", "<m>").filled("ab") == ("ab It was <m>.", (0, 2), (10, 13))
    assert Cloze("{label}: {text}", "<m>").filled("ab") == ("<m>: ab", (5, 7), (0, 3))
    assert Cloze("{text} It was {label}.", None).filled("ab") == ("ab It was", (0, 2), (9, 9))
    assert Cloze("A {text}\nClass: {label} now", None).filled("{label}") == ("A {label}\nClass:", (2, 9), (16, 16))


def test_an_encoders_row_has_a_mask_in_the_gap_and_a_decoders_ends_before_it():
    values = [{"text": "the film", "label": "good"}, {"text": "a book [MASK] zebra", "label": "bad"}]
    tokenizer = word_tokenizer()
    word = tokenizer.get_vocab()
    for kind, end in (("bert", [MASK, word["."], word["[SEP]"]]), ("llama", [])):
        rows = list(rendered(tiny(kind).config, values))
        assert [r["ids"] for r in rows] == [
            [word["[CLS]"], *(word.get(w, word["[UNK]"]) for w in said.split()), *end]
            for said in ("the film it was", "a book [MASK] zebra it was")
        ]
        assert [r["row"]["label"] for r in rows] == [1, 0]
        assert all(r["row"]["words"] == [TERRIBLE, GREAT] for r in rows)
        assert [r["row"]["slot"] for r in rows] == ([5, 7] if kind == "bert" else [4, 6])
        if kind == "bert":
            assert all(r["ids"][r["row"]["slot"]] == MASK for r in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_logits_are_the_models_own_at_the_gap_for_the_words(kind, layout):
    view = view_of(kind, vocab_size=len(word_tokenizer()), layers=2, initializer_range=0.2)
    if kind != "roberta":
        view.layout = layout
    with torch.no_grad():
        for name, p in view.module.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    rows = list(rendered(view.module.config, [*labelled(4), {"text": "good", "label": "bad"}]))
    ours = Forward(collate(rows), view).logits()
    assert ours.shape == (5, 2)
    for mine, row in zip(ours, rows, strict=True):
        ids = row["ids"]
        at = ids.index(MASK) if kind != "llama" else len(ids) - 1
        theirs = view.module(input_ids=torch.tensor([ids])).logits[0, at, [TERRIBLE, GREAT]]
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_long_text_is_cut_and_the_sentence_stays_whole():
    tokenizer = word_tokenizer()
    words = tokenizer.get_vocab()
    values = [{"text": "the a it was is not very film book day", "label": "good"}]
    cases = [
        ("bert", PROMPT, 5, "[CLS] the a it was [MASK] . [SEP]", "[CLS] book day it was [MASK] . [SEP]"),
        ("llama", PROMPT, 4, "[CLS] the a it was", "[CLS] book day it was"),
        ("bert", "{label} : {text}", 1, "[CLS] [MASK] [UNK] the a [SEP]", "[CLS] [MASK] [UNK] book day [SEP]"),
    ]
    for kind, prompt, slot, at_the_end, at_the_start in cases:
        for how, said in (("trim_end", at_the_end), ("trim_prompt", at_the_start)):
            ids = [words[w] for w in said.split()]
            (row,) = rendered(tiny(kind).config, values, task=task_of(prompt), max_length=len(ids), on_long=how)
            assert (row["ids"], row["row"]["slot"]) == (ids, slot), (kind, how)
    with pytest.raises(RecipeError, match=r"f.jsonl:1: the prompt alone has 6 tokens, more than data.max_length = 5"):
        rendered(tiny("bert").config, values, max_length=5, on_long="trim_end")
    (row,) = rendered(tiny("bert").config, [{"text": "", "label": "bad"}])
    assert row["row"]["slot"] == 3


# --- words ---


def test_a_word_is_the_token_that_it_is_behind_its_stem():
    tokenizer = byte_tokenizer()  # a space before a word is a part of its first token
    space = tokenizer.get_vocab()["Ġ"]
    assert word_id(tokenizer, "x was: ", "", "a") == space
    assert word_id(tokenizer, "x (", "b", "a") == tokenizer.get_vocab()["b"]
    with pytest.raises(RecipeError, match=r"words.good: 'great' is not one token for this model, it is 'Ġ g r e a t'"):
        word_id(tokenizer, "x was ", "great", "good")
    with pytest.raises(RecipeError, match=r"'h' is not one token"):  # it melts into what stands before it: "th"
        word_id(tokenizer, "x t", "h", "good")
    with pytest.raises(RecipeError, match=r"words.bad: 'zebra' is not one token for this model, it is '\[UNK\]'"):
        word_id(word_tokenizer(), "x it was ", "zebra", "bad")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": PROMPT}, "prompt and words are read together"),
        ({"words": WORDS}, "prompt and words are read together"),
        ({"prompt": "It was {label}.", "words": WORDS}, r"prompt: .*write {text} and {label} once each"),
        ({"prompt": "{text} {label} {label}", "words": WORDS}, "once each"),
        ({"prompt": "{text} {label} {other}", "words": WORDS}, "once each"),
        ({"prompt": PROMPT, "words": {"good": "great"}}, r"words: .*at least two labels"),
        ({"prompt": PROMPT, "words": {"good": "great", "bad": "great"}}, "a different word to each"),
        ({"promt": PROMPT}, "did you mean prompt"),
    ],
)
def test_a_wrong_prompt_is_refused_by_key(fields, words):
    tree = {"model": "a/b", "data": {"train": "x.jsonl"}, "task": {"classification": fields}}
    with pytest.raises(RecipeError, match=rf"task\.classification.*{words}"):
        recipes.load(json.dumps(tree))


def test_words_and_labels_belong_together():
    rows = [Row("f:1", {"text": "a", "label": "good"}), Row("f:2", {"text": "a", "label": "bad"})]
    assert task_of().labels(rows, rows, {}) == LABELS
    assert Classification(prompt=PROMPT, words={"1": "great", "0": "terrible"}).labels(
        [Row("f:1", {"text": "a", "label": 1}), Row("f:2", {"text": "a", "label": 0})], None, {}
    ) == {0: 0, 1: 1}
    mixed = [Row(f"f:{i}", {"text": "a", "label": label}) for i, label in enumerate([0, "a", "0"])]
    with pytest.raises(RecipeError, match="has the label '0' as text and as a number"):
        Classification().labels(mixed, None, {})
    with pytest.raises(RecipeError, match="f:3: label 'fine' has no word in task.classification.words"):
        task_of().labels([*rows, Row("f:3", {"text": "a", "label": "fine"})], None, {})
    with pytest.raises(RecipeError, match=r"task.classification.words.bad: no training row has this label"):
        task_of().labels(rows[:1], None, {})
    with pytest.raises(RecipeError, match=r"words.bad: 'Great' is the same token as another label's word"):
        task_of(words={"bad": "Great", "good": "great"}).maker(Renderer(word_tokenizer()), tiny("bert").config, LABELS)


def test_a_decoder_cannot_read_behind_the_gap():
    task, llama, bert = task_of("{label}: {text}"), tiny("llama").config, tiny("bert").config
    (problem,) = task.check(Facts(task="classification", model_config=llama))
    assert problem.key == "prompt" and "a llama model reads only up to the gap" in problem.what
    assert not task.check(Facts(task="classification", model_config=bert))
    with pytest.raises(RecipeError, match="needs a mask token"):
        task_of().maker(Renderer(byte_tokenizer()), bert, LABELS)


# --- whole runs ---

LIST = {
    "list": {
        "rounds": 1,
        "unlabelled_steps": 10,
        "labelled_epochs": 30,
        "rank": 8,
        "learning_rate": 0.01,
        "init_std": 0.02,
    }
}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_self_training_by_words_from_a_recipe(
    kind, encoder_folder, decoder_folder, write, command, tmp_path, monkeypatch
):
    model = {"encoder": encoder_folder, "decoder": decoder_folder}[kind]
    # Numbers of every size in all three, so that the one word that tells the class is all that differs between classes.
    train, held = ([{"text": text(i), "label": "good" if i % 2 else "bad"} for i in range(k, 60, 5)] for k in (0, 1))
    files = {"train": train, "eval": held, "pool": [{"text": text(i)} for k in (2, 3) for i in range(k, 60, 5)]}
    path = write(model, files, task={"classification": {"prompt": PROMPT, "words": WORDS}}, pipeline=LIST)
    done = command("run", path, cwd=tmp_path)
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["classes"] == ["bad", "good"] and run["after"]["accuracy"]["rows"] == 12
    assert (
        run["after"]["accuracy"]["value"] > 0.9 and run["after"]["loss"]["value"] < 0.7 * run["before"]["loss"]["value"]
    )
    replaced = json.loads((tmp_path / "out/update.json").read_text())["parts"]
    assert "replace" not in {p["kind"] for p in replaced}, "no new head"
    named = json.loads(command("generate", tmp_path / "out", text(1), text(2), "--base", "--json", cwd=tmp_path).out)
    assert [x["answer"] for x in named] == ["good", "bad"] and all(0.5 < x["share"] <= 1 for x in named)
    assert all(x["base"] in LABELS for x in named)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))  # measured anew
    (tmp_path / "out/evaluations.json").unlink()
    scored = json.loads(command("evaluate", tmp_path / "out", "--json", cwd=tmp_path).out)
    assert scored["loss"]["value"] == pytest.approx(run["after"]["loss"]["value"], abs=1e-4)
    checked = json.loads(command("check", path, "--json", cwd=tmp_path).out)
    shown = [piece for piece, _ in checked["rows"][0]]
    assert ("[MASK]" in shown) == (kind == "encoder") and "was" in shown


def test_labels_alone_train_with_lora_and_leave_a_model_that_others_open(encoder_folder, write, command, tmp_path):
    files = {"train": labelled(16), "eval": labelled(8, 20)}
    keys = {"tuner": {"lora": {"rank": 4}}, "epochs": 6, "learning_rate": 0.02, "batch_size": 8}
    path = write(encoder_folder, files, task={"classification": {"prompt": PROMPT, "words": WORDS}}, **keys)
    done = command("run", path, cwd=tmp_path)
    assert done.code == 0 and "no forecast" not in done.err, done.err
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["after"]["accuracy"]["value"] == 1 and run["after"]["loss"]["value"] < run["before"]["loss"]["value"]
    exported = command("export", tmp_path / "out", tmp_path / "hf", cwd=tmp_path)
    assert exported.code == 0, exported.err
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf"), word_tokenizer()
    for row in labelled(4, 40):
        ids = tokenizer(f"{row['text']} It was [MASK].")["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0, ids.index(MASK)]
        assert (logits[GREAT] > logits[TERRIBLE]) == (row["label"] == "good")


def test_a_word_of_several_tokens_ends_a_run_before_training(encoder_folder, write, command, tmp_path):
    words = {"good": "great", "bad": "abysmal"}
    path = write(encoder_folder, {"train": labelled(4)}, task={"classification": {"prompt": PROMPT, "words": words}})
    done = command("run", path, cwd=tmp_path)
    assert done.code and "task.classification.words.bad: 'abysmal' is not one token for this model" in done.err


def test_the_starter_recipe_of_list_runs(encoder_folder, tmp_path, command):
    (entry,) = (e for e in registry.read() if e["name"] == "list")
    tree = YAML().load(starter(entry))
    tree["model"] = encoder_folder
    tree["pipeline"] = {"list": {**LIST["list"], "unlabelled_steps": 4, "labelled_epochs": 1}}
    for key, rows in (("train", labelled(6)), ("eval", labelled(4)), ("pool", [{"text": text(i)} for i in range(8)])):
        (tmp_path / tree["data"][key]).write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (tmp_path / "r.yaml").open("w") as file:
        YAML().dump({**tree, "output_dir": "out"}, file)
    done = command("run", tmp_path / "r.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "done"


def test_a_pool_of_another_task_is_refused():
    tree = {"model": "a/b", "data": {"train": "x.jsonl", "pool": "y.jsonl"}, "pipeline": "list"}
    with pytest.raises(LuthierError, match="list does not work on causal-lm; it works on classification"):
        recipes.load(json.dumps(tree))
