"""Randomness keyed by purpose, epoch and row. The numbers do not depend on rank, worker or order of calls."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Streams:
    """Independent random streams under one seed.

    >>> a = Streams(0).at("mask", 1, 42).integers(1000)
    >>> a == Streams(0).at("mask", 1, 42).integers(1000)
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _digest(self, purpose: str, *key: int | str) -> int:
        text = "\x1f".join([str(self.seed), purpose, *map(str, key)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def at(self, purpose: str, *key: int | str) -> np.random.Generator:
        """A NumPy generator for this purpose and key."""
        return np.random.default_rng(self._digest(purpose, *key))

    def torch(self, purpose: str, *key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
        """A torch generator for this purpose and key."""
        return torch.Generator(device=device).manual_seed(self._digest(purpose, *key) & (2**63 - 1))


# --- the global generators, which dropout and other libraries draw from ---


def generator_states() -> dict[str, Any]:
    """The states of the global generators: Python's, NumPy's, torch's on the CPU and on every GPU in use.

    Only tensors, numbers and tuples, so that they can be read back without unpickling.
    """
    state: Any = np.random.get_state(legacy=False)
    numpy_state = {
        "key": torch.from_numpy(state["state"]["key"].astype(np.int64)), "pos": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"]),
    }  # fmt: skip
    return {
        "python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }  # fmt: skip


def set_generators(states: dict[str, Any]) -> None:
    """Set the global generators to the states of `generator_states`. A GPU without a stored state is not changed."""
    random.setstate(states["python"])
    n = states["numpy"]
    np.random.set_state(("MT19937", n["key"].numpy().astype(np.uint32), n["pos"], n["has_gauss"], n["gauss"]))
    torch.set_rng_state(states["cpu"])
    known = states["cuda"][: torch.cuda.device_count()] if states["cuda"] else []
    for device, state in enumerate(known):
        torch.cuda.set_rng_state(state, device)


class Generators:
    """A sequence of the global generators for one piece of work. Draws of other code do not change it, and it does not change the
    draws of other code.

    >>> own, other = Generators(Streams(0), "train"), Generators(Streams(0), "train")
    >>> with own.drawing():
    ...     first = torch.rand(2)
    >>> with other.drawing():
    ...     print(torch.equal(first, torch.rand(2)))
    True
    """

    def __init__(self, streams: Streams, purpose: str, *key: int | str) -> None:
        self._seed = int(streams.at(purpose, *key).integers(1 << 63))
        self.states: dict[str, Any] | None = None  # before the first draw

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draws inside the block come from this sequence."""
        outside = generator_states()
        if self.states is None:
            random.seed(self._seed)
            np.random.seed(self._seed % (1 << 32))
            torch.manual_seed(self._seed)  # also for every GPU
        else:
            set_generators(self.states)
        try:
            yield
            self.states = generator_states()  # work that failed has drawn nothing
        finally:
            set_generators(outside)
