"""The matrix of what combines with what says what `luthier check` says, and what it allows runs."""

import json
from pathlib import Path

import pytest

from helpers.commands import luthier, rows, write
from luthier.cli import matrix as combined
from luthier.cli.docs import FOLDER
from luthier.evaluation import lm_eval
from luthier.method import registry
from luthier.recipe.text import as_yaml
from luthier.run.execute import run
from luthier.testing.models import byte_tokenizer, tiny, tiny_classifier, word_tokenizer


@pytest.fixture(scope="module")
def pairs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "names_of_lm_eval", lambda: ["hellaswag"])
        yield combined.matrix(registry.read())


def why(pairs, one, other):
    (found,) = [p.why for p in pairs if {p.one.name, p.other.name} == {one, other}]
    return found


def test_the_page_is_what_the_checks_say(pairs, monkeypatch):
    monkeypatch.setattr(combined, "matrix", lambda listed: pairs)
    assert (FOLDER.parent / "combinations.md").read_text(encoding="utf-8") == combined.page(), "run make docs"


def test_every_pair_of_kinds_is_there_once(pairs):
    named = [m for m in registry.read() if m["kind"] not in ("merge", "inspect", "translate")]
    kinds = [m["kind"] for m in named] + ["setting"] * len(combined.SETTINGS)
    assert len(pairs) == sum(a != b for i, a in enumerate(kinds) for b in kinds[i + 1 :])
    assert len({(p.one[:2], p.other[:2]) for p in pairs}) == len(pairs)


PLAIN = "reads or writes the weights themselves, and this model's are packed in 4 or 8 bits"
REFUSED = [
    ("spiel", "quantize: nf4", {"tuner": "spiel", "quantize": "nf4"}, PLAIN),
    ("adapter", "one-shot", {"tuner": "adapter", "collaborate": "one-shot"}, "update of adapter cannot be averaged"),
    ("lora", "seed-rounds", {"collaborate": "seed-rounds"}, "sends no seeds; set tuner: fedkseed"),
    ("otr", "one-shot", {"objective": "otr", "collaborate": "one-shot"}, "is not read by collaborations"),
    ("frozen", "otr", {"tuner": "frozen", "objective": "otr"}, "nothing trains: otr adds no trained modules"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "keys", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_refused_pair_is_refused_by_check_in_the_same_words(one, other, keys, says, pairs, model_folder, tmp_path):
    assert says in why(pairs, one, other)
    path = write(tmp_path, model_folder, evaluate=[], output_dir=None, **keys)
    if "collaborate" in keys:
        path.write_text(path.read_text().replace("eval: eval.jsonl", ""))
    done = luthier("check", path, "--no-forecast", cwd=tmp_path)
    assert done.returncode == 2 and says in " ".join(done.stderr.split())


def test_known_pairs(pairs):
    for one, other in (("lora", "q-tuning"), ("caft", "spiel"), ("fedkseed", "seed-rounds"), ("list", "loss"),
                       ("retrieval", "lora"), ("lora", "quantize: nf4"), ("frozen", "distill"), ("stages", "hft")):  # fmt: skip
        assert why(pairs, one, other) is None, (one, other)
    assert why(pairs, "dept", "distill") == why(pairs, "otr", "masked-lm") == combined.OTHER_TASK
    assert "is not read beside pipeline list; remove it" in why(pairs, "lora", "list")
    assert "is not read beside pipeline stages; remove it" in why(pairs, "lemo", "stages")
    assert why(pairs, "lemo", "padded layout") == "it cannot use the padded layout"
    assert why(pairs, "fedkseed", "two processes").startswith("it runs in one process, but there are 2")


def test_the_command_prints_the_pairs_of_one_method(tmp_path):
    told = json.loads(luthier("methods", "lemo", "--matrix", "--json", cwd=tmp_path).stdout)
    assert all("lemo" in [p["name"] for p in pair["of"]] for pair in told)
    one = next(p for p in told if {"kind": "setting", "name": "padded layout"} in p["of"])
    assert (one["works"], one["why"]) == (False, "it cannot use the padded layout")
    said = luthier("methods", "lemo", "--matrix", cwd=tmp_path).stdout
    assert "compute and setting" in said and "1: it cannot use the padded layout" in said and "✓" in said
    refused = luthier("methods", "norms", "--matrix", cwd=tmp_path)
    assert refused.returncode == 2 and "no recipe names norms" in refused.stderr


TRAINING = ("tuner", "objective", "compute", "curate", "pipeline", "decode")
ROWS = {
    "causal-lm": [{**r, "weight": 1.0} for r in rows(12)],
    "classification": [{"text": f"say {i}", "label": ("bad", "good")[i % 2], "soft": [0.5, 0.5]} for i in range(12)],
    "masked-lm": [{"text": f"the cat number {i} says what it says"} for i in range(12)],
}


@pytest.fixture(scope="module")
def places(model_folder, tmp_path_factory):
    """A folder for each task, with a model and rows."""
    out = {}
    for task, found in ROWS.items():
        out[task] = folder = tmp_path_factory.mktemp(task)
        if task == "masked-lm":
            words = word_tokenizer()
            tiny("bert", vocab_size=len(words)).save_pretrained(folder / "model")
            words.save_pretrained(folder / "model")
        elif task == "classification":
            tiny_classifier().save_pretrained(folder / "model")
            byte_tokenizer().save_pretrained(folder / "model")
        else:
            (folder / "model").symlink_to(model_folder)
        (folder / "causal").symlink_to(model_folder)
        for name in ("train", "eval", "test", "pool"):
            lines = found if name != "pool" else [{"text": r["text"]} for r in ROWS["masked-lm"]]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return out


@pytest.mark.soak
def test_what_is_allowed_trains(pairs, places, tmp_path):
    """One step of every pair of methods that change training."""
    failed = []
    allowed = [p for p in pairs if p.why is None and p.one.kind in TRAINING and p.other.kind in TRAINING]
    for number, pair in enumerate(allowed):
        task = next(
            t for t in combined._tasks(pair.one, pair.other) if combined._refusal_in(tmp_path, t, *pair[:2]) is None
        )
        recipe = combined.recipe_of(tmp_path, task, pair.one, pair.other)
        values = {**recipe.as_dict(), "model": "model", "evaluate": []}
        values["data"] = {**values["data"], "train": "train.jsonl", "limit": 8}
        values |= {} if recipe.pipeline is None else {"pace": {"max_steps": 1}}
        if pair.one.name == "list" or pair.other.name == "list":  # its texts end in a word of the model's
            words = {"prompt": "{text} is:{label}", "words": {"good": "g", "bad": "b"}}
            values |= {"model": "causal", "task": {"classification": words}}
        try:
            run(recipe_from(values, places[task]), tmp_path / str(number), places[task], forecast=False)
        except Exception as error:
            failed.append(f"{pair.one.name} and {pair.other.name}: {type(error).__name__}: {error}")
    assert allowed and not failed, "\n".join(failed)


def recipe_from(values, folder: Path):
    from luthier import recipe

    return recipe.load(as_yaml(values), base=folder)
