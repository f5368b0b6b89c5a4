"""What every exported method keeps. Exporting a class enrols it; one without an example here fails collection."""

import importlib
import inspect
import json

import pytest
import torch

from conftest import batch_of, rows_of, tiny, view_of
from luthier import manifest, recipe
from luthier.data.batch import collate
from luthier.errors import LuthierError, RecipeError
from luthier.method import Facts, Method
from luthier.objectives.sft import Sft
from luthier.pipelines.base import Lab
from luthier.training.loop import Loop
from luthier.training.settings import TrainSettings
from luthier.update.files import load, save_update
from pipelines.test_list import cloze, with_soft

SETTINGS = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2)
CONSTANT = {"lr_scheduler_type": "constant", "warmup_fraction": 0.0}
# A small instance of every method: fields away from their defaults where the tiny model needs it.
EXAMPLES = {
    "adapter": {"rank": 4, "init_std": 0.05},
    "bleu": {"rows": 2},
    "caft": {"allow_untrained_heads": True, "weight": 0.5},
    "calibration": {},
    "classification": {},
    "dept": {"budget_length": 12, "length": 4, "max_length": 16},
    "distill": {"warmup_share": 0.0},
    "editing": {"rephrase": "otherwise"},
    "exact-match": {"match": "json"},
    "fedkseed": {"num_seeds": 8},
    "forgetting": {"max_tokens": 32},
    "frozen": {},
    "function-calls": {"arguments_key": None},
    "full": {},
    "green-trainer": {"flops_share": 0.7},
    "hft": {"fraction": 0.4},
    "knowledge": {"kinds": ("memorize", "rephrase")},
    "lemo": {"block_size": 2},
    "lift": {"density": 0.1, "reselect_every": 2},
    "list": {"rounds": 1, "unlabelled_steps": 2, "labelled_epochs": 1, "rank": 2},
    "layerwise": {"decay": 0.9, "reinit_blocks": 1},
    "lora": {"rank": 4},
    "loss": {},
    "masked-thought": {"max_rate": 0.4, "random_share": 0.5},
    "otr": {"draws": 16},
    "pass-at-k": {"samples": 2, "k": (1, 2)},
    "peft": {"type": "LORA", "options": {"use_dora": True, "r": 4}},
    "q-tuning-offline": {"keep_fraction": 0.5},
    "q-tuning": {"keep_rows": 0.5},
    "random": {"keep_fraction": 0.5},
    "rouge": {"stem": True},
    "scdp": {"keep_fraction": 0.5},
    "sft": {},
    "spiel": {"density": 0.05, "reselect_every": 4, "window": 2},
    "stages": {"stages": [{"name": "first", "max_steps": 2}, {"name": "second", "start": "first", "max_steps": 2}]},
}
ALL = [(kind, name, cls) for kind in manifest.KINDS for name, cls in manifest.classes(kind).items()]
IDS = [name for _, name, _ in ALL]
TUNERS = [(name, cls) for kind, name, cls in ALL if kind == "tuner"]
OBJECTIVES = [(name, cls) for kind, name, cls in ALL if kind == "objective"]


def example(name, cls):
    return cls(**EXAMPLES[name])


def rows_for(objective):
    return with_soft(cloze(8, 0)) if objective.key() == "distill" else rows_of((14, 12, 9, 11), answer=5)


def loop_for(tuner, objective, view=None, **changes):
    view = view or view_of()
    closure = "closure" in tuner.traits.needs
    settings = SETTINGS.model_copy(update={**(CONSTANT if closure else {}), **changes})
    lab = Lab({"labelled": cloze(6, 5)})
    return Loop(
        view, rows_for(objective), tuner.attach(view, total_steps=settings.max_steps), objective, settings, lab=lab
    )


