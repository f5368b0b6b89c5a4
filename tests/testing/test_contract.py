"""The contract suite on every exported method. A class that is exported without an example in tests/helpers fails."""

import importlib
import inspect
import json
import pkgutil

import pytest
import torch

from helpers.examples import ALL, EXAMPLES, FIELDS, IDS
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS
from luthier.objectives.sft import Sft
from luthier.testing import contract, plugin
from luthier.testing.contract import *  # noqa: F403
from luthier.testing.contract import PADDED
from luthier.testing.models import tiny


def test_every_method_has_an_example_and_no_example_is_left_over():
    assert set(IDS) == set(FIELDS)


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_a_method_is_named_after_its_file_and_has_a_source(kind, name, cls):
    assert cls.__module__.rpartition(".")[2].replace("_", "-") == name
    assert name in ("frozen", "stages") or cls.source is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_tests_of_behaviour_and_every_method_runs_them(kind):
    """The suite has tests for each kind, besides the tests of every method."""
    own = [n for n in contract.__all__ if kind in inspect.signature(getattr(contract, n)).parameters]
    assert len(own) >= (1 if kind in ("decode", "merge", "inspect") else 3), (
        f"luthier.testing.contract has too few tests of a {kind}"
    )
    assert all(getattr(contract, n).__module__.startswith(plugin.CONTRACT) for n in own), "the plug-in makes them"
    assert all(any(e.fits(kind) and type(e.method) is cls for e in EXAMPLES) for k, _, cls in ALL if k == kind)


def test_every_test_of_the_suite_is_handed_on():
    """A test of a module that the package does not import, or that `__all__` does not name, would never run."""
    modules = [m.name for m in pkgutil.iter_modules(contract.__path__)]
    found = {
        n: getattr(importlib.import_module(f"luthier.testing.contract.{m}"), n)
        for m in modules for n in dir(importlib.import_module(f"luthier.testing.contract.{m}")) if n.startswith("test_")
    }  # fmt: skip
    assert found and {n: getattr(contract, n, None) for n in found} == found and set(contract.__all__) == set(found)


def test_the_manifest_is_what_the_classes_say():
    assert manifest.read() == json.loads(json.dumps(manifest.build())), "run python -m luthier.method.registry"


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


@pytest.mark.parametrize(("kind", "name", "cls"), ALL, ids=IDS)
def test_imports_of_a_method_never_touch_another(kind, name, cls):
    """A method imports no other method; pipelines and protocols may import those that they consist of."""
    if kind in ("pipeline", "collaborate"):
        return
    source = inspect.getsource(importlib.import_module(cls.__module__))
    others = [c.__module__ for _, _, c in ALL if c is not cls and c.__module__ != cls.__module__]
    assert not [o for o in others if f"from {o} import" in source or f"import {o}" in source]
