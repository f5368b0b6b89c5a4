"""A process that asked for it ends when the one that started it is killed."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress

import pytest

from luthier.support import machine

CHILD = "from luthier.support import machine; machine.end_with_parent(); print('up', flush=True); import time; time.sleep(60)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {CHILD!r}]); time.sleep(60)"


# prctl's PR_SET_PDEATHSIG is Linux's own; macOS and Windows have nothing like it, so nothing is promised there.
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent ended")
def test_a_killed_process_takes_its_children_along():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
        assert parent.communicate(timeout=10)[0] == b""  # the child held the pipe's other end: it has ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_elsewhere_nothing_is_called(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *given, **more: pytest.fail("prctl is Linux's"))
    machine.end_with_parent()


def test_settled_things_are_looked_through_no_more_and_garbage_is_not_kept():
    class Node:
        """A thing that can hold itself."""

    kept, dropped = Node(), Node()
    dropped.me = dropped  # a circle: only the collector frees it
    gone = weakref.ref(dropped)
    del dropped
    machine.settle()
    assert gone() is None
    assert not any(thing is kept for thing in gc.get_objects())
