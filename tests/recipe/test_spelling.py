"""A typo in a recipe is refused in a sentence, and before torch is imported."""

import json
import subprocess
import sys

import jsonschema
import pytest

from luthier import recipe
from luthier.method import registry
from luthier.recipe import schema
from luthier.support.errors import RecipeError

STAGES = "pipeline: {{stages: {{stages: [{{name: a, {0}}}]}}}}"
CASES = [
    ("learning_rte: 1", "r.yaml:3: learning_rte: there is no such key; did you mean learning_rate?"),
    ("Learning-Rate: 1", "r.yaml:3: Learning-Rate: there is no such key; did you mean learning_rate?"),
    ("tuner: LORA", "r.yaml:3: tuner.LORA: there is no tuner called 'LORA'; did you mean lora?"),
    ("tuner: green_trainer", "tuner.green_trainer: there is no tuner called 'green_trainer'; did you mean green-trainer?"),
    ("tuner: {lora: {rnk: 4}}", "tuner.lora.rnk: there is no such key; did you mean rank?"),
    ("tuner: {lora: 4}", "tuner.lora: holds 4; write its fields as keys"),
    ("evaluate: [loss, rogue]", "evaluate.1.rogue: there is no evaluator called 'rogue'; did you mean rouge?"),
    ("evaluate: {exact-match: {row: 3}}", "evaluate.0.exact-match.row: there is no such key; did you mean rows?"),
    ("evaluate: {exact-match: {match: jsn}}", "evaluate.0.exact-match.match: is 'jsn'; it can be "),
    ("curate: [random]", "curate.0.random.keep_fraction: is missing; add it"),
    ("objective: {caft: {stage: head}}", "objective.caft.stage: is 'head'; it can be heads or tune; did you mean heads?"),
    ("lr_scheduler_type: linera", "lr_scheduler_type: is 'linera'; it can be linear, "),
    ("lr_scheduler_type: reduce_lr_on_plateau", "lr_scheduler_type: is 'reduce_lr_on_plateau'; it can be linear, "),
    ("dtype: float16", "dtype: is 'float16'; it can be auto, bfloat16 or float32; did you mean bfloat16?"),
    ("luthier: 'NO'", "luthier: is 'NO'; it can be 1"),
    ("epochs: three", 'epochs: "three": input should be a valid number'),
    (STAGES.format("tuner: lroa"), "pipeline.stages.stages.0.tuner.lroa: there is no tuner called 'lroa'; did you mean lora?"),
    (STAGES.format("lerning_rate: 1"), "stages.0.lerning_rate: there is no such key; did you mean learning_rate?"),
    (STAGES.format("objective: {distill: {warmup: 1}}"), "objective.distill.warmup: there is no such key; did you mean"),
    ("collaborate: {one-shot: {privacy: {epsilom: 8}}}", "one-shot.privacy.epsilom: there is no such key; did you mean epsilon"),
    ("collaborate: {grad-transformer: {translator: rigde}}", "translator.rigde: there is no translator called 'rigde'"),
    ("pace: {lenght: 0.1}", "pace.lenght: there is no such key; did you mean length?"),
    ("pipeline: {stages: {stages: a}}", "pipeline.stages.stages"),
]  # fmt: skip


def refused(text):
    with pytest.raises(RecipeError) as error:
        recipe.load(text, "r.yaml")
    return str(error.value)


@pytest.mark.parametrize(("line", "says"), CASES, ids=[line[:40] for line, _ in CASES])
def test_a_typo_is_named_with_what_was_meant(line, says):
    assert says in refused(f"model: a/b\ndata: {{train: x.jsonl}}\n{line}\n")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("train.jsonl", "r.yaml:2: data: is 'train.jsonl', where keys belong; write data: {train: train.jsonl}"),
        ("{train: x, colums: {}}", "r.yaml:2: data.colums: there is no such key; did you mean columns?"),
        ("{train: [{pth: x}]}", "r.yaml:2: data.train.0.pth: there is no such key; did you mean path?"),
        ("{train: x, on_long: trim}", "data.on_long: is 'trim'; it can be refuse, drop, trim_prompt or trim_end"),
        ("{}", "r.yaml:2: data.train: is missing; add it"),
    ],
)
def test_a_typo_below_data_is_named(data, says):
    assert says in refused(f"model: a/b\ndata: {data}\n")


def test_typos_are_found_without_torch(tmp_path):
    """All of them, in one process that looks at what was imported."""
    texts = [f"model: a/b\ndata: {{train: x.jsonl}}\n{line}\n" for line, _ in CASES[:-1]]
    texts += ["model: a/b\ndata: train.jsonl\n", "data: {train: x}\n", "model: a/b\ndata: {train: x}\nmy_token: x\n"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys\nfrom luthier import recipe\nfrom luthier.support.errors import RecipeError\n"
        "for text in json.load(open('texts.json')):\n"
        "    try: recipe.load(text)\n    except RecipeError: pass\n    else: print('accepted', text)\n"
        "    for heavy in ('torch', 'transformers', 'peft', 'datasets', 'numpy', 'pyarrow'):\n"
        "        if heavy in sys.modules: print(heavy, text)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_recipe_that_is_right_passes_both_looks():
    """The stored lists refuse nothing that the classes accept."""
    text = """
        model: a/b
        data: {train: [{path: a, weight: 2}, {path: b}], keep: [weight], eval: c}
        tuner: {lora: {rank: 4, targets: [q_proj]}}
        objective: {q-tuning: }
        curate: [{random: {keep_fraction: 0.5}}]
        evaluate: exact-match
        report_to: none
        gradient_checkpointing: auto
    """
    loaded = recipe.load(text.replace("\n        ", "\n"))
    assert loaded.report_to == ("none",) and loaded.tuner.targets == ("q_proj",)
    jsonschema.validate(json.loads(json.dumps(loaded.as_dict())), schema.stored())


def test_the_stored_schema_is_made_from_the_classes():
    assert schema.build() == schema.stored(), "run make docs"


def test_the_schema_says_nothing_that_only_some_versions_of_pydantic_say():
    assert '"additionalProperties": true' not in schema.FILE.read_text()
    fill = schema.stored()["$defs"]["DataSettings"]["properties"]["fill"]
    assert fill["type"] == "object" and "additionalProperties" not in fill  # any key, before pydantic 2.11 and after
    assert schema.stored()["additionalProperties"] is False


def test_the_schema_looks_into_stages():
    stage = {"name": "a", "tuner": {"lora": {"rank": 3}}}
    values = {"model": "a/b", "data": {"train": "x"}, "pipeline": {"stages": {"stages": [stage]}}}
    jsonschema.validate(values, schema.stored())
    stage["tuner"] = {"lora": {"rnk": 3}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema.stored())


def test_a_method_of_a_package_is_left_to_its_class(monkeypatch):
    monkeypatch.setattr(registry, "plugins", lambda: {("tuner", "other"): None})
    from luthier.method.building import Lines
    from luthier.recipe import spelling

    spelling.check(
        {"model": "a/b", "data": {"train": "x"}, "tuner": {"other": {"any": 1}}}, Lines("r", {}, frozenset())
    )
