"""What every method keeps, as tests. A module of yours asks them of your methods:

    from luthier.testing.contract import *  # noqa: F403
    EXAMPLES = [Focal(gamma=1.0)]

An example is a small instance; where it needs rows of its own, or other rows beside them, write Example(method, rows=...).
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from luthier import recipe
from luthier.curation.base import Curator
from luthier.data.batch import IGNORE, Batch, collate
from luthier.data.store import Row
from luthier.data.table import DROP, KEEP, Table
from luthier.decoding.base import Decoder
from luthier.inference.services import lab_around
from luthier.inspection.base import Case, Inspector
from luthier.merging.base import Merger
from luthier.method import Facts, Method
from luthier.method import registry as manifest
from luthier.method.base import Need
from luthier.method.kinds import KINDS, LISTED, kind_of
from luthier.model.view import ModelView, probe_layout
from luthier.objectives.base import Forward, Objective, Term
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.step.window import Window
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.classification import Classification
from luthier.testing.models import batch_of, byte_tokenizer, labelled_rows, rows_of, tiny, view_of
from luthier.training.loop import Interrupted, Loop
from luthier.tuners.adapter import Adapter
from luthier.tuners.base import Stats, Trainable, Tuner, with_head
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.update.files import load, save_update

STEPS = 6
SETTINGS = TrainSettings(max_steps=STEPS, batch_size=4, learning_rate=1e-2)
CONSTANT = {"lr_scheduler_type": "constant", "warmup_fraction": 0.0}  # what a closure asks for
WORDS = "alpha beta gamma delta river stone cloud field green paper metal seven night glass horse table"
TEXTS = [  # what curators are tried on: rows of different words and lengths
    {"prompt": f"say {a} and {b}", "completion": " ".join([a] * (1 + i % 4) + [b, f"item{i * i}"])}
    for i, (a, b) in enumerate(zip(WORDS.split(), reversed(WORDS.split()), strict=True))
]


class Example(NamedTuple):
    """A small instance of a method, and what it needs to work on.

    rows    rendered rows, random ones with a supervised end by default; for a curator rows as a file has them
    inputs  rows as a padded batch of transformers, for an objective that needs more than ids and labels
    pools   other rows, by the name that the method looks them up under
    trains  False for a tuner with which nothing of the model moves
    """

    method: Method
    rows: Sequence[dict[str, Any]] | None = None
    inputs: Mapping[str, Tensor] | None = None
    pools: Mapping[str, Sequence[dict[str, Any]]] = {}
    trains: bool = True

    @property
    def kind(self) -> str:
        """The recipe key."""
        return kind_of(self.method).key

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        cls = type(self.method)
        return manifest.name_of(cls) or f"{cls.__module__}:{cls.__qualname__}"

    def fits(self, argument: str) -> bool:
        """Is this example one for tests with this argument?"""
        if argument == "example":
            return True
        if argument == "plain_tuner":  # one that any loop can drive
            needs = self.method.traits.needs
            return self.kind == "tuner" and self.trains and not needs & {"grad", "closure"}
        return self.kind == argument


def as_examples(given: Sequence[Example | Method]) -> list[Example]:
    """Methods become examples."""
    return [e if isinstance(e, Example) else Example(e) for e in given]


def loop_of(
    tuner: Example, objective: Example, view: ModelView | None = None, folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False, **changes: Any,
) -> Loop:  # fmt: skip
    """The house's loop over a tiny model."""
    view = view or view_of()
    closure = "closure" in tuner.method.traits.needs
    settings = SETTINGS.model_copy(update={**(CONSTANT if closure else {}), **changes})
    rows = objective.rows or rows_of((14, 12, 9, 11), answer=5)
    assert isinstance(tuner.method, Tuner) and isinstance(objective.method, Objective)
    trainable = tuner.method.attach(view, total_steps=settings.max_steps)
    lab = Lab(sets={n: list(r) for n, r in objective.pools.items()})
    return Loop(
        view, rows, trainable, objective.method, settings, lab=lab, folder=folder, stop=stop, data_hash="contract"
    )


