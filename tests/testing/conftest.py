"""Less work for two evaluators whose own sets and indexes are large."""

from functools import partial

import pytest

from luthier.evaluation import forgetting


@pytest.fixture(autouse=True)
def brisk_lm_eval(request, monkeypatch):
    """lm-eval indexes thousands of tasks and lists installed packages at each call, which takes seconds. In its tests the
    index holds only the example's folder, and the machine is not described.
    """
    if "[lm-eval" not in request.node.name:
        return
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


@pytest.fixture(autouse=True)
def few_canaries(request, monkeypatch):
    """In tests of forgetting, its built-in sets have only their first rows; tests/evaluation tests the whole sets."""
    if "[forgetting" in request.node.name:
        whole = forgetting.built_in
        monkeypatch.setattr(forgetting, "built_in", lambda name: whole(name)[:6])
