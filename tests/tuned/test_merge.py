"""`luthier merge`: the merged weights by hand, the folder opened by others, and what is refused before any work."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier as library
from helpers.commands import luthier
from helpers.finished import finished, lora_deltas
from luthier.collaboration.agreement import Rendering
from luthier.federation import outcome
from luthier.inference.generation import generate
from luthier.merging import Linear
from luthier.support.errors import LuthierError
from luthier.testing.models import tiny
from luthier.tuned import merge as module
from luthier.tuned.export import export
from luthier.tuned.merge import merge
from luthier.tuned.open import answers, open_run, scores
from luthier.update import Prompt, Update
from luthier.update.files import save_update


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Two adapters of different rank and scale, and a whole model."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a": finished(folder / "a", model_folder),
        "b": finished(folder / "b", model_folder, tuner={"lora": {"rank": 2, "alpha": 6, "seed": 5}}, seed=3),
        "whole": finished(folder / "whole", model_folder, tuner="full", learning_rate=0.001),
    }


@pytest.fixture
def copies(runs, tmp_path):
    """The two adapters under names of their own, to be changed."""
    return [shutil.copytree(runs[name], tmp_path / name) for name in "ab"]


def base_of(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.mark.parametrize("weights", [None, (0.7, -0.4)])
def test_a_merged_adapter_opened_with_peft_is_the_base_and_the_weighted_changes(runs, model_folder, tmp_path, weights):
    from peft import PeftModel

    result = merge([runs["a"], runs["b"]], tmp_path / "m", Linear(weights=weights))
    assert result["difference"] < 1e-6 and result["folder"] == str(tmp_path / "m")
    first, second = weights or (0.5, 0.5)
    one, two = lora_deltas(runs["a"]), lora_deltas(runs["b"])
    assert one.keys() == two.keys() and len(one) == 14  # seven layers in each of two blocks
    named = json.loads((tmp_path / "m/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == model_folder
    opened = PeftModel.from_pretrained(base_of(named), str(tmp_path / "m")).merge_and_unload().state_dict()
    for name, value in base_of(model_folder).state_dict().items():
        wanted = value + first * one[name] + second * two[name] if name in one else value
        torch.testing.assert_close(opened[name], wanted, atol=1e-6, rtol=0)


def test_a_merged_whole_model_opened_with_transformers_is_the_weighted_sum(runs, model_folder, tmp_path):
    merge([runs["whole"], runs["a"]], tmp_path / "m", Linear(weights=(0.6, 0.3)))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    base, tuned = base_of(model_folder).state_dict(), load_file(runs["whole"] / "model.safetensors")
    low = lora_deltas(runs["a"])
    for name, value in base.items():
        wanted = value + 0.6 * (tuned[name] - value) + 0.3 * low.get(name, torch.zeros(()))
        torch.testing.assert_close(opened[name], wanted, atol=1e-6, rtol=0)
    texts = [AutoTokenizer.from_pretrained(f)("say 7")["input_ids"] for f in (tmp_path / "m", model_folder)]
    assert texts[0] == texts[1]
    assert "\nbase_model_relation: merge\n" in (tmp_path / "m/README.md").read_text()


def test_a_merged_folder_is_used_as_a_runs_is(runs, tmp_path):
    both = [runs["a"], runs["b"]]
    merge(both, tmp_path / "m", Linear(weights=(0.7, 0.3)))
    assert library.load(tmp_path / "m").base.same_base(library.load(runs["a"]).base)
    run, expected = open_run(tmp_path / "m"), Linear(weights=(0.7, 0.3)).merge([library.load(f) for f in both])
    ids = torch.tensor([run.renderer.prompt_ids({"prompt": "say 7"})])
    with expected.bind(run.view):
        logits = run.view.module(input_ids=ids).logits
    with run.update.bind(run.view):
        torch.testing.assert_close(run.view.module(input_ids=ids).logits, logits, atol=1e-6, rtol=0)
    asked = [f"say {i}" for i in range(4)]
    with expected.bind(run.view):
        prompts = [run.renderer.prompt_ids({"prompt": text}) for text in asked]
        said = [c.text for c in generate(run.view, prompts, run.renderer, 4)]
    assert [reply["answer"] for reply in answers(tmp_path / "m", asked, 4)] == said
    on_its_own, on_others = scores(tmp_path / "m", None, tmp_path), scores(runs["a"], None, tmp_path)
    assert on_its_own.keys() == on_others.keys() and on_its_own["loss"] != on_others["loss"]
    assert export(tmp_path / "m", "hf", tmp_path / "hf")["difference"] < 1e-5
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(written(input_ids=ids).logits, logits, atol=1e-5, rtol=0)
    for folder in ("m", "hf"):
        card = (tmp_path / folder / "README.md").read_text()
        assert f"| {runs['a']} |" in card and f"| {runs['b']} |" in card and "[0.7, 0.3]" in card


def test_a_merge_is_a_member_of_another(copies, tmp_path):
    a, b = copies
    merge([a, b], tmp_path / "ab")
    merge([tmp_path / "ab", b], tmp_path / "abb", Linear(weights=(2.0, 1.0)))
    one, two, found = lora_deltas(a), lora_deltas(b), library.load(tmp_path / "abb").dense()
    for name in one:
        torch.testing.assert_close(found[name], one[name] + 2 * two[name], atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "abb/merged.json").read_text())
    assert [m["name"] for m in record["members"]] == ["ab", "b"] and record["asked_as"] == "ab"
    assert record["members"][1]["update"] == library.load(b).digest()


# --- adapters, gifts ---


def test_an_adapter_that_only_peft_knows_counts_as_the_run_it_came_from(copies, tmp_path):
    a, b = copies
    export(b, "peft", tmp_path / "plain")
    assert not (tmp_path / "plain/update.json").exists()
    merge([a, tmp_path / "plain"], tmp_path / "m")
    merge([a, b], tmp_path / "same")
    assert library.load(tmp_path / "m").digest() == library.load(tmp_path / "same").digest()
    export(a, "peft", tmp_path / "bare")
    merge([tmp_path / "bare", tmp_path / "plain"], tmp_path / "n")  # the adapters say where their model is
    assert library.load(tmp_path / "n").digest() == library.load(tmp_path / "same").digest()
    assert len(answers(tmp_path / "n", ["say 7"], 2)) == 1


def named(adapter, place):
    """An adapter that says that its model lies elsewhere."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": place}))


