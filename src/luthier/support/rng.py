"""Randomness keyed by purpose, epoch and row: the same numbers whatever the rank, worker or call order."""

from __future__ import annotations

import hashlib

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
