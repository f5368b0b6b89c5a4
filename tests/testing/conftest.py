"""lm-eval indexes thousands of tasks and lists installed packages each time it is asked: seconds that tests can spare."""

from functools import partial

import pytest


@pytest.fixture(autouse=True)
def brisk_lm_eval(request, monkeypatch):
    """For its own tests: the index holds the example's folder alone, and nothing is told of the machine."""
    if "[lm-eval" not in request.node.name:
        return
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