def test_an_adapter_of_a_model_elsewhere_is_compared_by_its_weights(copies, model_folder, tmp_path):
    a, b = copies
    export(b, "peft", tmp_path / "plain")
    shutil.copytree(model_folder, tmp_path / "moved")
    named(tmp_path / "plain", str(tmp_path / "moved"))
    merge([a, tmp_path / "plain"], tmp_path / "m")
    tiny(seed=9, vocab_size=260, layers=2).save_pretrained(tmp_path / "moved")
    with pytest.raises(LuthierError, match=r"plain: belongs to .*moved .* take members of one base"):
        merge([a, tmp_path / "plain"], tmp_path / "n")
    named(tmp_path / "plain", "./nowhere")
    with pytest.raises(LuthierError, match=r"base_model_name_or_path: .*nowhere.*; write where that model lies"):
        merge([a, tmp_path / "plain"], tmp_path / "n")
    named(tmp_path / "plain", "")
    with pytest.raises(LuthierError, match="names no base model"):
        merge([tmp_path / "plain", shutil.copytree(tmp_path / "plain", tmp_path / "again")], tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_what_a_collaboration_gave_is_a_member(copies, model_folder, tmp_path):
    a, b = copies
    gift = tmp_path / "gift"
    save_update(library.load(b), gift)
    given = outcome.Given(
        protocol="one-shot", contract="0" * 64, model=model_folder, base=library.load(b).base,
        rendering=Rendering(system="Count."),
    )  # fmt: skip
    (gift / outcome.FILE).write_text(given.model_dump_json())
    merge([gift, a], tmp_path / "m")
    merge([b, a], tmp_path / "same")
    assert library.load(tmp_path / "m").digest() == library.load(tmp_path / "same").digest()
    assert open_run(tmp_path / "m").renderer.system == "Count." and open_run(tmp_path / "same").renderer.system is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say 3", "completion": "3 3"}\n')
    assert scores(tmp_path / "m", str(rows), tmp_path)["loss"]["value"] > 0  # it holds no rows, and takes ours


# --- refusals ---


def changed(folder, target, **keys):
    """A copy of a run that says other things of itself."""
    shutil.copytree(folder, target)
    state = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**state, **keys}))
    return target


