"""Less work for two evaluators whose own sets and indexes are large."""

import pytest

from helpers.exams import only_own_tasks
from luthier.evaluation import forgetting


@pytest.fixture(autouse=True)
def own_tasks(request, monkeypatch):
    """In tests of lm-eval, its index has only the example's folder."""
    if "[lm-eval" in request.node.name:
        only_own_tasks(monkeypatch)


@pytest.fixture(autouse=True)
def few_canaries(request, monkeypatch):
    """In tests of forgetting, its built-in sets have only their first rows; tests/evaluation tests the whole sets."""
    if "[forgetting" in request.node.name:
        whole = forgetting.built_in
        monkeypatch.setattr(forgetting, "built_in", lambda name: whole(name)[:6])
