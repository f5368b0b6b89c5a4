"""lm-eval indexes thousands of tasks and lists installed packages at each call, which takes seconds."""

from functools import partial

import pytest


@pytest.fixture(autouse=True)
def brisk_lm_eval(request, monkeypatch):
    """In tests of lm-eval, the index holds only the example's folder, and the machine is not described."""
    if "[lm-eval" not in request.node.name:
        return
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