def test_every_method_has_an_example_and_no_example_is_left_over():
    assert set(IDS) == set(EXAMPLES)


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_page_source_and_documented_fields(kind, name, cls):
    assert issubclass(cls, Method) and cls.__module__.rpartition(".")[2].replace("_", "-") == name
    doc = inspect.getdoc(cls)
    assert doc and "Cost:" in doc, "a page says what the method costs"
    assert name in ("frozen", "stages") or cls.source is not None
    for field, info in cls.model_fields.items():
        assert info.description, f"{field} has no documentation"


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_recipe_round_trip_and_wrong_fields_name_their_key(kind, name, cls):
    method = example(name, cls)
    if name != "stages":  # its methods are found by the recipe, below
        assert cls(**json.loads(method.model_dump_json())) == method
    with pytest.raises(ValueError, match="no_such_field"):
        cls(no_such_field=1)
    listed = kind in manifest.LISTS
    text = f"model: a/b\ndata: {{train: x.jsonl}}\n{kind}: {'- ' * listed}{{{name}: {{no_such_field: 1}}}}\n".replace(
        ": - ", ":\n- "
    )
    place = rf"{kind}\.0" if listed else kind
    with pytest.raises(
        RecipeError, match=rf"r\.yaml:{3 + listed}: {place}\.{name}\.no_such_field: there is no such key"
    ):
        recipe.load(text, "r.yaml")
    settings = "".join(f"{k}: {v}\n" for k, v in CONSTANT.items()) if "closure" in cls.traits.needs else ""
    task = "" if "causal-lm" in cls.traits.tasks and "pool" not in cls.traits.needs else "task: classification\n"
    data = "data: {train: x.jsonl, eval: x.jsonl%s}" % (", pool: y.jsonl" * ("pool" in cls.traits.needs))
    given = {name: EXAMPLES[name]}
    loaded = recipe.load(f"model: a/b\n{task}{data}\n{settings}{kind}: {json.dumps([given] if listed else given)}\n")
    assert getattr(loaded, kind) == ([method] if listed else method)
    assert recipe.load(json.dumps(loaded.as_dict())) == loaded


def test_the_manifest_is_what_the_classes_say():
    assert manifest.read() == json.loads(json.dumps(manifest.build())), "run python -m luthier.manifest"


@pytest.mark.parametrize(("name", "cls"), TUNERS, ids=[n for n, _ in TUNERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_back_the_base_bit_for_bit(name, cls, dtype):
    view = view_of()
    view.module.to(dtype)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    flags = {n: p.requires_grad for n, p in view.module.named_parameters()}
    if name == "frozen":
        trainable = example(name, cls).attach(view)
        with pytest.raises(LuthierError, match="nothing trains"):
            loop_for(example(name, cls), Sft(), view)
    else:
        loop = loop_for(example(name, cls), Sft(), view)
        trainable = loop.trainable
        for _ in range(3):
            loop.step()
    trainable.detach()
    after = dict(view.module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n], p) and p.requires_grad == flags[n] and p.grad is None for n, p in after.items())
    assert not view.input_hooks and not any("forward" in vars(m) for m in view.module.modules())


@pytest.mark.parametrize(("name", "cls"), TUNERS, ids=[n for n, _ in TUNERS])
def test_the_saved_update_in_a_fresh_base_gives_the_same_states(name, cls, tmp_path):
    view, batch = view_of(), batch_of()
    if name == "frozen":
        trainable = example(name, cls).attach(view)
    else:
        loop = loop_for(example(name, cls), Sft(), view)
        trainable = loop.trainable
        for _ in range(3):
            loop.step()
    view.module.eval()
    live, plain = view.trace(batch).hidden[-1].detach(), view_of().trace(batch).hidden[-1]
    assert torch.equal(live, plain) == (name == "frozen")
    update = trainable.update()
    save_update(update, tmp_path, view)
    fresh = view_of()
    with load(tmp_path).bind(fresh):
        torch.testing.assert_close(fresh.trace(batch).hidden[-1], live, atol=2e-5, rtol=1e-4)
    assert update.linear == cls.traits.linear or name == "frozen"