NOTHING: tuple[Any, Any] = (None, None)  # window and probe, for tuners that ask for neither
PLAIN = Example(Sft())
SMALL = Example(Adapter(rank=2, init_std=0.05))
DROPPING = Example(Lora(rank=2, dropout=0.2))  # draws in every step


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="asks for a GPU; the same is tested on the CPU above"
)


def losses(tuner: Example, objective: Example, device: str) -> list[float]:
    """Losses of a few steps in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one device otherwise
    view = ModelView(tiny().eval().to(device))
    view.layout, _ = probe_layout(view)
    loop = loop_of(tuner, objective, view)
    return [float(loop.step()["loss"]) for _ in range(STEPS)]


def attached(tuner: Example, view: ModelView, steps: int = 3) -> Trainable:
    """Trained for a few steps, where it trains anything."""
    if not tuner.trains:
        assert isinstance(tuner.method, Tuner)
        return tuner.method.attach(view)
    loop = loop_of(tuner, PLAIN, view)
    for _ in range(steps):
        loop.step()
    return loop.trainable


# --- every method ---


def test_page_and_documented_fields(example: Example) -> None:
    doc = inspect.getdoc(type(example.method))
    assert doc and "Cost:" in doc, (
        "the docstring is the method's page; it says what the method costs, in a line with Cost:"
    )
    for field, info in type(example.method).model_fields.items():
        assert info.description, f"{field} has no documentation: write a docstring below it"


def test_every_field_is_read(example: Example) -> None:
    cls = type(example.method)
    trees = [ast.parse(inspect.getsource(sys.modules[c.__module__])) for c in cls.__mro__ if issubclass(c, Method)]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = set(cls.model_fields) - read
    assert not unread, f"no code reads {', '.join(sorted(unread))}"


def test_recipe_round_trip(example: Example) -> None:
    if KINDS[example.kind].command is not None:
        method = example.method
        assert same(type(method)(**json.loads(method.model_dump_json())), method)
        return
    method = example.method
    if example.kind != "pipeline":  # its methods are found by the recipe, below
        assert same(type(method)(**json.loads(method.model_dump_json())), method)
    loaded = recipe.load(recipe_with(example, method.model_dump(mode="json", exclude_defaults=True)), code=Path())
    assert same(found_in(loaded, example), method)
    assert recipe.load(json.dumps(loaded.as_dict()), code=Path()) == loaded


def same(a: Method, b: Method) -> bool:
    """Equal class and fields, whatever either has noted of its work."""
    return type(a) is type(b) and a.model_dump() == b.model_dump()


def test_a_wrong_field_names_its_key(example: Example) -> None:
    with pytest.raises(ValueError, match="no_such_field"):
        type(example.method).model_validate({"no_such_field": 1})
    if KINDS[example.kind].command is not None:  # no key of a recipe
        return
    with pytest.raises(RecipeError) as refused:
        recipe.load(recipe_with(example, {"no_such_field": 1}), code=Path())
    place = f"{example.kind}.0" if example.kind in LISTED else example.kind
    place = "collaborate.grad-transformer.translator" if example.kind == "translate" else place
    assert f"{place}.{example.name}.no_such_field: there is no such key" in str(refused.value)


def recipe_with(example: Example, fields: Mapping[str, Any]) -> str:
    """A recipe that names this method with these fields."""
    traits, one = type(example.method).traits, {example.name: dict(fields)}
    tree: dict[str, Any] = {"model": "a/b", "data": {"train": "x.jsonl", "eval": "x.jsonl"}}
    if "pool" in traits.needs:
        tree["data"]["pool"] = "y.jsonl"
    if Facts().task not in traits.tasks:
        tree["task"] = min(traits.tasks)
    if "closure" in traits.needs:
        tree |= CONSTANT
    if example.kind == "translate":  # a field of a protocol
        tree["collaborate"] = {"grad-transformer": {"translator": one}}
    else:
        tree[example.kind] = [one] if example.kind in LISTED else one
    return json.dumps(tree)


def found_in(loaded: Any, example: Example) -> Any:
    """The method that a recipe of `recipe_with` holds."""
    if example.kind == "translate":
        return loaded.collaborate.translator
    found = getattr(loaded, example.kind)
    return found[0] if example.kind in LISTED else found


def test_refusals_are_those_the_traits_declare(example: Example) -> None:
    traits, method = type(example.method).traits, example.method
    for task in (*manifest.names("task"), "audio"):
        assert refused(method, "task", task=task) == (task not in traits.tasks)
    for layout in ("flat", "padded"):
        assert refused(method, "layout", layout=layout) == (layout not in traits.layouts)
    assert refused(method, "num_processes", num_processes=2) == ("one_process" in traits.needs)
    assert refused(method, "quantize", quantized=True) == bool(traits.needs & {Need.PLAIN_WEIGHTS, Need.JVP})


def refused(method: Method, key: str, **facts: Any) -> bool:
    """Does it object under this key?"""
    return any(p.key == key for p in method.check(Facts(batch_size=4, **facts)))


# --- tuners ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_back_the_base_bit_for_bit(tuner: Example, dtype: torch.dtype) -> None:
    view = view_of()
    torch.nn.Module.to(view.module, dtype)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    flags = {n: p.requires_grad for n, p in view.module.named_parameters()}
    attached(tuner, view).detach()
    after = dict(view.module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n], p) and p.requires_grad == flags[n] and p.grad is None for n, p in after.items())
    assert not view.input_hooks and not any("forward" in vars(m) for m in view.module.modules())


def test_the_saved_update_in_a_fresh_base_gives_the_same_states(tuner: Example, tmp_path: Path) -> None:
    view, batch = view_of(), batch_of()
    trainable = attached(tuner, view)
    view.module.eval()
    live, plain = view.trace(batch).hidden[-1].detach(), view_of().trace(batch).hidden[-1]
    assert torch.equal(live, plain) != tuner.trains
    update = trainable.update()
    save_update(update, tmp_path, view)
    fresh = view_of()
    with load(tmp_path).bind(fresh):
        torch.testing.assert_close(fresh.trace(batch).hidden[-1], live, atol=2e-5, rtol=1e-4)
    assert update.linear == type(tuner.method).traits.linear or not tuner.trains


@pytest.mark.parametrize("kind", ["llama-classifier", "gpt2-classifier", "bert-classifier"])
def test_a_task_head_is_learnt_or_refused_by_check(tuner: Example, kind: str, tmp_path: Path) -> None:
    learns_a_task_head(tuner, kind, tmp_path)


def learns_a_task_head(tuner: Example, kind: str, folder: Path) -> None:
    """Unless `check` refuses this classifier with a sentence: every step trains its head, a stopped run goes on as if it had
    not been, and the saved update gives the same logits on a base whose head was drawn anew.
    """
    view, rows = view_of(kind), labelled_rows()
    closure = "closure" in tuner.method.traits.needs
    settings = SETTINGS.model_copy(
        update={"tokens_per_forward": 20, **(CONSTANT if closure else {"warmup_fraction": 0.0})}
    )
    facts = Facts(
        Classification.key(), view.layout, STEPS, 4, len(rows), view.module.config, settings, anatomy=view.anatomy
    )
    if refusals := tuner.method.check(facts):
        assert all(" " in p.what for p in refusals)
        return

    def loop_on(view: ModelView) -> Loop:
        assert isinstance(tuner.method, Tuner)
        trainable = with_head(tuner.method.attach(view, total_steps=STEPS), view.anatomy.task_head)
        return Loop(view, rows, trainable, Sft(), settings, folder=folder / "stopped", data_hash="contract")

    def logits(view: ModelView) -> Tensor:
        view.module.eval()
        return Forward(collate(rows), view).logits().detach()

    loop = loop_on(view)
    heads = {n: view.weight(n).detach().clone() for n in view.anatomy.task_head}
    losses = [loop.step()["loss"] for _ in range(2)]
    loop.save()
    assert losses[1] != losses[0] and all(not torch.equal(view.weight(n), t) for n, t in heads.items())
    losses += [loop.step()["loss"] for _ in range(2)]
    live, update = logits(view), loop.trainable.update()
    resumed = loop_on(view_of(kind))
    assert resumed.resume() and [resumed.step()["loss"] for _ in range(2)] == losses[2:]
    assert torch.equal(logits(resumed.view), live)
    save_update(update, folder, view)
    fresh = view_of(kind)
    with torch.no_grad():
        for n in heads:
            fresh.weight(n).normal_()
    with load(folder).bind(fresh):
        torch.testing.assert_close(logits(fresh), live, atol=2e-5, rtol=1e-4)
    loop.trainable.detach()
    assert all(torch.equal(view.weight(n), t) for n, t in heads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_update_the_model_is_the_base(tuner: Example, dtype: torch.dtype) -> None:
    """To the bit inside and, once outside again, to the bit what it was: after an error, and nested, too."""
    view, batch = view_in(dtype), batch_of()
    base = states(view_in(dtype), batch)
    attached(tuner, view)
    view.module.eval()
    tuned = states(view, batch)
    with view.without_update():
        assert torch.equal(states(view, batch), base)
        with view.without_update():
            assert torch.equal(states(view, batch), base)
        assert torch.equal(states(view, batch), base)
    assert torch.equal(states(view, batch), tuned) and torch.equal(tuned, base) != tuner.trains
    with pytest.raises(ZeroDivisionError), view.without_update():
        raise ZeroDivisionError
    assert torch.equal(states(view, batch), tuned)


def test_who_looks_at_the_base_trains_as_who_does_not(tuner: Example) -> None:
    """The base is asked before each step, and between the forward and the backward of every micro-batch."""
    if not tuner.trains:
        return
    looking, blind = loop_of(tuner, Example(Looking()), adam_eps=1e-5), loop_of(tuner, PLAIN, adam_eps=1e-5)
    assert [looking.step()["loss"] for _ in range(STEPS)] == [blind.step()["loss"] for _ in range(STEPS)]
    mine, theirs = looking.trainable.state_dict(), blind.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert all(
        torch.equal(p, q) for p, q in zip(looking.view.module.parameters(), blind.view.module.parameters(), strict=True)
    )


class Looking(Sft):
    """The usual loss, by one who compares the base with a fresh one on every occasion."""

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        with probe.quiet():
            probe.view.module.train()
            look(probe.forward(window.micro[0]))
        with probe.view.without_update():
            scored = probe.scores(window.micro)[0].nll
            names = [n for n in probe.view.anatomy.parameters if n.endswith("norm.weight")]
            probe.gradients(window.micro, names)
        with probe.quiet(), probe.view.without_update():
            assert torch.equal(probe.forward(window.micro[0]).scores().nll, scored)
        return super().plan(window, probe)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        if fwd.view.attached.left_out:  # the gradient of the base is asked for
            return super().loss(fwd)
        look(Forward(fwd.batch, fwd.view))
        terms, tuned = super().loss(fwd), fwd.hidden()
        look(fwd)
        assert fwd.hidden() is tuned
        return terms


def look(fwd: Forward) -> None:
    view, fresh = fwd.view, view_in(fwd.view.dtype)
    mode = view.module.training
    with view.without_update():
        assert not view.module.training
        assert torch.equal(fwd.hidden(), states(fresh, fwd.batch))
        assert torch.equal(fwd.scores().nll, Forward(fwd.batch, fresh).scores().nll)
    assert view.module.training == mode


def view_in(dtype: torch.dtype) -> ModelView:
    view = view_of()
    torch.nn.Module.to(view.module, dtype)
    return view


@torch.no_grad()  # attention takes another way with a gradient, which rounds in its own way
def states(view: ModelView, batch: Batch) -> Tensor:
    """[T, D] the last hidden states."""
    return view.trace(batch).hidden[-1]


def test_same_seed_same_numbers(tuner: Example) -> None:
    if not tuner.trains:
        assert isinstance(tuner.method, Tuner) and not list(tuner.method.attach(view_of()).parameters())
        with pytest.raises(LuthierError, match="nothing trains"):
            loop_of(tuner, PLAIN)
        return
    first, second = loop_of(tuner, PLAIN), loop_of(tuner, PLAIN)
    assert [first.step()["loss"] for _ in range(3)] == [second.step()["loss"] for _ in range(3)]


def test_a_resumed_tuner_ends_where_an_uninterrupted_one_does(tuner: Example, tmp_path: Path) -> None:
    if tuner.trains:
        resumed_equals_whole(tuner, PLAIN, tmp_path)


def test_a_resumed_objective_ends_where_an_uninterrupted_one_does(objective: Example, tmp_path: Path) -> None:
    resumed_equals_whole(DROPPING, objective, tmp_path)


def resumed_equals_whole(tuner: Example, objective: Example, folder: Path) -> None:
    """Stopped after two steps and after four, to the bit."""
    whole = loop_of(tuner, objective)
    whole.run()
    for _ in range(2):
        asked: Iterator[int] = iter(range(100))
        with pytest.raises(Interrupted):
            loop_of(tuner, objective, folder=folder, stop=lambda asked=asked: next(asked) >= 1).run()  # type: ignore[misc]
    again = loop_of(tuner, objective, folder=folder)
    again.run()
    assert [e.get("loss") for e in again.progress.log] == [e.get("loss") for e in whole.progress.log]
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@on_a_gpu
def test_a_tuner_trains_on_a_gpu_as_on_the_cpu(tuner: Example) -> None:
    if tuner.trains:
        assert losses(tuner, PLAIN, "cuda") == pytest.approx(losses(tuner, PLAIN, "cpu"), rel=1e-3)


@on_a_gpu
def test_an_objective_trains_on_a_gpu_as_on_the_cpu(objective: Example) -> None:
    assert losses(SMALL, objective, "cuda") == pytest.approx(losses(SMALL, objective, "cpu"), rel=1e-3)


def test_a_tuner_in_a_bare_loop(plain_tuner: Example) -> None:
    """The plain transformers model, a plain optimiser loop: no house but the tuner."""
    model, batch = tiny().eval(), batch_of((9,), answer=5)
    ids = batch.ids.unsqueeze(0)
    labels = ids.clone()
    labels[:, :4] = IGNORE
    assert isinstance(plain_tuner.method, Tuner)
    tuned = plain_tuner.method.attach(model, total_steps=8)
    optimizer = tuned.optimizer(
        tuned.groups(), lambda groups: torch.optim.AdamW([p for g in groups for p in g.params], lr=1e-2)
    )
    losses = []
    for _ in range(8):
        tuned.before_window(*NOTHING)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        tuned.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        tuned.after_step(NOTHING[0])
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert tuned.update().parts


def test_a_tuner_under_transformers_trainer(plain_tuner: Example, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from luthier.integrations.own_loop import Tuning

    model = tiny()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert isinstance(plain_tuner.method, Tuner)
    tuned = plain_tuner.method.attach(model, total_steps=8)
    optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-2))
    trainer = Trainer(model, arguments, train_dataset=Four(), optimizers=(optimizer, None), callbacks=[Tuning(tuned)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert tuned.update().parts


# --- decoders, mergers, inspectors ---


def test_an_answer_does_not_depend_on_its_batch(decode: Example) -> None:
    from luthier.inference.services import lab_around
    from luthier.testing.models import byte_tokenizer

    assert isinstance(decode.method, Decoder)
    lab = lab_around(tiny(vocab_size=260), byte_tokenizer(), seed=3)
    views, prompts = {"model": lab.view()}, [[5, 6, 7], [40] * 9, [9], [70, 71, 72, 73]]
    together = decode.method.decode(views, prompts, lab, 6)
    assert [c.tokens for c in together] and all(c.tokens <= 6 for c in together)
    assert together == [decode.method.decode(views, [p], lab, 6)[0] for p in prompts]
    assert together == decode.method.decode(views, prompts[::-1], lab, 6)[::-1]


def test_one_update_merged_alone_with_all_weight_is_itself_and_order_is_of_no_account(merge: Example) -> None:
    assert isinstance(merge.method, Merger)
    first, second = (attached(Example(Adapter(rank=2, init_std=0.05)), view_of(seed=0)).update() for _ in range(2))
    with pytest.raises(LuthierError):
        merge.method.merge([])
    with pytest.raises(LuthierError):
        merge.method.merge([first, second])  # added modules are no vector space


def test_a_finding_holds_a_sentence_a_table_and_a_picture(inspect: Example) -> None:
    view = view_of()
    update = attached(Example(Full()), view).update()
    assert isinstance(inspect.method, Inspector)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    finding = inspect.method.inspect(Case(view, {"mine": update}))
    assert finding.says.endswith(".") and "mine" in finding.says and finding.sure
    assert finding.rows and all(len(r) == len(finding.columns) for r in finding.rows)
    assert finding.picture.startswith("<svg") and finding.picture.endswith("</svg>")
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters()), "it only looks"


# --- objectives ---


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_packed_alone_and_padded_give_the_same_loss(objective: Example, layout: str) -> None:
    results = []
    for limit in (10_000, 1):
        view = view_of()
        view.layout = layout
        loop = loop_of(SMALL, objective, view, tokens_per_forward=limit, adam_eps=1e-5)
        results.append([loop.step().get("loss") for _ in range(3)])  # a step that is skipped has none
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    if layout == "padded":
        loop = loop_of(SMALL, objective, adam_eps=1e-5)
        assert [loop.step().get("loss") for _ in range(3)] == pytest.approx(results[0], abs=1e-5)


def test_an_objective_in_a_bare_loop_is_the_houses(objective: Example) -> None:
    """The same loss and gradient as a step of luthier's loop on the same rows."""
    from luthier.integrations.own_loop import Loss
    from luthier.tuners.full import Full

    assert isinstance(objective.method, Objective)
    model, lab = tiny(), Lab(sets={n: list(r) for n, r in objective.pools.items()})
    loss = Loss(objective.method, model, total_steps=STEPS, lab=lab)
    value = loss(PADDED if objective.inputs is None else dict(objective.inputs))
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    view, same = view_of(), objective._replace(rows=padded_rows() if objective.inputs is None else objective.rows)
    loop = loop_of(Example(Full()), same, view, max_grad_norm=1e9, shuffle=False)
    seen: dict[str, Tensor] = {}

    def note(stats: Stats) -> bool:
        seen.update({n: p.grad.clone() for n, p in view.module.named_parameters() if p.grad is not None})
        return True

    loop.trainable.before_step = note  # type: ignore[method-assign]
    assert loop.step()["loss"] == pytest.approx(float(value.detach()), abs=1e-6)
    assert seen.keys() == gradients.keys()
    assert all(torch.allclose(seen[n], gradients[n], atol=1e-6) for n in seen)


