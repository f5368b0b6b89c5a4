"""The processes of a run, played by threads of this one: they take turns, and one waits where it needs what another has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.support.rng import generator_states, set_generators

PATIENCE = 30.0  # seconds that one waits for the others


class Ranks:
    """What the processes of one run share."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._values: list[Any] = [None] * world
        self._turn, self._together = threading.Lock(), threading.Barrier(world)

    def shared(self, rank: int, value: Any) -> list[Any]:
        """What every rank brought, in their order."""
        self._values[rank] = value
        self._wait()
        found = list(self._values)
        self._wait()  # none brings the next before all have read this
        return found

    def _wait(self) -> None:
        drawn = generator_states()  # a process has generators of its own
        self._turn.release()
        try:
            self._together.wait(PATIENCE)
        finally:
            self._turn.acquire()
            set_generators(drawn)

    def run(self, work: Callable[[Rank], Any]) -> list[Any]:
        """What `work` returns in every rank. Raises what the first of them raised."""

        def alone(rank: int) -> Any:
            with self._turn:
                try:
                    return work(Rank(self, rank))
                except BaseException:
                    self._together.abort()
                    raise

        with ThreadPoolExecutor(self.world) as threads:
            done = [threads.submit(alone, r) for r in range(self.world)]
        errors = [d.exception() for d in done]
        for error in sorted(filter(None, errors), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [d.result() for d in done]


class Rank:
    """Stands for the Accelerator of one process. `calls` says what was asked of it, in order."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self.num_processes, self.process_index = ranks, ranks.world, rank
        self.is_main_process = rank == 0
        self.ddp_handler: Any = None
        self.calls: list[str] = []
        self._module: nn.Module = nn.Module()
        self._alone = False

    def prepare_model(self, module: nn.Module) -> nn.Module:
        self.calls.append("prepare_model")
        self._module = module
        return module

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        assert reduction == "sum"
        self.calls.append("reduce")
        return torch.stack(self._ranks.shared(self.process_index, value)).sum(0)

    def gather(self, value: Tensor) -> Tensor:
        self.calls.append("gather")
        return torch.cat(self._ranks.shared(self.process_index, value))

    def wait_for_everyone(self) -> None:
        self.calls.append("wait_for_everyone")
        self._ranks.shared(self.process_index, None)

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """Backward passes inside leave gradients as they are."""
        assert module is self._module
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; outside `no_sync`, each is then the mean over ranks, as it is with torch's wrapper."""
        loss.backward()
        if self._alone:
            return
        self.calls.append("mean of gradients")
        params = [p for p in self._module.parameters() if p.requires_grad]
        every = self._ranks.shared(self.process_index, [None if p.grad is None else p.grad.clone() for p in params])
        for p, grads in zip(params, zip(*every, strict=True), strict=True):
            there = [g for g in grads if g is not None]
            if there:
                p.grad = torch.stack(there).sum(0) / self.num_processes