@pytest.fixture
def no_work(monkeypatch):
    """No model and no tensor may be read."""

    def refuse(*args, **keys):
        raise AssertionError("work was begun")

    monkeypatch.setattr("luthier.tuned.open.load_model", refuse)
    monkeypatch.setattr("luthier.tuned.members.load", refuse)
    monkeypatch.setattr("luthier.tuned.members.load_adapter", refuse)


def classifier(a, target, classes):
    changed(a, target, classes=classes)
    text = re.sub(r"task:\n +causal-lm: {}", "task: classification", (target / "recipe.yaml").read_text())
    (target / "recipe.yaml").write_text(text)
    return target


def stranger(a, target):
    """A run of another base, by its hash."""
    shutil.copytree(a, target)
    header = json.loads((target / "update.json").read_text())
    header["base"]["weights"] = "f" * 64
    (target / "update.json").write_text(json.dumps(header))
    return target


def own_form(a, target):
    """An update alone, in a form of luthier's own."""
    target.mkdir()
    save_update(Update(library.load(a).base, (Prompt(torch.zeros(2, 32)),)), target)
    return target


REFUSALS = [
    ("a", "merge: 1 members; name two finished runs or adapters at least"),
    ("a b --set weights=[1]", "merge.linear.weights: 1 weights for 2 updates; give one for each"),
    ("a b --set weihts=[1,2]", "command line: merge.linear.weihts: there is no such key; did you mean weights?"),
    ("a b --set weights=x", 'command line: merge.linear.weights: "x":'),
    ("a b --set weights", "--set 'weights' sets no field; write --set field=value"),
    ("a b --set ~weights", "--set '~weights' sets no field"),
    (
        "a b --method liner",
        "command line: merge.liner: there is no method of merging called 'liner'; did you mean linear?",
    ),
    ("a b --method mine:Mine", "add --allow-code if you trust it"),
    ("a nosuch", "nosuch: is neither a finished run nor an adapter; give the folder of one"),
    ("a empty", "empty: is neither a finished run nor an adapter"),
    ("a ../a/../a", "a: is named twice; name each folder once"),
    ("a stopped", "this run is stopped, not done; finish it with luthier run"),
    ("a scores", "this run kept scores and no weights"),
    ("a other", "other: belongs to .*ffffffffffff.*, a to .*; take members of one base"),
    ("a classes", "classes: was tuned for classification, a for causal-lm; take members of one task"),
    ("classes more", "more: its classes are x, z, those of classes x, y; take members with equal classes"),
    ("form form2", "form: holds an update, and nothing that says where its model is; name a finished run beside it"),
]