PADDED = {
    "input_ids": torch.arange(5, 41).view(4, 9),
    "attention_mask": torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0], [1] * 9]),
}
PADDED["labels"] = torch.where(
    (torch.arange(9) >= 4) & (PADDED["attention_mask"] == 1), PADDED["input_ids"], torch.tensor(IGNORE)
)


def padded_rows() -> list[dict[str, Any]]:
    """The rows of PADDED as luthier renders them."""
    out = []
    for k, mask in enumerate(PADDED["attention_mask"].bool()):
        ids, labels = PADDED["input_ids"][k][mask].tolist(), PADDED["labels"][k][mask].tolist()
        out.append({"ids": ids, "labels": labels, "key": str(k), "token": {"prompt": [1] * 4 + [0] * (len(ids) - 4)}})
    return out


class Four(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows for transformers' Trainer."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in PADDED.items()}


# --- curators ---


def curation_rows(curate: Example) -> list[Row]:
    """What a curator is tried on, under keys of a file."""
    given = TEXTS if curate.rows is None else curate.rows
    return [Row(f"f:{i}", dict(values)) for i, values in enumerate(given, start=1)]


def curation_lab(seed: int = 0) -> Lab:
    """The services of a tiny model over bytes."""
    return lab_around(tiny(vocab_size=260, max_position_embeddings=512), byte_tokenizer(), seed)


def curated(curate: Example, rows: Sequence[Row], seed: int = 0) -> Table:
    """The table that a curator leaves of rows."""
    assert isinstance(curate.method, Curator)
    return curate.method.curate(Table.of(rows).at(curate.name), curation_lab(seed))


def decided(table: Table) -> dict[str, tuple[Any, ...]]:
    """By key (and that of the parent) what became of every entry, why, how much it weighs, and what it holds."""
    out = {}
    for number in range(len(table.entries)):
        line, row = table.line(number), table.entries[number]
        parent = "" if line["parent"] is None else f" of {table.entries.key(line['parent'])}"
        out[row.key + parent] = (line["decision"], line["reason"], line["weight"], row.values)
    return out


def scores_of(table: Table) -> dict[str, float]:
    """By key what decisions rest on; NaN for rows that were made."""
    return {table.entries.key(i): float(table.score[i]) for i in range(table.incoming)}


def test_a_curator_accounts_for_every_row(curate: Example) -> None:
    rows = curation_rows(curate)
    before = Table.of(rows).at(curate.name)
    assert isinstance(curate.method, Curator)
    table = curate.method.curate(before, curation_lab())
    assert table.follows(before), "the result comes from the table's own operations"
    assert [table.entries[i] for i in range(len(rows))] == rows, "what came in stays as it came"
    assert sorted(table.live) == np.flatnonzero(table.decision == KEEP).tolist() and len(table)
    assert all(table.reason[i] for i in range(len(table.entries)) if table.decision[i] != KEEP), "each has a reason"
    assert len({r.key for r in table.rows}) == len(table), "no two rows of the set share a key"


def test_every_row_that_a_curator_made_has_a_parent_or_none(curate: Example) -> None:
    rows = curation_rows(curate)
    table = curated(curate, rows)
    for number in range(len(rows), len(table.entries)):
        parent = int(table.parent[number])
        assert parent < number and (parent < 0 or table.decision[parent] != DROP)
    replaced = np.flatnonzero(table.decision > DROP)
    assert set(replaced) <= set(table.parent.tolist()), "what was rewritten or split has rows in its place"


def test_a_curator_decides_alike_whatever_the_order_of_rows(curate: Example) -> None:
    rows = curation_rows(curate)
    mixed = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    one, other = curated(curate, rows), curated(curate, mixed)
    assert decided(one) == decided(other) and scores_of(one) == pytest.approx(scores_of(other), rel=1e-4, nan_ok=True)


def test_a_curator_with_one_seed_decides_once(curate: Example) -> None:
    rows = curation_rows(curate)
    first, again = curated(curate, rows), curated(curate, rows)
    assert decided(first) == decided(again) and [r.key for r in first.rows] == [r.key for r in again.rows]


def test_a_curator_keeps_the_share_it_was_asked_for(curate: Example) -> None:
    share = getattr(curate.method, "keep_fraction", None)
    if share is None:
        return
    rows = curation_rows(curate)
    for n in (len(rows), len(rows) - 3):
        assert len(curated(curate, rows[:n])) == int(share * n)
    whole = curate._replace(method=curate.method.model_copy(update={"keep_fraction": 1.0}))
    assert [r.key for r in curated(whole, rows).rows] == [r.key for r in rows]


def test_an_idempotent_curator_changes_nothing_the_second_time(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    if not curate.method.idempotent:
        return
    once = curated(curate, curation_rows(curate))
    twice = curate.method.curate(once.at(curate.name), curation_lab())
    assert list(twice.rows) == list(once.rows) and len(twice.entries) == len(once.entries)
    assert np.array_equal(twice.weight, once.weight)


def test_a_codec_brings_back_the_answers_it_encodes(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    codec = curate.method.codec
    if codec is None:
        return
    for row in curation_rows(curate):
        coded = codec.encode(row.values)
        assert codec.decode(row.values, coded["completion"]) == row.values["completion"]
        asked = codec.encode({k: v for k, v in row.values.items() if k != "completion"})
        assert asked["prompt"] == coded["prompt"], "the model is asked what it was trained on"


def test_a_curator_in_a_loop_of_your_own(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    rows = [r.values for r in curation_rows(curate)]
    before = json.dumps(rows)
    asked = curate.method.traits.needs & {"base_view", "generation"}
    model: dict[str, Any] = {}
    if asked:
        model = {"model": tiny(vocab_size=260, max_position_embeddings=512), "tokenizer": byte_tokenizer()}
    kept = curate.method.choose(rows, **model)
    table = curate.method.curated(rows, **model)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(len(rows))) and json.dumps(rows) == before
    assert kept == sorted({int(i) for i in table.roots(table.live) if i >= 0})
    if model:
        with pytest.raises(LuthierError, match="asks a model and was given none"):
            curate.method.choose(rows)


__all__ = [n for n in dir() if n.startswith("test_")]
