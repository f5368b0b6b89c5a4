"""Long work says how far it is, short work says nothing."""

import pytest

from luthier.support import progress
from luthier.support.progress import Lines


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_with_rate_and_time_left(clock):
    said = []
    lines = Lines(said.append)
    for step in range(1, 61):
        clock[0] += 0.5
        lines("tune    step", step, 60)
    assert said[0] == "tune    step 21 of 60, 120.0 a minute, 20 s left" and len(said) == 2
    clock[0] += 100
    lines("audit   canary", 0, 50)
    clock[0] += 9
    lines("audit   canary", 30, 50)
    assert len(said) == 2, "another count begins anew"
    clock[0] += 1
    lines("audit   canary", 40, 50)
    assert said[2] == "audit   canary 40 of 50, 240.0 a minute, 2 s left"
