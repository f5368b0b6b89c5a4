"""The Hub's rules for model cards."""

import pytest

from luthier.report.card import Base, Score, front
from luthier.report.card_rules import faults
from luthier.support.errors import LuthierError
from luthier.tuned.export import push_to_hub


def card(*lines):
    return "\n".join(["---", *lines, "---", "", "# a"])


def test_what_luthier_writes_is_taken():
    scores = [Score("text-generation", "test.jsonl", False, "loss", 1.5)]
    lines = front(
        Base("org/base", "apache-2.0"), "mine", "adapter", True, ("lora",), "text-generation", ["org/data"], scores
    )
    assert faults("\n".join([*lines, "", "# mine"])) == []
    named = "\n".join(front(Base("base", "My Licence 2"), "mine", "finetune", False, ()))
    assert "license: other" in named and "license_name: my-licence-2" in named
    assert faults(named) == []


@pytest.mark.parametrize(
    "text, fault",
    [
        ("# no front matter", "it has no front matter"),
        (card("a: [1"), "its front matter is no YAML"),
        (card("- a"), "its front matter holds no keys"),
        (card("license: mine"), "license 'mine' is not one of the Hub's; write other, with license_name"),
        (card("license: other"), "license other needs license_name"),
        (card("base_model: /home/me/model"), "base_model '/home/me/model' is no id of the Hub"),
        (card("base_model: [a/b, a/b/c]"), "base_model 'a/b/c' is no id of the Hub"),
        (card("datasets: [a b]"), "datasets 'a b' is no id of the Hub"),
        (card("base_model_relation: child"), "base_model_relation 'child' is none of adapter"),
        (card("tags: [a, 3]"), "tags 3 is no text"),
        (card("model-index: [{results: []}]"), "model-index needs the name of the model"),
        (card("model-index: [{name: a, results: [{task: {type: t}, metrics: []}]}]"), "a result in model-index needs task.type"),
        (card("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: "
              "[{type: loss, value: .nan}]}]}]"), "a metric in model-index needs a type and a number"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_found(text, fault):
    found = faults(text)
    assert len(found) == 1 and found[0].startswith(fault)


def test_a_bad_card_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the Hub was asked"))
    (tmp_path / "README.md").write_text(card("license: mine", "tags: [3]"))
    with pytest.raises(
        LuthierError, match=r"README.md: the Hub refuses it: license 'mine' .*; tags 3 is no text; correct it"
    ):
        push_to_hub(tmp_path, "me/mine")
    (tmp_path / "README.md").unlink()
    with pytest.raises(LuthierError, match="there is no model card"):
        push_to_hub(tmp_path, "me/mine")