@pytest.mark.parametrize(("name", "cls"), TUNERS, ids=[n for n, _ in TUNERS])
def test_same_seed_same_numbers(name, cls):
    if name == "frozen":
        assert list(example(name, cls).attach(view_of()).parameters()) == []
        return
    runs = []
    for _ in range(2):
        loop = loop_for(example(name, cls), Sft())
        runs.append([loop.step()["loss"] for _ in range(3)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("name", "cls"), OBJECTIVES, ids=[n for n, _ in OBJECTIVES])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_packed_alone_and_padded_give_the_same_loss(name, cls, layout):
    from luthier.tuners.adapter import Adapter

    results = []
    for limit in (10_000, 1):
        view = view_of()
        view.layout = layout
        tuner = Adapter(rank=2, init_std=0.05)
        loop = loop_for(tuner, example(name, cls), view, tokens_per_forward=limit, adam_eps=1e-5)
        results.append([loop.step()["loss"] for _ in range(3)])
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    if layout == "padded":
        view = view_of()
        loop = loop_for(Adapter(rank=2, init_std=0.05), example(name, cls), view, adam_eps=1e-5)
        assert [loop.step()["loss"] for _ in range(3)] == pytest.approx(results[0], abs=1e-5)


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_refusals_are_those_the_traits_declare(kind, name, cls):
    method = example(name, cls)
    for task in ("causal-lm", "classification", "audio"):
        refused = any(p.key == "task" for p in method.check(Facts(task=task, batch_size=4)))
        assert refused == (task not in cls.traits.tasks)
    for layout in ("flat", "padded"):
        refused = any(p.key == "layout" for p in method.check(Facts(layout=layout, batch_size=4)))
        assert refused == (layout not in cls.traits.layouts)
    refused = any(p.key == "num_processes" for p in method.check(Facts(num_processes=2, batch_size=4)))
    assert refused == ("one_process" in cls.traits.needs)
    refused = any(p.key == "quantize" for p in method.check(Facts(quantized=True, batch_size=4)))
    assert refused == ("plain_weights" in cls.traits.needs)


BARE = [(n, c) for n, c in TUNERS if n != "frozen" and "grad" not in c.traits.needs and "closure" not in c.traits.needs]


@pytest.mark.parametrize(("name", "cls"), BARE, ids=[n for n, _ in BARE])
def test_five_lines_in_a_bare_loop(name, cls):
    """The plain transformers model, a plain optimiser loop: no house but the tuner."""
    model, batch = tiny().eval(), batch_of((9,), answer=5)
    ids = batch.ids.unsqueeze(0)
    labels = ids.clone()
    labels[:, :4] = -100
    tuned = example(name, cls).attach(model, total_steps=8)
    optimizer = tuned.optimizer(
        tuned.groups(), lambda groups: torch.optim.AdamW([p for g in groups for p in g.params], lr=1e-2)
    )
    losses = []
    for _ in range(8):
        tuned.before_window(None, None)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        tuned.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        tuned.after_step(None)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert tuned.update().parts


PADDED = {
    "input_ids": torch.arange(5, 41).view(4, 9),
    "attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0], [1] * 9]),
}
PADDED["labels"] = torch.where(
    (torch.arange(9) >= 4) & (PADDED["attention_mask"] == 1), PADDED["input_ids"], torch.tensor(-100)
)


def soft_batch():
    rows = with_soft(cloze(4, 0))
    columns = {k: torch.stack([torch.as_tensor(r["row"][k]) for r in rows]) for k in rows[0]["row"]}
    return {"input_ids": torch.tensor([r["ids"] for r in rows]), **columns}


class Four(torch.utils.data.Dataset):
    """Rows for transformers' Trainer."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {k: v[i] for k, v in PADDED.items()}


@pytest.mark.parametrize(("name", "cls"), BARE, ids=[n for n, _ in BARE])
def test_five_lines_with_transformers_trainer(name, cls, tmp_path):
    from transformers import Trainer, TrainingArguments

    from luthier.standalone import Tuning

    model = tiny()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tuned = example(name, cls).attach(model, total_steps=8)
    optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2))
    trainer = Trainer(model, arguments, train_dataset=Four(), optimizers=(optimizer, None), callbacks=[Tuning(tuned)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert tuned.update().parts


@pytest.mark.parametrize(("name", "cls"), OBJECTIVES, ids=[n for n, _ in OBJECTIVES])
def test_an_objective_in_a_bare_loop_is_the_houses(name, cls):
    """The same loss and gradient as a step of the loop on the same rows."""
    from luthier.standalone import Loss
    from luthier.tuners.full import Full

    if name == "distill":
        rows, inputs = with_soft(cloze(4, 0)), soft_batch()
    else:
        inputs, ids = PADDED, PADDED["input_ids"]
        rows = [
            {"ids": i[m].tolist(), "labels": y[m].tolist(), "key": str(k), "token": {"prompt": [1] * 4 + [0] * int(m.sum() - 4)}}
            for k, (i, y, m) in enumerate(zip(ids, inputs["labels"], inputs["attention_mask"].bool(), strict=True))
        ]  # fmt: skip
    lab = Lab({"labelled": cloze(6, 5)})
    model = tiny()
    loss = Loss(example(name, cls), model, total_steps=3, lab=lab)
    value = loss(inputs)
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    view = view_of()
    settings = SETTINGS.model_copy(update={"max_grad_norm": 1e9, "shuffle": False})
    loop = Loop(view, rows, Full().attach(view), example(name, cls), settings, lab=lab)
    seen = {}
    loop.trainable.before_step = lambda stats: seen.update(
        {n: p.grad.clone() for n, p in view.module.named_parameters() if p.grad is not None}
    )
    assert loop.step()["loss"] == pytest.approx(float(value.detach()), abs=1e-6)
    assert seen.keys() == gradients.keys()
    assert all(torch.allclose(seen[n], gradients[n], atol=1e-6) for n in seen)


def test_a_compute_method_in_a_bare_loop():
    from luthier.compute.lemo import Lemo
    from luthier.standalone import Loss

    model = tiny()
    plain, thin = Loss(Sft(), model), Loss(Sft(), model, compute=Lemo(block_size=2))
    with thin.thinned():
        loss = thin(PADDED)
        loss.backward()
    assert float(loss.detach()) > 0 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert float(plain(PADDED).detach()) > 0


def test_tuners_that_probe_and_step_by_closure_in_a_bare_loop():
    from luthier.collaboration.fedkseed import FedKSeed
    from luthier.standalone import Loss
    from luthier.tuners.green_trainer import GreenTrainer

    model = tiny()
    loss, tuned = Loss(Sft(), model, total_steps=6), GreenTrainer(flops_share=0.7).attach(model, total_steps=6)
    optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2))
    losses = []
    for _ in range(6):
        tuned.before_window(loss.window(PADDED), loss.probe)
        value = loss(PADDED)
        value.backward()
        tuned.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        tuned.after_step(None)
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    model = tiny()
    loss, tuned = Loss(Sft(), model), FedKSeed(num_seeds=8).attach(model, total_steps=30)
    optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.SGD([p for x in g for p in x.params], lr=1e-2))
    for _ in range(3):
        optimizer.step(lambda: float(loss(PADDED).detach()))
        tuned.after_step(None)
    assert tuned.update().parts


def test_curators_choose_among_plain_dictionaries():
    from luthier.curation import Random, Scdp

    rows = [{"prompt": f"word{i} number{i}", "completion": "same answer"} for i in range(10)]
    for method in (Scdp(keep_fraction=0.5), Random(keep_fraction=0.5)):
        kept = method.choose(rows)
        assert len(set(kept)) == 5 and set(kept) <= set(range(10))


def test_collate_of_examples_is_what_loops_see():
    assert collate(rows_of()).num_sequences == 4


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_imports_of_a_method_never_touch_another(kind, name, cls):
    """Methods know their kind and never each other; a pipeline may name the methods it is made of."""
    if kind == "pipeline":
        return
    source = inspect.getsource(importlib.import_module(cls.__module__))
    others = [c.__module__ for _, _, c in ALL if c is not cls and c.__module__ != cls.__module__]
    assert not [o for o in others if f"from {o} import" in source or f"import {o}" in source]
