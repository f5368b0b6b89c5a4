"""The contract over every exported method. Exporting a class enrols it; one without an example here fails."""

import importlib
import inspect
import json

import pytest
import torch

from helpers.examples import ALL, EXAMPLES, FIELDS, IDS  # noqa: F401
from luthier.data.batch import collate
from luthier.method import registry as manifest
from luthier.objectives.sft import Sft
from luthier.testing.contract import *  # noqa: F403
from luthier.testing.contract import PADDED
from luthier.testing.models import rows_of, tiny


def test_every_method_has_an_example_and_no_example_is_left_over():
    assert set(IDS) == set(FIELDS)


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_a_method_is_named_after_its_file_and_has_a_source(kind, name, cls):
    assert cls.__module__.rpartition(".")[2].replace("_", "-") == name
    assert name in ("frozen", "stages") or cls.source is not None


def test_the_manifest_is_what_the_classes_say():
    assert manifest.read() == json.loads(json.dumps(manifest.build())), "run python -m luthier.method.registry"


def test_a_compute_method_in_a_bare_loop():
    from luthier.compute.lemo import Lemo
    from luthier.integrations.own_loop import Loss

    model = tiny()
    plain, thin = Loss(Sft(), model), Loss(Sft(), model, compute=Lemo(block_size=2))
    with thin.thinned():
        loss = thin(PADDED)
        loss.backward()
    assert float(loss.detach()) > 0 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert float(plain(PADDED).detach()) > 0


def test_tuners_that_probe_and_step_by_closure_in_a_bare_loop():
    from luthier.integrations.own_loop import Loss
    from luthier.tuners.fedkseed import FedKSeed
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
    """Methods know their kind and never each other; pipelines and protocols may name the methods they are made of."""
    if kind in ("pipeline", "collaborate"):
        return
    source = inspect.getsource(importlib.import_module(cls.__module__))
    others = [c.__module__ for _, _, c in ALL if c is not cls and c.__module__ != cls.__module__]
    assert not [o for o in others if f"from {o} import" in source or f"import {o}" in source]
