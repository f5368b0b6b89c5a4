"""How this process uses its machine. This must be set before torch is imported; results do not depend on it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def prepare() -> None:
    """Set what the user has not set: how many compiled kernels torch keeps, and how idle threads wait.

    Measured on two cores. oneDNN and its binding keep a compiled kernel with its buffers for every shape that they have
    seen, 1024 by default, and flat batches have a new length each time: 2.0 GB after eight steps of short forward passes,
    where 1.3 GB are enough at the same speed. Threads that sleep at once cost a third of a step on an idle machine (1.5 s
    against 1.05 s); threads that spin cost as much on a busy one (2.7 s against 2.0 s).
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "32")
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "10000"


def settle() -> None:
    """Keep all that is loaded so far out of later garbage collections. For processes of our own, after their imports.

    torch and transformers leave over a million objects. Looking through them takes up to a second, and a run does so three
    times to measure memory.
    """
    gc.collect()
    gc.freeze()


def end_with_parent() -> None:
    """Send this process a terminate signal when its parent process ends, even if that is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