@pytest.mark.parametrize(("words", "says"), REFUSALS, ids=[w for w, _ in REFUSALS])
def test_what_cannot_be_merged_is_refused_before_any_work(words, says, copies, tmp_path, no_work):
    a, _ = copies
    (tmp_path / "empty").mkdir()
    changed(a, tmp_path / "stopped", state="stopped")
    changed(a, tmp_path / "scores", kept=False)
    stranger(a, tmp_path / "other")
    classifier(a, tmp_path / "classes", ["x", "y"])
    classifier(a, tmp_path / "more", ["x", "z"])
    own_form(a, tmp_path / "form")
    own_form(a, tmp_path / "form2")
    before = sorted(tmp_path.iterdir())
    words = [f"../{tmp_path.name}/a" if w == "../a/../a" else w for w in words.split()]
    done = luthier("merge", *words, "-o", "m", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert says in done.stderr or re.search(says, done.stderr), done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_finished_folder_is_never_written_over(copies, tmp_path):
    merge(copies, tmp_path / "m")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    with pytest.raises(LuthierError, match="m: holds a merge of a, b already; choose another folder"):
        merge(copies, tmp_path / "m")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == kept
    (tmp_path / "m/merged.json").write_text("{}")
    with pytest.raises(LuthierError, match=r"merged.json: cannot be read .*; merge again"):
        merge(copies, tmp_path / "m")
    for taken in (copies[0], copies[0] / "run.json"):
        with pytest.raises(LuthierError, match=r"(a|run\.json): exists and is not empty"):
            merge(copies, taken)


def test_what_is_no_difference_of_weights_is_refused_by_name(copies, tmp_path):
    own_form(copies[0], tmp_path / "prompt")
    with pytest.raises(LuthierError, match="merge.linear: .*prompt"):
        merge([copies[0], tmp_path / "prompt"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_members_that_cancel_out_leave_nothing(copies, tmp_path):
    a, _ = copies
    shutil.copytree(a, tmp_path / "twin")
    with pytest.raises(LuthierError, match="m: the merged model equals the base, so its members cancel out"):
        merge([a, tmp_path / "twin"], tmp_path / "m", Linear(weights=(1.0, -1.0)))
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))


def test_a_spoilt_write_is_noticed_and_removed(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_update", lambda update, *more: save_update(1.5 * update, *more))
    with pytest.raises(LuthierError, match=r"m: what was written differs from what was merged by .*; it was removed"):
        merge(copies, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))


# --- the command ---

MINE = """
from luthier.merging.base import Merger
from luthier.method import Traits

class Last(Merger):
    \"\"\"Keep the last.\"\"\"
    times: float = 1.0
    \"\"\"How much of it.\"\"\"

    def merge(self, members, lab=None):
        assert lab.view().base.same_base(members[0].base) and len(members) == 2
        return self.times * members[-1]

class Odd(Last):
    \"\"\"Of another task.\"\"\"
    traits = Traits(tasks=frozenset({"classification"}))
"""


def test_the_command_takes_a_method_of_somebody_elses_with_its_fields(copies, tmp_path):
    (tmp_path / "keeping.py").write_text(MINE)
    words = ("merge", "a", "b", "--method", "keeping:Last", "--set", "times=0.5", "--allow-code")
    done = luthier(*words, "--output", "m", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["method"] == {"keeping:Last": {"times": 0.5}} and said["members"] == ["a", "b"]
    two, found = lora_deltas(copies[1]), library.load(tmp_path / "m").dense()
    for name in two:
        torch.testing.assert_close(found[name], 0.5 * two[name], atol=1e-7, rtol=0)
    assert "tags:\n- luthier\n- Last\n" in (tmp_path / "m/README.md").read_text()
    done = luthier("merge", "a", "b", "--method", "keeping:Odd", "--allow-code", "-o", "n", cwd=tmp_path)
    assert done.returncode == 2 and "merge.keeping.task: keeping does not work on causal-lm" in done.stderr


def test_the_command_says_where_it_is_and_methods_names_the_command(copies, tmp_path):
    done = luthier("merge", "a", "b", "-o", "m", "--set", "weights=[1, 2]", cwd=tmp_path)
    assert re.fullmatch(r"m, read back: logits differ by \d\.\de[+-]\d\d\n", done.stdout), done.stderr
    assert json.loads((tmp_path / "m/merged.json").read_text())["method"] == {"linear": {"weights": [1.0, 2.0]}}
    shown = luthier("methods", "linear", cwd=tmp_path).stdout
    assert "luthier merge RUN RUN -o FOLDER --method linear" in shown
    assert re.search(r"luthier merge +linear", luthier("methods", cwd=tmp_path).stdout)
