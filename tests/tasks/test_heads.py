"""A classification head that is in the model's files: matched by the names of its classes, or drawn anew and said."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from helpers.commands import luthier, write
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row, Rows
from luthier.model.loading import NEW_POOLER_TOLD, load_config, load_model, locate
from luthier.support.errors import RecipeError
from luthier.tasks.class_rows import ClassRows
from luthier.tasks.classification import Classification
from luthier.testing.architectures import TEXT_CLASS, tiny_config
from luthier.testing.models import byte_tokenizer, tiny
from luthier.tuned.open import open_run

NAMES = ["bad", "fine", "good"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with a head of three named classes."""
    folder = tmp_path_factory.mktemp("three")
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    model = tiny("llama-classifier", vocab_size=260, layers=2, max_position_embeddings=64, num_labels=3, **names)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rows(*labels):
    return [Row(f"rows:{i}", {"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]


def told(folder, *labels):
    """(names of the classes, what is said about the head, the loaded head)."""
    config, task, read = load_config(locate(str(folder))), Classification(), rows(*labels)
    names = [str(n) for n in task.labels(read, None, config.label2id)]
    view = load_model(locate(str(folder)), AutoModelForSequenceClassification, labels=names)
    assert view.classes == names
    return names, task.head(read, names, config), view.module.score.weight.detach()


def test_rows_with_two_of_three_classes_keep_the_head(three):
    own = AutoModelForSequenceClassification.from_pretrained(three).score.weight
    names, said, head = told(three, "good", "bad", "good")
    assert names == NAMES and torch.equal(head, own)
    assert said == "the model's own, with all its classes; no row has fine"
    assert Classification().labels(rows("good", "bad"), None, dict(zip(NAMES, range(3), strict=True)))["good"] == 2
    assert told(three, *NAMES)[1] == "the model's own"


@pytest.mark.parametrize("labels", [("ham", "spam"), ("eggs", "ham", "spam"), ("bad", "fine", "great")])
def test_rows_with_other_classes_get_a_new_head(three, labels):
    own = AutoModelForSequenceClassification.from_pretrained(three).score.weight
    names, said, head = told(three, *labels)
    assert names == list(labels) and said == "a new one, because the model's has other classes: bad, fine, good"
    assert not torch.isin(head, own).any() and 0.01 < head.std() < 0.03 and torch.equal(head, told(three, *labels)[2])


def test_classes_without_names_get_those_of_the_rows(tmp_path):
    model = tiny("llama-classifier", vocab_size=260, num_labels=2)
    model.save_pretrained(tmp_path)
    names, said, head = told(tmp_path, "spam", "ham")
    assert names == ["ham", "spam"] and torch.equal(head, model.score.weight)
    assert said == "the model's own; its classes have no names, so they get those of the rows: ham, spam"
    assert told(tmp_path, "a", "b", "c")[1].startswith("a new one")


def test_a_model_without_a_head_says_nothing(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = load_config(locate(str(tmp_path)))
    assert Classification().head(rows("a", "b"), ["a", "b"], config) == ""


def test_check_and_run_say_what_becomes_of_the_head_and_train(three, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "label": NAMES[i % 2]}) + "\n" for i in range(4))
    )
    (tmp_path / "recipe.yaml").write_text(
        f"model: {three}\ntask: classification\ndata: {{train: train.jsonl}}\ntuner: {{lora: {{rank: 2}}}}\n"
        "max_steps: 1\nbatch_size: 2\n"
    )
    said = "the model's own, with all its classes; no row has good"
    checked, ran = (luthier(c, tmp_path / "recipe.yaml", cwd=tmp_path) for c in ("check", "run"))
    assert (checked.returncode, ran.returncode) == (0, 0), checked.stderr + ran.stderr
    assert f"classification head: {said}" in " ".join(checked.stdout.split())
    assert said in " ".join((ran.stdout + ran.stderr).split())


def test_a_text_that_is_too_long_is_refused_or_cut_before_the_run(three):
    from luthier.data.prepare import prepare
    from luthier.data.rendering import Renderer

    long = [Row("rows:1", {"text": "word " * 30, "label": "bad"})]
    maker = Classification().maker(Renderer(byte_tokenizer()), load_config(locate(str(three))), {"bad": 0})
    with pytest.raises(RecipeError, match="data.max_length: 1 of 1 rows are longer than 64 tokens"):
        prepare(long, Renderer(byte_tokenizer()), max_length=64, maker=maker)
    for how in ("trim_end", "trim_prompt"):
        (cut,) = prepare(long, Renderer(byte_tokenizer()), max_length=64, on_long=how, maker=maker).rows
        assert len(cut["ids"]) == 64


# --- a checkpoint of masked-LM weights, without a pooler ---


@pytest.fixture(scope="module")
def without_pooler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(tiny_config("bert", TEXT_CLASS, vocab_size=260)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def read(folder, **how):
    return load_model(locate(str(folder)), AutoModelForSequenceClassification, labels=["x", "y"], device="cpu", **how)


def test_a_pooler_that_is_not_in_the_files_is_drawn_from_the_seed_and_counts_as_head(without_pooler, caplog):
    with caplog.at_level("WARNING", logger="luthier"):
        one, again, other = (read(without_pooler, seed=s) for s in (1, 1, 2))
    names = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    assert sorted(one.anatomy.task_head) == names and NEW_POOLER_TOLD in caplog.text
    drawn = one.weight("bert.pooler.dense.weight").detach()
    assert float(drawn.std()) == pytest.approx(one.module.config.initializer_range, rel=0.1)
    assert torch.equal(drawn, again.weight("bert.pooler.dense.weight"))
    assert not torch.equal(drawn, other.weight("bert.pooler.dense.weight"))
    assert one.base == other.base  # it does not belong to the base
    stored = AutoModelForMaskedLM.from_pretrained(without_pooler).bert.encoder.layer[0].output.dense.weight
    assert torch.equal(one.weight("bert.encoder.layer.0.output.dense.weight"), stored)


def test_only_a_whole_pooler_of_a_new_head_may_be_missing(without_pooler, tmp_path):
    made = read(without_pooler)
    made.module.save_pretrained(tmp_path / "c")
    assert not load_model(locate(str(tmp_path / "c")), AutoModelForSequenceClassification).anatomy.new_pooler
    tensors = load_file(tmp_path / "c/model.safetensors")
    for left_out, architecture in (
        ("bert.pooler.dense", "BertForSequenceClassification"),
        ("bert.pooler.dense.bias", "BertForMaskedLM"),
    ):
        config = json.loads((tmp_path / "c/config.json").read_text())
        (tmp_path / "c/config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        kept = {n: t for n, t in tensors.items() if not n.startswith(left_out)}
        save_file(kept, tmp_path / "c/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RecipeError, match="lack [12] weights that BertForSequenceClassification needs.*pooler"):
            read(tmp_path / "c")


def test_a_run_trains_a_new_pooler_and_saves_it_for_peft(without_pooler, tmp_path):
    labelled = [{"text": f"say {i}", "label": "xy"[i % 2]} for i in range(8)]
    recipe = write(
        tmp_path,
        str(without_pooler),
        train=labelled,
        held=labelled[:4],
        task="classification",
        evaluate=[],
        max_steps=2,
    )
    done = luthier("run", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"head    {NEW_POOLER_TOLD}" in done.stderr + done.stdout
    told = luthier("check", recipe, "--no-forecast", cwd=tmp_path).stdout
    assert f"classification head: {NEW_POOLER_TOLD}" in " ".join(told.split())
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    pooler = saved["base_model.model.bert.pooler.dense.weight"]
    assert not torch.equal(pooler, read(without_pooler).weight("bert.pooler.dense.weight"))
    base = AutoModelForSequenceClassification.from_pretrained(without_pooler, num_labels=2)
    theirs, ids = PeftModel.from_pretrained(base, tmp_path / "out").eval(), torch.tensor([[5, 9, 30]])
    opened = open_run(tmp_path / "out")
    with torch.no_grad(), opened.update.bind(opened.view):
        torch.testing.assert_close(opened.view.module.eval()(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_labels_are_written_in_one_way_in_training_and_held_out_rows():
    with pytest.raises(
        RecipeError, match=r"rows:0: label 1 is a number, and a text in the training rows; write labels"
    ):
        Classification().labels(rows("0", "1"), rows(1), {})
    with pytest.raises(RecipeError, match="rows:0: label 'x' occurs in no training row; correct the label"):
        Classification().labels(rows("0", "1"), rows("x"), {})


def test_a_text_without_a_token_is_refused():
    """A decoder's tokenizer puts no mark around it, so there would be nothing to read."""
    read = Rows.of([Row("f:1", {"text": "x", "label": "a"}), Row("f:2", {"text": "", "label": "b"})])
    with pytest.raises(RecipeError, match=r"f:2: has no supervised token \(its text is empty\)"):
        prepare(read, Renderer(byte_tokenizer()), max_length=9, maker=ClassRows({"a": 0, "b": 1}))


def test_one_class_is_refused_unless_the_model_knows_others(three):
    config = load_config(locate(str(three)))
    assert len(Classification().labels(rows("good"), None, config.label2id)) == 3
    with pytest.raises(RecipeError, match="data.train: has one class only, 'spam'; add rows of another class"):
        Classification().labels(rows("spam", "spam"), None, config.label2id)
